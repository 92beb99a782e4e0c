"""Rational-quadratic splines (neural spline flows): a curve through knots, bent as the data ask.

    x = left + xi width       s = height / width        d0, d1 = slopes at the two knots
    y = bottom + height (s xi² + d0 xi (1-xi)) / (s + (d0 + d1 - 2s) xi (1-xi))

between two knots, a quotient of two parabolas that rises if both slopes are positive. The network
gives widths, heights and inner slopes of the bins between -bound and bound. Outside, the map is the
identity, and at the ends the slope is 1, so that the two meet without a bend. The inverse is the
root of one quadratic equation.

Paper   Durkan, Bekasov, Murray & Papamakarios 2019, arXiv:1906.04032, equations 4 to 8; the spline:
        Gregory & Delbourgo 1982, doi:10.1093/imanum/2.2.123
Shapes  x [...]    parameters [..., 3 bins - 1]
Run     uv run python implementations/flows/spline_coupling.py
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad, softplus

from implementations.flows.affine_coupling import (
    Elementwise,
    Parameters,
    Values,
    coupling_layers,
)

# No bin is narrower than this share of the interval and no slope smaller, as in the paper's code;
# in float64 the inverse then keeps 1e-10.
SMALLEST = 1e-3
ONE = math.log(math.expm1(1 - SMALLEST))  # softplus(ONE) + SMALLEST = 1


class Bin(NamedTuple):
    """The piece of the curve that a number goes through."""

    left: Values
    width: Values
    bottom: Values
    height: Values
    first_slope: Values
    last_slope: Values


def spline(bins: int, bound: float = 4.0) -> Elementwise:
    """The elementwise bijection of `bins` bins between -bound and bound.

    Raises:
        ValueError: no bins, so many that none fits, or a bound that is not positive.
    """
    if not 1 <= bins < 1 / SMALLEST:
        raise ValueError(f"a spline has 1 to {1 / SMALLEST - 1:.0f} bins, got {bins}")
    if not bound > 0:
        raise ValueError(f"a spline's bound is positive, got {bound}")
    return Elementwise(
        3 * bins - 1,
        partial(spline_forward, bound=bound),
        partial(spline_inverse, bound=bound),
    )


def spline_forward(x: Values, parameters: Parameters, bound: float) -> tuple[Values, Values]:
    """The curve inside, the identity outside; with log dy/dx."""
    inside = x.abs() < bound
    within = x.clamp(-bound, bound)  # where() takes the gradient of both sides: both are finite
    knots, slopes = curve(parameters, bound)
    piece = pick(bin_number(within, knots[0]), knots, slopes)
    xi = (within - piece.left) / piece.width
    y = piece.bottom + piece.height * rise(xi, piece)
    log_slope = torch.where(inside, log_slope_at(xi, piece), torch.zeros_like(x))
    return torch.where(inside, y, x), log_slope


def spline_inverse(y: Values, parameters: Parameters, bound: float) -> tuple[Values, Values]:
    """The x of the curve with that y (equations 6 to 8); with log dx/dy."""
    inside = y.abs() < bound
    within = y.clamp(-bound, bound)
    knots, slopes = curve(parameters, bound)
    piece = pick(bin_number(within, knots[1]), knots, slopes)
    up, steepness = within - piece.bottom, piece.height / piece.width
    bend = piece.first_slope + piece.last_slope - 2 * steepness
    a = piece.height * (steepness - piece.first_slope) + up * bend
    b = piece.height * piece.first_slope - up * bend
    c = -steepness * up
    # The root written so that nothing cancels when a is near zero.
    xi = 2 * c / (-b - (b.square() - 4 * a * c).sqrt())
    x = piece.left + xi * piece.width
    log_slope = torch.where(inside, -log_slope_at(xi, piece), torch.zeros_like(y))
    return torch.where(inside, x, y), log_slope


def rise(xi: Values, piece: Bin) -> Values:
    """How much of its height the curve has climbed at the share xi of its width (equation 4)."""
    steepness, mixed = piece.height / piece.width, xi * (1 - xi)
    bend = piece.first_slope + piece.last_slope - 2 * steepness
    return (steepness * xi.square() + piece.first_slope * mixed) / (steepness + bend * mixed)


def log_slope_at(xi: Values, piece: Bin) -> Values:
    """log dy/dx there (equation 5)."""
    steepness, mixed = piece.height / piece.width, xi * (1 - xi)
    bend = piece.first_slope + piece.last_slope - 2 * steepness
    above = piece.last_slope * xi.square() + 2 * steepness * mixed
    above = above + piece.first_slope * (1 - xi).square()
    return 2 * steepness.log() + above.log() - 2 * (steepness + bend * mixed).log()


def curve(
    parameters: Parameters, bound: float
) -> tuple[tuple[Float[Tensor, "*shape knot"], Float[Tensor, "*shape knot"]], Tensor]:
    """The knots' x and y, from -bound to bound, and the slopes at them, from free parameters."""
    bins = (parameters.shape[-1] + 1) // 3
    widths, heights, slopes = parameters.split((bins, bins, bins - 1), -1)
    knots = []
    for free in (widths, heights):
        shares = SMALLEST + (1 - SMALLEST * bins) * free.softmax(-1)
        knots.append(2 * bound * pad(shares.cumsum(-1), (1, 0)) - bound)
    slopes = pad(softplus(slopes + ONE) + SMALLEST, (1, 1), value=1.0)
    return tuple(knots), slopes


def bin_number(values: Values, knots: Float[Tensor, "*shape knot"]) -> Int[Tensor, "*shape"]:
    """How many inner knots lie at or below the value."""
    return (values[..., None] >= knots[..., 1:-1]).sum(-1)


def pick(number: Int[Tensor, "*shape"], knots: tuple[Tensor, Tensor], slopes: Tensor) -> Bin:
    """The bin of that number."""

    def at(values: Tensor, shift: int) -> Tensor:
        return values.gather(-1, number[..., None] + shift)[..., 0]

    (x, y) = knots
    left, bottom = at(x, 0), at(y, 0)
    return Bin(left, at(x, 1) - left, bottom, at(y, 1) - bottom, at(slopes, 0), at(slopes, 1))


def main() -> None:
    torch.manual_seed(0)
    curves = spline(bins=8)
    parameters = torch.randn(200_000, curves.parameters, dtype=torch.float64)
    x = 3 * torch.randn(200_000, dtype=torch.float64)
    y, log_slope = curves.forward(x, parameters)
    back, log_slope_back = curves.inverse(y, parameters)
    print("200,000 random splines of 8 bins, each at a random place:")
    print(f"  slopes from {log_slope.exp().min():.4f} to {log_slope.exp().max():.1f}")
    print(f"  there and back {(back - x).abs().max():.1e}")
    product = (log_slope + log_slope_back).abs().max()
    print(f"  slopes there and back multiply to 1 within {product:.1e}")
    layers = coupling_layers(dim=2, layers=4, hidden=32, elementwise=curves)
    print(f"parameters of 4 couplings: {sum(p.numel() for p in layers.parameters()):,}")


if __name__ == "__main__":
    main()
