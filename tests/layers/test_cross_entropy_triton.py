"""The kernel's loss and gradient are the equation's, written elsewhere or in place."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not built for this platform")

from implementations.lab.compare import assert_same_accuracy, assert_same_function, error
from implementations.layers.cross_entropy import cross_entropy_naive
from implementations.layers.cross_entropy_triton import (
    cross_entropy_backward_op,
    cross_entropy_in_place,
    cross_entropy_in_place_op,
    cross_entropy_op,
    cross_entropy_triton,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NARROW = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
SHAPES = [(1, 1), (9, 1), (9, 63), (3, 5, 257), (5, 4099), (2, 32768), (3, 65537)]

# A share and the sum of all have the error of a GPU's exp2: 2^-22 each in float32, by PTX's manual.
EXP2 = 2.0**-21 if torch.cuda.is_available() else 0.0


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, size: float = 3.0):
    """Logits, and targets of which the second is ignored where there are two."""
    logits = (size * torch.randn(shape, dtype=torch.float64, device=DEVICE)).to(dtype)
    targets = torch.randint(shape[-1], shape[:-1], device=DEVICE)
    targets.view(-1)[1:2] = -100
    return logits, targets


def with_targets(function, targets, **options):
    return lambda logits: function(logits, targets, **options)


@pytest.mark.parametrize("z_loss", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_function(shape, z_loss):
    logits, targets = inputs(shape)
    fast = with_targets(cross_entropy_triton, targets, z_loss=z_loss)
    naive = with_targets(cross_entropy_naive, targets, z_loss=z_loss)
    assert_same_function(fast, naive, logits)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_in_place(shape, z_loss):
    logits, targets = inputs(shape)
    leaf = logits.clone().requires_grad_()
    want = cross_entropy_naive(leaf, targets, z_loss=z_loss)
    want.backward()
    got = cross_entropy_in_place(logits, targets, z_loss=z_loss)
    assert error(got, want).largest <= 1e-10 * max(1.0, want.item())
    assert error(logits, leaf.grad).largest <= 1e-10


@pytest.mark.parametrize("size", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("shape", [(40, 63), (16, 257), (4, 4099)], ids=str)
def test_same_accuracy(shape, dtype, size):
    logits, targets = inputs(shape, dtype, size)
    fast = with_targets(cross_entropy_triton, targets, z_loss=1e-4)
    naive = with_targets(cross_entropy_naive, targets, z_loss=1e-4)
    # Losses are one number, where rounding may help naive by luck: twice the tolerance there.
    known = EXP2 if dtype == torch.float32 else 0.0
    assert_same_accuracy(fast, naive, logits, slack=4.0, known=known)


@pytest.mark.parametrize("ignore_index", [-100, 0, 62])
def test_every_row_but_one_ignored(ignore_index):
    """A class of the vocabulary may be the one that is ignored."""
    logits, targets = inputs((9, 63))
    targets[:] = ignore_index
    targets[4] = 7
    options = {"ignore_index": ignore_index, "z_loss": 0.1}
    fast = with_targets(cross_entropy_triton, targets, **options)
    assert_same_function(fast, with_targets(cross_entropy_naive, targets, **options), logits)


def test_targets_of_32_bits_and_strided_logits():
    logits, targets = inputs((12, 300))
    for view in (lambda x: x[:, 3:260], lambda x: x.reshape(3, 4, 300).transpose(0, 1)):
        shape = view(logits).shape
        chosen = targets.clamp(max=200).reshape(shape[:-1]).int()
        assert_same_function(
            lambda x, view=view, chosen=chosen: cross_entropy_triton(view(x), chosen),
            lambda x, view=view, chosen=chosen: cross_entropy_naive(view(x), chosen.long()),
            logits,
        )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy computes for the interpreter
def test_infinities_and_nan():
    """-inf has no share; a row with inf or NaN, or of -inf alone, has no loss."""
    logits = torch.randn(5, 9, dtype=torch.float64, device=DEVICE)
    targets = torch.tensor([0, 1, 2, 3, 4], device=DEVICE)
    logits[0, 3:] = -torch.inf
    logits[1], logits[2, 0], logits[3, 0] = -torch.inf, torch.inf, torch.nan
    losses = cross_entropy_op(logits, targets, -100, 0.0)
    want = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses[[0, 4]], want[[0, 4]])
    assert not losses[1:4].isfinite().any()


def test_a_target_outside_makes_the_loss_nan_and_reads_nothing():
    logits, targets = inputs((9, 63))
    for outside in (63, -1, 10**12):
        targets[5] = outside
        losses = cross_entropy_op(logits, targets, -100, 0.0)
        assert losses.isnan().nonzero().tolist() == [[5]]


def test_nothing_valid_is_nan():
    logits, targets = inputs((3, 5))
    assert cross_entropy_triton(logits, torch.full_like(targets, -100)).isnan()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck reads it
def test_torch_library():
    logits, targets = inputs((6, 63), torch.float32)
    one = torch.ones(6, device=DEVICE)
    torch.library.opcheck(cross_entropy_backward_op, (logits, targets, one, -100, 0.1))
    torch.library.opcheck(cross_entropy_in_place_op, (logits, targets, one, -100, 0.1))
    torch.library.opcheck(cross_entropy_op, (logits.requires_grad_(), targets, -100, 0.1))


@pytest.mark.usefixtures("unchecked")
def test_compiles_as_one_graph():
    logits, targets = inputs((6, 63))
    fast = with_targets(cross_entropy_triton, targets, z_loss=0.1)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert_same_function(compiled, fast, logits)


LOGITS, TARGETS = torch.ones(2, 3), torch.tensor([0, 1])
BAD = {
    "integers": (LOGITS.int(), TARGETS, 0.0, "computes with floats, got torch.int32"),
    "complex": (LOGITS.cfloat(), TARGETS, 0.0, "computes with floats, got torch.complex64"),
    "no axis": (LOGITS[0, 0], TARGETS, 0.0, "a row needs at least one number"),
    "no vocabulary": (LOGITS[:, :0], TARGETS, 0.0, r"at least one number, .* \(2, 0\)"),
    "too many targets": (LOGITS, torch.zeros(3).long(), 0.0, r"need targets of \(2,\), got \(3,\)"),
    "too few targets": (LOGITS, TARGETS[:1], 0.0, r"need targets of \(2,\), got \(1,\)"),
    "one hot": (LOGITS, LOGITS.long(), 0.0, r"need targets of \(2,\), got \(2, 3\)"),
    "a column": (LOGITS, TARGETS[:, None], 0.0, r"need targets of \(2,\), got \(2, 1\)"),
    "targets of floats": (LOGITS, TARGETS.float(), 0.0, "int64 or int32, got torch.float32"),
    "targets of bytes": (LOGITS, TARGETS.byte(), 0.0, "int64 or int32, got torch.uint8"),
    "Boolean targets": (LOGITS, TARGETS.bool(), 0.0, "int64 or int32, got torch.bool"),
    "negative z-loss": (LOGITS, TARGETS, -0.1, "is not negative, got -0.1"),
    "targets elsewhere": (LOGITS, TARGETS.to("meta"), 0.0, "targets is on meta, x on cpu"),
}


@pytest.mark.parametrize("function", [cross_entropy_triton, cross_entropy_in_place])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_sentence(case, function):
    logits, targets, z_loss, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        function(logits, targets, z_loss=z_loss)


def test_what_cannot_be_overwritten_is_refused():
    with pytest.raises(ValueError, match="require a gradient cannot become it"):
        cross_entropy_in_place(LOGITS.clone().requires_grad_(), TARGETS)
    with pytest.raises(ValueError, match=r"only if dense, got strides \(1, 3\)"):
        cross_entropy_in_place(torch.ones(3, 3).T, torch.zeros(3).long())
