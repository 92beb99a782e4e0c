"""RMSNorm against torch, and by hand."""

import pytest
import torch
from torch.nn import functional

from implementations.lab.compare import assert_same_function, error
from implementations.layers.rms_norm import RMSNorm, rms_norm_naive


@pytest.mark.parametrize("width, epsilon", [(1, 1e-5), (63, 1e-12), (63, 0.5), (257, 1e-5)])
def test_equals_torch(width, epsilon):
    """Output and gradients; a large epsilon shows where it stands in the equation."""
    x, scale = torch.randn(3, 4, width).double(), torch.randn(width).double()
    assert_same_function(
        lambda x, scale: rms_norm_naive(x, scale, epsilon),
        lambda x, scale: functional.rms_norm(x, (width,), scale, epsilon),
        x,
        scale,
    )


def test_by_hand():
    """(3, 4, 5, 5, 5) has mean square 20; with epsilon 5 in the root: x / 5."""
    x = torch.tensor([3.0, 4.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    got = rms_norm_naive(x, torch.full((5,), 10.0, dtype=torch.float64), 5.0)
    assert got.tolist() == pytest.approx([6.0, 8.0, 10.0, 10.0, 10.0])


def test_gradcheck():
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (5,))]
    assert torch.autograd.gradcheck(rms_norm_naive, inputs)
    assert torch.autograd.gradgradcheck(rms_norm_naive, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_inputs_are_widened(dtype):
    """Also where the squares overflow the narrow type: 300² is beyond float16."""
    x = (300 * torch.randn(16, 257)).to(dtype)
    got, exact = RMSNorm(257).to(dtype)(x), RMSNorm(257).double()(x.double())
    assert got.dtype == dtype
    assert error(got, exact).largest <= torch.finfo(dtype).eps / 2 * exact.abs().max() + 1e-5


def test_the_parameter_has_torchs_name():
    RMSNorm(7).load_state_dict(torch.nn.RMSNorm(7).state_dict(), strict=True)
