"""How good are made pictures? Distances between two sets of features, and a look for copies.

    Frechet     |mean - mean'|² + tr(C + C' - 2 (C C')^(1/2))       two Gaussians, Wasserstein-2
    kernel      mean k(a, a') + mean k(b, b') - 2 mean k(a, b),  k = (a·b / dim + 1)³
                over pairs of different points: without bias, so it may be negative
    precision   share of made points inside the data: closer to a real point than its k-th neighbour
    recall      share of real points inside what was made
    copies      share of made pictures nearer to a training picture than all but a twentieth of
                real, held-out pictures are

The Frechet distance of few points is too large by an amount that depends on how many (its floor);
compare with the distance between two halves of the data, never with zero.

Paper   Heusel et al. 2017, arXiv:1706.08500; Bińkowski et al. 2018, arXiv:1801.01401; Kynkäänniemi
        et al. 2019, arXiv:1904.06991; copies: Meehan et al. 2020, arXiv:2004.05675 (in spirit)
Shapes  features [point, dim], finite
Run     uv run python implementations/generative/metrics.py
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Points = Float[Tensor, "point dim"]
Others = Float[Tensor, "other dim"]


def frechet_distance(real: Points, made: Others) -> float:
    """The squared 2-Wasserstein distance between two Gaussians with these means and covariances.

    Raises:
        ValueError: a set has fewer than two points, or as `check`.
    """
    real, made = real.double(), made.double()
    check(real, made)
    left, right = real.mT.cov(), made.mT.cov()
    left, right = (c.reshape(real.shape[1], real.shape[1]) for c in (left, right))
    root = square_root(left)
    # C C' has the eigenvalues of the symmetric C^(1/2) C' C^(1/2).
    cross = torch.linalg.eigvalsh(root @ right @ root).clamp(min=0).sqrt().sum()
    apart = (real.mean(0) - made.mean(0)).square().sum()
    return (apart + left.trace() + right.trace() - 2 * cross).item()


def square_root(matrix: Float[Tensor, "dim dim"]) -> Float[Tensor, "dim dim"]:
    """Of a symmetric matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.mT


def kernel_distance(real: Points, made: Others) -> float:
    """The squared maximum mean discrepancy with a cubic kernel, without bias.

    Raises:
        ValueError: a set has fewer than two points, or as `check`.
    """
    real, made = real.double(), made.double()
    check(real, made)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.mT / a.shape[1] + 1) ** 3

    def among(a: Tensor) -> Tensor:
        matrix = kernel(a, a)
        return (matrix.sum() - matrix.trace()) / (len(a) * (len(a) - 1))

    return (among(real) + among(made) - 2 * kernel(real, made).mean()).item()


class Coverage(NamedTuple):
    """How much of each set lies inside the other."""

    precision: float
    recall: float


def precision_and_recall(real: Points, made: Others, neighbours: int = 3) -> Coverage:
    """Shares of made points within the data, and of the data within what was made.

    Raises:
        ValueError: a set has no more points than neighbours are asked for, or as `check`.
    """
    real, made = real.double(), made.double()
    check(real, made)
    if min(len(real), len(made)) <= neighbours:
        raise ValueError(f"{neighbours} neighbours need more points, got {len(real)}, {len(made)}")
    between = torch.cdist(real, made)

    def radii(points: Tensor) -> Tensor:
        # The nearest of all is the point itself.
        return torch.cdist(points, points).kthvalue(neighbours + 1, dim=1).values

    precision = (between <= radii(real)[:, None]).any(0)
    recall = (between <= radii(made)).any(1)
    return Coverage(precision.double().mean().item(), recall.double().mean().item())


def nearest(points: Points, among: Others, at_once: int = 500) -> Float[Tensor, " point"]:
    """Distance of each point to the nearest of the others."""
    # A large cdist squares and subtracts: it finds the nearest, but not that a copy is 0 away.
    rows = [torch.cdist(part, among).argmin(1) for part in points.split(at_once)]
    return torch.linalg.vector_norm(points - among[torch.cat(rows)], dim=1)


def copied(
    made: Points, train: Others, held_out: Float[Tensor, "real dim"], share: float = 0.05
) -> float:
    """Share of made points that are nearer to a training point than all but `share` of real ones.

    An honest generator has about `share` of them; one that recites has nearly all.

    Raises:
        ValueError: as `check`.
    """
    check(made, train, held_out, least=1)
    limit = nearest(held_out, train).quantile(share)
    # A limit of 0, where real pictures repeat themselves, is reached by copies and not undercut.
    return (nearest(made, train) <= limit).double().mean().item()


def check(*sets: Tensor, least: int = 2) -> None:
    """Raise ValueError unless all are points of one space, so many at least, with finite squares.

    Not a number is neither near nor far: it would pass for no copy and for no neighbour.
    """
    shapes = [tuple(points.shape) for points in sets]
    if any(len(shape) != 2 or shape[1] < 1 or shape[1] != shapes[0][1] for shape in shapes):
        raise ValueError(f"sets are [point, dim] of one dim, got {', '.join(map(str, shapes))}")
    if min(len(points) for points in sets) < least:
        counts = " and ".join(str(len(points)) for points in sets)
        raise ValueError(f"a set has {least} points at least, got {counts}")
    for points in sets:
        if not points.square().sum().isfinite():
            raise ValueError("points are finite, and small enough to be squared")


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    real, again, wide = (torch.randn(1000, 8, generator=generator) for _ in range(3))
    print(f"{'':26}Frechet   kernel   precision   recall   copied")
    for name, made in {
        "the same distribution": again,
        "half as wide": wide / 2,
        "moved by one": wide + 1,
        "training points, nearly": real + 0.01 * wide,
    }.items():
        coverage = precision_and_recall(real, made)
        print(
            f"  {name:24}{frechet_distance(real, made):7.3f}  {kernel_distance(real, made):7.4f}   "
            f"{coverage.precision:9.3f}   {coverage.recall:6.3f}   {copied(made, real, again):6.3f}"
        )


if __name__ == "__main__":
    main()
