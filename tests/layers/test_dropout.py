"""Dropout: its distribution, its mean, and nothing at all in evaluation."""

import math

import pytest
import torch

from implementations.layers.dropout import Dropout, dropout_naive


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_silences_the_right_share_and_raises_the_rest(rate):
    """The count of zeros is binomial: 5.5 standard deviations, false alarm 4e-8."""
    n = 200_000
    y = dropout_naive(torch.ones(n, dtype=torch.float64), rate)
    zeros = (y == 0).sum().item()
    assert abs(zeros - n * rate) < 5.5 * math.sqrt(n * rate * (1 - rate))
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - rate)))


def test_gradient_goes_where_the_value_went():
    x = torch.randn(1000, dtype=torch.float64, requires_grad=True)
    y = dropout_naive(x, 0.3)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient == 0, y == 0)
    kept = y != 0
    torch.testing.assert_close(gradient[kept], (y / x)[kept].detach())


def test_evaluation_and_rate_zero_change_nothing_and_draw_nothing():
    x, before = torch.randn(5), torch.get_rng_state()
    assert torch.equal(Dropout(0.5).eval()(x), x) and torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2.0])
def test_rates_outside_zero_to_one(rate):
    with pytest.raises(ValueError, match=r"a dropout rate is in \[0, 1\), got"):
        Dropout(rate)
