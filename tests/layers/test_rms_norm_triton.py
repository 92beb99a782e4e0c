"""RMSNorm's kernel is the equation: in float64 to the last digits, in narrow types as exact."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not built for this platform")

from implementations.lab.compare import assert_same_accuracy, assert_same_function
from implementations.layers.rms_norm import RMSNorm, add_rms_norm_naive, rms_norm_naive
from implementations.layers.rms_norm_triton import (
    add_rms_norm_triton,
    rms_norm_backward_op,
    rms_norm_op,
    rms_norm_triton,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NARROW = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
# One number, less than a tile, odd, more than 4096, more than a tile; rows that fill no tile.
SHAPES = [(1, 1), (5000, 1), (3, 63), (3, 7, 257), (2, 4099), (7, 4096), (2, 65537)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple:
    x, residual = torch.randn(2, *shape, dtype=torch.float64, device=DEVICE).to(dtype)
    return x, residual, torch.randn(shape[-1], dtype=torch.float64, device=DEVICE).to(dtype)


def stacked(function, epsilon: float = 1e-5):
    """Both outputs of a sum with norm as one, for a comparison of all gradients."""
    return lambda *inputs: torch.stack(function(*inputs, epsilon))


@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_function(shape, epsilon):
    x, residual, scale = inputs(shape)
    assert_same_function(
        lambda x, scale: rms_norm_triton(x, scale, epsilon),
        lambda x, scale: rms_norm_naive(x, scale, epsilon),
        x,
        scale,
    )
    fast, naive = stacked(add_rms_norm_triton, epsilon), stacked(add_rms_norm_naive, epsilon)
    assert_same_function(fast, naive, x, residual, scale)


@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
# Not at width 1, where the gradient is a difference of equal terms and its error is luck.
@pytest.mark.parametrize("shape", [(40, 63), (16, 257), (2, 4099)], ids=str)
def test_same_accuracy(shape, dtype, size):
    x, residual, scale = inputs(shape, dtype)
    x, residual = x * size, residual * size
    assert_same_accuracy(rms_norm_triton, rms_norm_naive, x, scale)
    fast, naive = stacked(add_rms_norm_triton), stacked(add_rms_norm_naive)
    assert_same_accuracy(fast, naive, x, residual, scale)


def test_a_wide_scale_beside_narrow_rows():
    """Under autocast the parameters stay float32."""
    x, _, scale = inputs((8, 257), torch.float16)
    assert_same_accuracy(rms_norm_triton, rms_norm_naive, x, scale.float())


def test_the_norm_reads_the_rounded_stream():
    """The sum's norm is that of the float16 stream that it returns, to the last bit."""
    x, residual, scale = inputs((8, 257), torch.float16)
    output, stream = add_rms_norm_triton(100 * x, residual, scale)
    assert torch.equal(stream, 100 * x + residual)
    assert torch.equal(output, rms_norm_triton(stream, scale))


def test_strided_rows(view):
    whole = torch.randn(60, 300, dtype=torch.float64, device=DEVICE)
    scale = torch.randn(2 * view(whole).shape[-1], dtype=torch.float64, device=DEVICE)
    assert_same_function(
        lambda whole, scale: rms_norm_triton(view(whole), scale[::2]),
        lambda whole, scale: rms_norm_naive(view(whole), scale[::2]),
        whole,
        scale,
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy computes for the interpreter
def test_a_row_of_equal_numbers_and_a_row_of_zeros():
    x = torch.tensor([[3.0] * 7, [0.0] * 7], dtype=torch.float64, device=DEVICE)
    got = rms_norm_triton(x, torch.ones(7, dtype=torch.float64, device=DEVICE), 0.0)
    assert got[0].tolist() == pytest.approx([1.0] * 7)
    got = rms_norm_triton(x, torch.ones(7, dtype=torch.float64, device=DEVICE), 1e-5)
    assert got[1].tolist() == [0.0] * 7


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy computes for the interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(bad):
    x, _, scale = inputs((9, 63), torch.float32)
    clean = rms_norm_triton(x, scale)
    x[4, 5] = bad
    got, naive = rms_norm_triton(x, scale), rms_norm_naive(x, scale)
    assert torch.equal(got.isnan(), naive.isnan())
    others = [i for i in range(9) if i != 4]
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)], ids=str)
def test_no_rows(shape):
    x, residual, scale = inputs(shape)
    assert_same_function(
        stacked(add_rms_norm_triton), stacked(add_rms_norm_naive), x, residual, scale
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck reads it
def test_torch_library():
    """Schema, fake, autograd and AOT dispatch of both operators."""
    x, residual, scale = (value.float().requires_grad_() for value in inputs((6, 63)))
    for added in (None, residual):
        torch.library.opcheck(rms_norm_op, (x, added, scale, 1e-5))
    x, residual, scale, inverse = (
        value.detach() for value in (x, residual, scale, x[:, 0].clone())
    )
    for added in (None, residual):
        torch.library.opcheck(rms_norm_backward_op, (x, added, x, scale, inverse))


@pytest.mark.usefixtures("unchecked")
def test_compiles_as_one_graph():
    x, residual, scale = inputs((6, 63))
    for fast in (rms_norm_triton, stacked(add_rms_norm_triton)):
        given = (x, scale) if fast is rms_norm_triton else (x, residual, scale)
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        assert_same_function(compiled, fast, *given)


def test_a_module_takes_it():
    x = torch.randn(3, 63, device=DEVICE)
    layer = RMSNorm(63, norm=rms_norm_triton).to(DEVICE)
    torch.testing.assert_close(layer(x), RMSNorm(63).to(DEVICE)(x))


def test_bad_input_is_a_sentence(bad_rows):
    x, scale, sentence = bad_rows
    with pytest.raises(ValueError, match=sentence):
        rms_norm_triton(x, scale)
    with pytest.raises(ValueError, match=sentence):
        add_rms_norm_triton(x, x, scale)


def test_a_bad_residual_is_a_sentence(bad_residual):
    x, residual, scale, sentence = bad_residual
    with pytest.raises(ValueError, match=sentence):
        add_rms_norm_triton(x, residual, scale)
