"""What embeddings look like on the sphere: are pairs close, is the room used, is it all used?

    alignment       mean |x_i - y_i|²                          0 is best: views of a picture agree
    uniformity      log mean over i < j of exp(-t |x_i - x_j|²)   low is best: no two are alike
    effective rank  exp(entropy of the singular values' shares)   from 1, collapsed, to dim

All on rows of length one. As temperature and batch allow, minimising InfoNCE minimises the first
two. The effective rank is of the rows as they are and not of their differences from the mean: if
all embeddings are one vector it is 1, where the differences would be rounding noise of full rank.

Paper   Wang & Isola 2020, arXiv:2005.10242; Roy & Vetterli 2007, "The effective rank"
        (EUSIPCO); as a measure of collapse: Garrido et al. 2022, arXiv:2210.02885
Shapes  first, second, x [row, dim]
Run     uv run python implementations/contrastive/geometry.py
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from implementations.contrastive.info_nce import unit


def alignment(first: Float[Tensor, "row dim"], second: Float[Tensor, "row dim"]) -> float:
    """The mean squared distance of pairs, from 0 to 4: 2 - 2 mean cosine.

    Raises:
        ValueError: shapes that do not pair, no row, or a row without a direction.
    """
    if first.shape != second.shape or not len(first):
        shapes = f"{list(first.shape)} and {list(second.shape)}"
        raise ValueError(f"row i of both sides is a pair, so shapes agree: {shapes}")
    return (unit(first) - unit(second)).square().sum(1).mean().item()


def uniformity(x: Float[Tensor, "row dim"], t: float = 2.0) -> float:
    """The log of the mean Gaussian potential of different rows, from -4 t to 0.

    Raises:
        ValueError: fewer than two rows, or a row without a direction.
    """
    if len(x) < 2:
        raise ValueError(f"distances need at least 2 rows, got {len(x)}")
    squares = torch.pdist(unit(x)).square()
    return (torch.logsumexp(-t * squares, 0) - math.log(len(squares))).item()


def uniformity_of_the_sphere(dim: int, t: float = 2.0) -> float:
    """What `uniformity` tends to for many rows that are spread evenly over the sphere in `dim`.

    mean exp(-t |x - y|²) = exp(-2t) sum_k t^(2k) / (k! (dim/2) (dim/2 + 1) ... (dim/2 + k - 1)),
    because the mean of exp(2t x·y) over the sphere is that power series.
    """
    term, total = 1.0, 1.0
    for k in range(1, 200):
        term *= t**2 / (k * (dim / 2 + k - 1))
        total += term
    return math.log(total) - 2 * t


def effective_rank(x: Float[Tensor, "row dim"]) -> float:
    """How many directions the rows use, those used little counting little.

    Raises:
        ValueError: no row, or a row without a direction.
    """
    if not len(x):
        raise ValueError("the rank of no rows is undefined")
    values = torch.linalg.svdvals(unit(x).double())
    return torch.special.entr(values / values.sum()).sum().exp().item()


def main() -> None:
    torch.manual_seed(0)
    spread = torch.randn(1000, 64)
    kinds = {
        "spread over the sphere": spread,
        "in half of the dimensions": torch.cat([spread[:, :32], torch.zeros(1000, 32)], 1),
        "ten clusters": spread[:10].repeat(100, 1) + 0.2 * spread,
        "collapsed to a point": spread[:1] + 1e-3 * spread,
    }
    print("1,000 embeddings in 64 dimensions     uniformity   effective rank")
    for name, x in kinds.items():
        print(f"  {name:34}{uniformity(x):12.3f}{effective_rank(x):17.1f}")
    print(f"  {'the sphere itself':34}{uniformity_of_the_sphere(64):12.3f}{64:17.1f}")


if __name__ == "__main__":
    main()
