"""Densities in the plane that are known exactly, and what a flow can be measured by there.

    two moons   a point of one of two half circles, drawn evenly, plus normal noise: a mixture of
                normals, so that its density is a sum. scikit-learn's make_moons draws from it
    two modes   two normals apart, with nothing in between
    KL(p || q)  = integral of p (log p - log q), on a grid: exact where sampling would be noisy

Shapes  points [batch, 2]
Run     uv run python implementations/flows/plane.py
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily, Normal

Density = Callable[[Float[Tensor, "batch 2"]], Float[Tensor, " batch"]]


def mixture(centres: Float[Tensor, "centre 2"], deviation: float) -> MixtureSameFamily:
    """Equally many points around each centre, normal in both directions."""
    parts = Independent(Normal(centres, torch.full_like(centres, deviation)), 1)
    return MixtureSameFamily(Categorical(torch.ones(len(centres), dtype=centres.dtype)), parts)


def two_moons(noise: float = 0.1, points: int = 100) -> Distribution:
    """scikit-learn's two moons of `points` points each, as a density in float64."""
    angle = torch.linspace(0, math.pi, points, dtype=torch.float64)
    upper = torch.stack((angle.cos(), angle.sin()), 1)
    lower = torch.stack((1 - angle.cos(), 0.5 - angle.sin()), 1)
    return mixture(torch.cat((upper, lower)), noise)


def two_modes(distance: float, deviation: float = 0.5) -> Distribution:
    """Two round normals whose centres are `distance` apart, left and right of the origin."""
    centres = torch.tensor([[-distance / 2, 0.0], [distance / 2, 0.0]], dtype=torch.float64)
    return mixture(centres, deviation)


class Grid(NamedTuple):
    """The centres of the cells of a rectangle."""

    points: Float[Tensor, "cell 2"]
    area: float
    """of one cell"""
    shape: tuple[int, int]
    extent: tuple[float, float, float, float]
    """left, right, bottom, top, as pictures want them"""

    def integral(self, values: Float[Tensor, " cell"]) -> float:
        """Over the rectangle, by the midpoint rule."""
        return values.double().sum().item() * self.area

    def picture(self, values: Float[Tensor, " cell"]) -> Float[np.ndarray, "row column"]:
        """The values as an image, the top row first."""
        return values.view(self.shape).T.flip(0).numpy()


def grid(left: float, right: float, bottom: float, top: float, cells: int) -> Grid:
    """`cells` cells along the width, and as many along the height."""
    across, up = (
        low + (high - low) * (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
        for low, high in ((left, right), (bottom, top))
    )
    area = (right - left) * (top - bottom) / cells**2
    extent = (left, right, bottom, top)
    return Grid(torch.cartesian_prod(across, up), area, (cells, cells), extent)


@torch.no_grad()
def log_density(density: Density, points: Float[Tensor, "cell 2"], rows: int = 20_000) -> Tensor:
    """The density's logarithm at many points, some at a time, in float64."""
    return torch.cat([density(part).double() for part in points.split(rows)])


def divergence(cells: Grid, log_p: Tensor, log_q: Tensor) -> float:
    """KL(p || q) in nats, from both log densities on the grid.

    Terms where p is zero are zero. Both must have their mass inside the rectangle.
    """
    return cells.integral(torch.where(log_p > -700, log_p.exp() * (log_p - log_q), 0.0))


def main() -> None:
    moons, cells = two_moons(), grid(-2.5, 3.5, -2, 2.5, 400)
    log_p = log_density(moons.log_prob, cells.points)
    print(f"integral of the two moons  {cells.integral(log_p.exp()):.10f}")
    print(f"their entropy              {-cells.integral(log_p.exp() * log_p):.6f} nats")
    mean, deviation = moons.mean, moons.variance.sqrt()
    normal = Independent(Normal(mean, deviation), 1)
    log_q = log_density(normal.log_prob, cells.points)
    print(
        f"KL to a normal of their mean and deviations  {divergence(cells, log_p, log_q):.4f} nats"
    )


if __name__ == "__main__":
    main()
