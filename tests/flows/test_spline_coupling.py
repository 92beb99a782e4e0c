"""Rational-quadratic splines: exact on Möbius curves, smooth at every knot, identity outside."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from implementations.flows.spline_coupling import (
    SMALLEST,
    Bin,
    curve,
    log_slope_at,
    rise,
    spline,
)


def test_a_moebius_curve_is_reproduced():
    """Gregory & Delbourgo's piece through x / (1 + x) with that curve's slopes is that curve.

    Its denominator factors when the two slopes multiply to the square of the steepness.
    """
    left, right = 0.5, 3.0
    f, slope = (lambda x: x / (1 + x)), (lambda x: 1 / (1 + x) ** 2)
    piece = Bin(
        *map(
            torch.tensor,
            (left, right - left, f(left), f(right) - f(left), slope(left), slope(right)),
        )
    )
    piece = Bin(*(value.double() for value in piece))
    xi = torch.linspace(0, 1, 11, dtype=torch.float64)
    x = left + xi * (right - left)
    # 1e-6: the piece was rounded to single precision above.
    torch.testing.assert_close(
        piece.bottom + piece.height * rise(xi, piece), f(x), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(log_slope_at(xi, piece), slope(x).log(), rtol=1e-5, atol=1e-6)


def test_zero_parameters_are_the_identity():
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    curves = spline(7, bound=3.0)
    for function in (curves.forward, curves.inverse):
        y, log_slope = function(x, torch.zeros(101, curves.parameters).double())
        torch.testing.assert_close(y, x)
        torch.testing.assert_close(log_slope, torch.zeros_like(x))


@pytest.mark.parametrize("bins", [1, 2, 5, 40])
def test_knots_reach_from_bound_to_bound_and_rise(bins):
    (x, y), slopes = curve(3 * torch.randn(50, 3 * bins - 1).double(), bound=2.5)
    for knots in (x, y):
        assert knots.shape == (50, bins + 1)
        torch.testing.assert_close(knots[:, 0], torch.full((50,), -2.5).double())
        torch.testing.assert_close(
            knots[:, -1], torch.full((50,), 2.5).double(), rtol=1e-13, atol=0
        )
        # A bin is no narrower than its floor, up to the rounding of the running sum.
        assert (knots.diff(dim=1) > 5 * SMALLEST * (1 - 1e-9)).all()
    assert (slopes[:, [0, -1]] == 1).all() and (slopes >= SMALLEST).all()


def test_the_curve_goes_through_its_knots_with_their_slopes():
    """From the left of a knot and from the right: neither value nor slope jumps, the ends too."""
    curves, parameters = spline(6, bound=2.0), torch.randn(17, dtype=torch.float64)
    (x, y), slopes = curve(parameters, 2.0)
    for side in (-1e-9, 1e-9):  # a value moves by slope times that; slopes here are below 20
        place = x + side
        value, log_slope = curves.forward(place, parameters.expand(7, 17))
        torch.testing.assert_close(value, y, rtol=0, atol=2e-8)
        torch.testing.assert_close(log_slope.exp(), slopes, rtol=1e-6, atol=1e-6)


def test_the_inverse_is_scipys_root():
    curves, parameters = spline(5), 2 * torch.randn(14, dtype=torch.float64)

    def height(x, target):
        one = torch.tensor([x], dtype=torch.float64)
        return curves.forward(one, parameters[None])[0].item() - target

    for target in np.linspace(-5, 5, 21):
        root = brentq(height, -6, 6, args=(target,), xtol=1e-13)
        x, _ = curves.inverse(torch.tensor([target]), parameters[None])
        # brentq stops at 1e-13; a flat piece (slope 0.001) multiplies rounding in y by 1,000.
        assert x.item() == pytest.approx(root, abs=1e-11)


def test_slopes_are_those_of_finite_differences():
    curves, parameters = spline(8), torch.randn(200, 23, dtype=torch.float64)
    x = 3 * torch.randn(200, dtype=torch.float64)
    step = 1e-6
    above, below = (curves.forward(x + s, parameters)[0] for s in (step, -step))
    _, log_slope = curves.forward(x, parameters)
    # A central difference is off by step² times a third derivative (up to 1e5 in steep bins).
    torch.testing.assert_close((above - below) / (2 * step), log_slope.exp(), rtol=1e-5, atol=1e-6)


def test_it_rises_everywhere_and_is_the_identity_outside():
    curves, parameters = spline(8, bound=4.0), 3 * torch.randn(23, dtype=torch.float64)
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    y, log_slope = curves.forward(x, parameters.expand(4001, 23))
    assert (y.diff() > 0).all()
    outside = x.abs() >= 4
    assert torch.equal(y[outside], x[outside]) and not log_slope[outside].any()
    assert not torch.allclose(y[~outside], x[~outside], atol=0.1)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((0,), "1 to 999 bins, got 0"),
        ((1000,), "1 to 999 bins, got 1000"),
        ((5, 0.0), "bound is positive, got 0.0"),
        ((5, math.nan), "bound is positive, got nan"),
    ],
)
def test_bad_input(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        spline(*arguments)
