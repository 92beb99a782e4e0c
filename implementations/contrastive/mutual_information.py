"""InfoNCE bounds mutual information: what two things know of each other is more than the loss says.

    I(x; y) >= log N - InfoNCE         any score, N candidates
    best score = log p(y | x) / p(y)   plus anything of x alone
    I = -dim/2 log(1 - correlation²)   for correlated Gaussians, where all of it is known

N - 1 wrong candidates and a right one: a perfect loss of 0 says log N and no more, however much
there is to know. That is why contrastive batches are large.

Paper   van den Oord et al. 2018, arXiv:1807.03748, section 2.3 and appendix A.1
        how tight: Poole et al. 2019, arXiv:1905.06922, section 2.3
Shapes  x, y [pair, dim]
Run     uv run python implementations/contrastive/mutual_information.py
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from implementations.contrastive.info_nce import surprise


def information_bound(loss: Float[Tensor, ""] | float, candidates: int) -> float:
    """What InfoNCE says that queries and keys know about each other at least, in nats.

    A perfect loss of 0 says log N and no more, however much they know.

    Raises:
        ValueError: a single candidate, which says nothing.
    """
    if candidates < 2:
        raise ValueError(f"a choice needs at least 2 candidates, got {candidates}")
    return math.log(candidates) - float(loss)


def correlated_gaussians(
    correlation: float, shape: tuple[int, int], generator: torch.Generator
) -> tuple[Float[Tensor, "pair dim"], Float[Tensor, "pair dim"]]:
    """Pairs of standard normal vectors whose coordinates correlate, in float64.

    They share `gaussian_information(correlation, dim)` nats.
    """
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x, correlation * x + math.sqrt(1 - correlation**2) * noise


def gaussian_information(correlation: float, dim: int) -> float:
    """The nats that `correlated_gaussians` share.

    Raises:
        ValueError: a correlation of 1 or more: one side would tell the other to the last digit.
    """
    if not abs(correlation) < 1:
        raise ValueError(f"a correlation lies between -1 and 1, got {correlation}")
    return -dim / 2 * math.log(1 - correlation**2)


def log_density_ratio(
    x: Float[Tensor, "pair dim"], y: Float[Tensor, "pair dim"], correlation: float
) -> Float[Tensor, "pair candidate"]:
    """log p(y_j | x_i) / p(y_j) of correlated Gaussians: the best score that there is."""
    variance, miss = 1 - correlation**2, torch.cdist(correlation * x, y).square()
    conditional = -miss / variance - x.shape[1] * math.log(variance)
    return (conditional + y.square().sum(1)) / 2


def main() -> None:
    print(
        "nats shared by Gaussians in 8 dimensions, and InfoNCE's bound with the best score there is"
    )
    print("     known" + "".join(f"{f'N = {count}':>10}" for count in (4, 32, 256, 2048)))
    for correlation in (0.3, 0.6, 0.8, 0.95):
        line = f"{gaussian_information(correlation, 8):10.3f}"
        for count in (4, 32, 256, 2048):
            losses, generator = [], torch.Generator().manual_seed(0)
            for _ in range(4096 // count):
                x, y = correlated_gaussians(correlation, (count, 8), generator)
                losses.append(surprise(log_density_ratio(x, y, correlation), torch.arange(count)))
            line += f"{information_bound(torch.stack(losses).mean(), count):10.3f}"
        print(line)
    print("  at most" + "".join(f"{math.log(count):10.3f}" for count in (4, 32, 256, 2048)))


if __name__ == "__main__":
    main()
