"""LayerNorm against torch, and by hand."""

import pytest
import torch
from torch.nn import functional

from implementations.lab.compare import assert_same_function, error
from implementations.layers.layer_norm import LayerNorm, layer_norm_naive


@pytest.mark.parametrize(
    "width, epsilon", [(1, 1e-5), (1, 0.5), (63, 1e-12), (63, 0.5), (257, 1e-5), (257, 0.5)]
)
def test_equals_torch(width, epsilon):
    """Output and gradients; a large epsilon shows where it stands in the equation."""
    sizes = (3, 4, width), (width,), (width,)
    x, scale, shift = (torch.randn(size, dtype=torch.float64) for size in sizes)
    assert_same_function(
        lambda x, scale, shift: layer_norm_naive(x, scale, shift, epsilon),
        lambda x, scale, shift: functional.layer_norm(x, (width,), scale, shift, epsilon),
        x,
        scale,
        shift,
    )


def test_by_hand():
    """(2, 4, 6) has mean 4 and variance 8 / 3; with epsilon 1 / 3 in the root: (-2, 0, 2) / √3."""
    x = torch.tensor([2.0, 4.0, 6.0], dtype=torch.float64)
    got = layer_norm_naive(x, torch.ones(3).double(), torch.full((3,), 10.0).double(), 1 / 3)
    assert got.tolist() == pytest.approx([10 - 2 / 3**0.5, 10.0, 10 + 2 / 3**0.5])


def test_a_constant_row_gives_the_shift():
    x = torch.full((2, 8), 1e4)
    assert torch.equal(LayerNorm(8)(x), torch.zeros(2, 8))


def test_far_from_zero_the_variance_survives():
    """mean(x²) - mean(x)² would lose every digit at an offset of 1e5 in float32."""
    x = torch.randn(4, 256) + 1e5
    exact = LayerNorm(256).double()(x.double())
    # Near 1e5 float32 rounds by up to 2 ** -8, and a pairwise sum of 256 numbers does so 8 times.
    assert error(LayerNorm(256)(x), exact).largest < 8 * 2**-8


def test_gradcheck():
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (5,), (5,))]
    assert torch.autograd.gradcheck(layer_norm_naive, inputs)
    assert torch.autograd.gradgradcheck(layer_norm_naive, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_inputs_are_widened(dtype):
    x = 30 * torch.randn(16, 257, dtype=torch.float32).to(dtype)
    got, exact = LayerNorm(257).to(dtype)(x), LayerNorm(257).double()(x.double())
    assert got.dtype == dtype
    assert error(got, exact).largest <= torch.finfo(dtype).eps / 2 * exact.abs().max() + 1e-5


def test_parameters_have_torchs_names():
    theirs = torch.nn.LayerNorm(7)
    LayerNorm(7).load_state_dict(theirs.state_dict(), strict=True)
