"""Softmax against torch, and by hand."""

import pytest
import torch

from implementations.lab.compare import assert_same_function, error
from implementations.layers.softmax import softmax_naive


@pytest.mark.parametrize("width", [1, 2, 63, 257])
def test_equals_torch(width):
    x = 10 * torch.randn(3, 4, width, dtype=torch.float64)
    assert_same_function(softmax_naive, lambda x: torch.softmax(x, -1), x)


def test_by_hand():
    """exp of 0, log 2 and log 5 is 1, 2 and 5, of 8; also a thousand further up."""
    x = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).log()
    assert softmax_naive(x).tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8])
    assert softmax_naive(x + 1000).tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8])


def test_infinities_are_torchs():
    x = torch.tensor([[0.0, -torch.inf], [-torch.inf, -torch.inf], [0.0, torch.inf]])
    assert torch.equal(softmax_naive(x).isnan(), torch.softmax(x, -1).isnan())
    assert softmax_naive(x)[0].tolist() == [1.0, 0.0]


def test_gradcheck():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(softmax_naive, x)
    assert torch.autograd.gradgradcheck(softmax_naive, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_inputs_are_widened(dtype):
    x = (5 * torch.randn(16, 257)).to(dtype)
    got, exact = softmax_naive(x), softmax_naive(x.double())
    assert got.dtype == dtype
    assert error(got, exact).largest <= torch.finfo(dtype).eps / 2 * exact.max() + 1e-6
