"""LayerNorm's kernel is the equation: in float64 to the last digits, in narrow types as exact."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not built for this platform")

from implementations.lab.compare import assert_same_accuracy, assert_same_function
from implementations.layers.layer_norm import LayerNorm, add_layer_norm_naive, layer_norm_naive
from implementations.layers.layer_norm_triton import (
    add_layer_norm_triton,
    layer_norm_backward_op,
    layer_norm_op,
    layer_norm_triton,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NARROW = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
# One number, less than a tile, odd, more than 4096, more than a tile; rows that fill no tile.
SHAPES = [(1, 1), (5000, 1), (3, 63), (3, 7, 257), (2, 4099), (7, 4096), (2, 65537)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple:
    x, residual = torch.randn(2, *shape, dtype=torch.float64, device=DEVICE).to(dtype)
    scale, shift = torch.randn(2, shape[-1], dtype=torch.float64, device=DEVICE).to(dtype)
    return x, residual, scale, shift


def stacked(function, epsilon: float = 1e-5):
    """Both outputs of a sum with norm as one, for a comparison of all gradients."""
    return lambda *inputs: torch.stack(function(*inputs, epsilon))


@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_function(shape, epsilon):
    x, residual, scale, shift = inputs(shape)
    assert_same_function(
        lambda x, scale, shift: layer_norm_triton(x, scale, shift, epsilon),
        lambda x, scale, shift: layer_norm_naive(x, scale, shift, epsilon),
        x,
        scale,
        shift,
    )
    fast, naive = stacked(add_layer_norm_triton, epsilon), stacked(add_layer_norm_naive, epsilon)
    assert_same_function(fast, naive, x, residual, scale, shift)


@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
# Not at width 1, where the gradient is a difference of equal terms and its error is luck.
@pytest.mark.parametrize("shape", [(40, 63), (16, 257), (2, 4099)], ids=str)
def test_same_accuracy(shape, dtype, size):
    x, residual, scale, shift = inputs(shape, dtype)
    x, residual = x * size, residual * size
    assert_same_accuracy(layer_norm_triton, layer_norm_naive, x, scale, shift)
    fast, naive = stacked(add_layer_norm_triton), stacked(add_layer_norm_naive)
    assert_same_accuracy(fast, naive, x, residual, scale, shift)


def test_a_wide_scale_beside_narrow_rows():
    """Under autocast the parameters stay float32."""
    x, _, scale, shift = inputs((8, 257), torch.float16)
    assert_same_accuracy(layer_norm_triton, layer_norm_naive, x, scale.float(), shift.float())


def test_strided_rows(view):
    whole = torch.randn(60, 300, dtype=torch.float64, device=DEVICE)
    both = torch.randn(2 * view(whole).shape[-1], dtype=torch.float64, device=DEVICE)
    assert_same_function(
        lambda whole, both: layer_norm_triton(view(whole), both[::2], both[1::2]),
        lambda whole, both: layer_norm_naive(view(whole), both[::2], both[1::2]),
        whole,
        both,
    )


@pytest.mark.parametrize("width", [7, 4099, 40_000])
def test_a_row_of_equal_numbers_gives_the_shift(width):
    x = torch.full((2, width), 1e4, dtype=torch.float64, device=DEVICE)
    scale, shift = torch.randn(2, width, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(layer_norm_triton(x, scale, shift), shift.expand(2, width))


@pytest.mark.parametrize("width", [257, 40_000])
def test_far_from_zero_the_variance_survives(width):
    """Pieces are joined by their distance: mean(x²) - mean(x)² would have no digit left."""
    x = torch.randn(2, width, device=DEVICE) + 1e5
    ones, zeros = torch.ones(width, device=DEVICE), torch.zeros(width, device=DEVICE)
    assert_same_accuracy(layer_norm_triton, layer_norm_naive, x, ones, zeros, slack=4.0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy computes for the interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(bad):
    x, _, scale, shift = inputs((9, 63), torch.float32)
    clean = layer_norm_triton(x, scale, shift)
    x[4, 5] = bad
    got, naive = (f(x, scale, shift) for f in (layer_norm_triton, layer_norm_naive))
    assert torch.equal(got.isnan(), naive.isnan())
    others = [i for i in range(9) if i != 4]
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)], ids=str)
def test_no_rows(shape):
    x, residual, scale, shift = inputs(shape)
    assert_same_function(
        stacked(add_layer_norm_triton), stacked(add_layer_norm_naive), x, residual, scale, shift
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck reads it
def test_torch_library():
    """Schema, fake, autograd and AOT dispatch of both operators."""
    x, residual, scale, shift = (value.float().requires_grad_() for value in inputs((6, 63)))
    for added in (None, residual):
        torch.library.opcheck(layer_norm_op, (x, added, scale, shift, 1e-5))
    x, residual, scale, means = (value.detach() for value in (x, residual, scale, x[:, 0].clone()))
    for added in (None, residual):
        torch.library.opcheck(layer_norm_backward_op, (x, added, x, scale, means, means.abs()))


@pytest.mark.usefixtures("unchecked")
def test_compiles_as_one_graph():
    x, residual, scale, shift = inputs((6, 63))
    for fast in (layer_norm_triton, stacked(add_layer_norm_triton)):
        given = (x, scale, shift) if fast is layer_norm_triton else (x, residual, scale, shift)
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        assert_same_function(compiled, fast, *given)


def test_a_module_takes_it():
    x = torch.randn(3, 63, device=DEVICE)
    layer = LayerNorm(63, norm=layer_norm_triton).to(DEVICE)
    torch.testing.assert_close(layer(x), LayerNorm(63).to(DEVICE)(x))


def test_bad_input_is_a_sentence(bad_rows):
    x, scale, sentence = bad_rows
    shift = torch.ones(x.shape[-1] if x.ndim else 3)
    with pytest.raises(ValueError, match=sentence):
        layer_norm_triton(x, scale, shift)
    with pytest.raises(ValueError, match=sentence):
        add_layer_norm_triton(x, x, scale, shift)


def test_a_bad_residual_is_a_sentence(bad_residual):
    x, residual, scale, sentence = bad_residual
    with pytest.raises(ValueError, match=sentence):
        add_layer_norm_triton(x, residual, scale, torch.ones(3))
