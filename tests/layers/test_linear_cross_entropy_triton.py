"""Loss and both gradients, a chunk at a time, are those of the logits held at once."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not built for this platform")

from implementations.lab.compare import assert_same_accuracy, assert_same_function
from implementations.lab.memory import peak_bytes
from implementations.layers.linear_cross_entropy import linear_cross_entropy_naive
from implementations.layers.linear_cross_entropy_triton import (
    linear_cross_entropy_op,
    linear_cross_entropy_triton,
    loss_and_gradients,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NARROW = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
# Rows that fill no chunk, one chunk each, and leave a last one short.
SHAPES = [((1,), 1, 1), ((3,), 5, 63), ((8,), 1, 7), ((3, 7), 16, 257), ((65,), 8, 4099)]


def inputs(shape, width, vocabulary, dtype=torch.float64):
    hidden = torch.randn(*shape, width, dtype=torch.float64, device=DEVICE).to(dtype)
    weight = torch.randn(vocabulary, width, dtype=torch.float64, device=DEVICE).to(dtype)
    targets = torch.randint(vocabulary, shape, device=DEVICE)
    targets.view(-1)[1:2] = -100
    return hidden, weight, targets


def with_targets(function, targets, **options):
    return lambda hidden, weight: function(hidden, weight, targets, **options)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("shape, width, vocabulary", SHAPES, ids=str)
def test_same_function(shape, width, vocabulary, z_loss):
    hidden, weight, targets = inputs(shape, width, vocabulary)
    fast = with_targets(linear_cross_entropy_triton, targets, z_loss=z_loss)
    naive = with_targets(linear_cross_entropy_naive, targets, z_loss=z_loss)
    assert_same_function(fast, naive, hidden, weight)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("shape, width, vocabulary", [((40,), 64, 257), ((64,), 16, 4099)], ids=str)
def test_same_accuracy(shape, width, vocabulary, dtype):
    """With room for the gradient of the loss, which the backward pass multiplies once more: the
    gradients were already rounded, so two roundings stand against naive's one."""
    hidden, weight, targets = inputs(shape, width, vocabulary, dtype)
    fast = with_targets(linear_cross_entropy_triton, targets)
    naive = with_targets(linear_cross_entropy_naive, targets)
    assert_same_accuracy(fast, naive, hidden / 4, weight / 4, slack=4.0)


def test_gradients_only_where_asked_for():
    hidden, weight, targets = inputs((9,), 5, 63)
    loss = linear_cross_entropy_triton(hidden, weight, targets)
    torch.testing.assert_close(loss, linear_cross_entropy_naive(hidden, weight, targets))
    assert not loss.requires_grad
    for x in linear_cross_entropy_op(hidden, weight, targets, -100, 0.0, False)[1:]:
        assert x.numel() == 0
    hidden.requires_grad_()
    linear_cross_entropy_triton(hidden, weight, targets).backward()
    assert hidden.grad is not None and weight.grad is None


def test_a_seventh_of_the_logits_memory():
    """One chunk is an eighth; the losses of its rows and both gradients come on top."""
    *given, targets = inputs((256,), 2, 4096, torch.float32)

    def naive(hidden, weight):
        loss = linear_cross_entropy_naive(hidden.detach().requires_grad_(), weight, targets)
        return loss, loss.backward()

    def chunked(hidden, weight):
        return loss_and_gradients(hidden, weight, targets, -100, 0.0, True)

    logits = 256 * 4096 * 4
    peaks = {}
    for function in (naive, chunked):
        function(*given)  # cuBLAS keeps the workspace of its first product
        peaks[function] = peak_bytes(function, *given)
    assert logits / 8 < peaks[chunked] < logits / 7
    assert peaks[naive] > 2 * logits


def test_nothing_valid_is_nan():
    hidden, weight, targets = inputs((9,), 5, 63)
    assert linear_cross_entropy_triton(hidden, weight, torch.full_like(targets, -100)).isnan()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck reads it
def test_torch_library():
    hidden, weight, targets = inputs((9,), 5, 63, torch.float32)
    torch.library.opcheck(linear_cross_entropy_op, (hidden, weight, targets, -100, 0.1, False))
    given = hidden.requires_grad_(), weight.requires_grad_(), targets, -100, 0.1, True
    # Differentiating a gradient is not offered: the outputs beside the loss carry none.
    torch.library.opcheck(
        linear_cross_entropy_op, given, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.usefixtures("unchecked")
def test_compiles_as_one_graph():
    hidden, weight, targets = inputs((9,), 5, 63)
    fast = with_targets(linear_cross_entropy_triton, targets, z_loss=0.1)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert_same_function(compiled, fast, hidden, weight)


H, W, T = torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 4])
BAD = {
    "integers": (H.int(), W, T, 0.0, "computes with floats, got torch.int32"),
    "weights of integers": (H, W.int(), T, 0.0, "computes with floats, got torch.int32"),
    "no width": (H[:, :0], W, T, 0.0, r"at least one number, got the shape \(2, 0\)"),
    "transposed": (H, W.T, T, 0.0, r"needs weights \[vocabulary, 3\], got \(3, 5\)"),
    "a vector": (H, W[0], T, 0.0, r"needs weights \[vocabulary, 3\], got \(3,\)"),
    "a stack": (H, W[None], T, 0.0, r"needs weights \[vocabulary, 3\], got \(1, 5, 3\)"),
    "two dtypes": (H, W.half(), T, 0.0, "the weight is torch.float16, hidden torch.float32"),
    "weight elsewhere": (H, W.to("meta"), T, 0.0, "weight is on meta"),
    "too many targets": (H, W, torch.zeros(3).long(), 0.0, r"targets of \(2,\), got \(3,\)"),
    "too few targets": (H, W, T[:1], 0.0, r"targets of \(2,\), got \(1,\)"),
    "a column": (H, W, T[:, None], 0.0, r"targets of \(2,\), got \(2, 1\)"),
    "targets of floats": (H, W, T.float(), 0.0, "int64 or int32, got torch.float32"),
    "Boolean targets": (H, W, T.bool(), 0.0, "int64 or int32, got torch.bool"),
    "targets elsewhere": (H, W, T.to("meta"), 0.0, "targets is on meta"),
    "negative z-loss": (H, W, T, -0.1, "is not negative, got -0.1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_sentence(case):
    hidden, weight, targets, z_loss, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        linear_cross_entropy_triton(hidden, weight, targets, z_loss=z_loss)
