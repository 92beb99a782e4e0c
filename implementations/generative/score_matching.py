"""Score matching: learn the gradient of a log density that nobody can evaluate.

    explicit    1/2 |s(x) - grad log p(x)|²                what one wants, if p were known
    implicit    1/2 |s(x)|² + tr(ds/dx)                    by parts: p is gone
    sliced      1/2 |s(x)|² + v·(ds/dx) v,  v = ±1         one product instead of a trace
    denoising   1/2 |s(x) + noise / sigma|²,  x = alpha x_0 + sigma noise

Averaged over x they differ by constants, so all have the same minimiser and the same gradients. The
last needs no derivative of s at all, and is what diffusion trains.

Paper   Hyvärinen 2005, JMLR 6 (implicit); Song et al. 2019, arXiv:1905.07088 (sliced); Vincent
        2011, doi:10.1162/NECO_a_00142 (denoising)
Shapes  x [batch, dim]    a loss [batch]: its mean is the objective
Run     uv run python implementations/generative/score_matching.py
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from implementations.flows.continuous import all_directions, random_signs

Score = Callable[[Tensor], Tensor]
Loss = Float[Tensor, " batch"]
Points = Float[Tensor, "batch dim"]


def explicit_loss(score: Score, x: Points, truth: Points) -> Loss:
    """Half the squared distance from the true score at x."""
    return (score(x) - truth).square().sum(1) / 2


def implicit_loss(score: Score, x: Points) -> Loss:
    """Hyvärinen's: needs the trace of the score's Jacobian, one product a dimension."""
    return along(score, x, all_directions(x), 1.0)


def sliced_loss(score: Score, x: Points, probes: int = 1) -> Loss:
    """The trace estimated by random signs (Hutchinson)."""
    return along(score, x, random_signs(x, probes), 1 / probes)


def along(score: Score, x: Points, directions: list[Points], scale: float) -> Loss:
    """Half the square of the score, and its derivatives along some directions."""
    value, pull = torch.func.vjp(score, x)
    trace = sum((pull(direction)[0] * direction).sum(1) for direction in directions)
    return value.square().sum(1) / 2 + scale * trace


def denoising_loss(score: Score, data: Points, noise: Points, alpha: float, sigma: float) -> Loss:
    """Vincent's: the score of noise given the data, whose average is the score of what is noisy."""
    return explicit_loss(score, alpha * data + sigma * noise, -noise / sigma)


def main() -> None:
    from implementations.generative.gaussian_mixture import ring

    mixture, generator = ring(), torch.Generator().manual_seed(0)
    alpha, sigma, count = 0.8, 0.6, 200_000
    data, _ = mixture.sample(count, generator)
    noise = torch.randn(data.shape, generator=generator, dtype=torch.float64)
    x, noisy = alpha * data + sigma * noise, mixture.noised(alpha, sigma)
    truth = noisy.score(x)
    print("a score that is shrunk:   x 0.8     x 0.9     x 1.0     x 1.1")
    losses = {
        "explicit": lambda score: explicit_loss(score, x, truth),
        "implicit": lambda score: implicit_loss(score, x),
        "sliced": lambda score: sliced_loss(score, x),
        "denoising": lambda score: denoising_loss(score, data, noise, alpha, sigma),
    }
    for name, loss in losses.items():
        values = [
            loss(lambda y, part=part: part * noisy.score(y)).mean().item()
            for part in (0.8, 0.9, 1.0, 1.1)
        ]
        print(f"  {name:20}" + "".join(f"{value - min(values):10.4f}" for value in values))


if __name__ == "__main__":
    main()
