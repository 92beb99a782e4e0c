"""Diffusion: noise is added by a formula, and a network learns to say what was added.

    x = alpha x_0 + sigma noise                            forward, in one leap
    target = p x_0 + q noise                               what a network is asked for

    data      p = 1        q = 0            v     p = -sigma   q = alpha
    noise     p = 0        q = 1            flow  p = -1       q = 1
    score     p = 0        q = -1/sigma

Two equations, two unknowns: from x and any one target follow x_0 and the noise, and all other
targets. With d = alpha q - sigma p,

    x_0 = (q x - sigma target) / d         noise = (alpha target - p x) / d

so an error e in the target is an error -sigma e / d in x_0: squared losses differ by a weight that
depends on the noise alone, (d' / d)² from one target to another.

    q(x_s | x_t, x_0) = N(mean, v)       v = sigma_s² (1 - SNR_t / SNR_s)          s before t
    mean = (sigma_s² alpha_t / (sigma_t² alpha_s)) x_t + (alpha_s v / sigma_s²) x_0

Paper   Ho et al. 2020, arXiv:2006.11239, algorithms 1 and 2; v: Salimans & Ho 2022,
        arXiv:2202.00512
Shapes  x, data, noise [batch, ...]    alpha, sigma: numbers, or tensors that broadcast with x
Run     uv run python implementations/generative/diffusion.py
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from implementations.generative.schedules import Level, alpha_bars

Number = float | Tensor
TARGETS: dict[str, Callable[[Number, Number], tuple[Number, Number]]] = {
    "data": lambda alpha, sigma: (1.0, 0.0),
    "noise": lambda alpha, sigma: (0.0, 1.0),
    "v": lambda alpha, sigma: (-sigma, alpha),
    "score": lambda alpha, sigma: (0.0, -1 / sigma),
    "flow": lambda alpha, sigma: (-1.0, 1.0),
}


class Parts(NamedTuple):
    """What a noisy picture is made of."""

    data: Float[Tensor, "batch ..."]
    noise: Float[Tensor, "batch ..."]


def coefficients(kind: str, alpha: Number, sigma: Number) -> tuple[Number, Number]:
    """p and q of a target.

    Raises:
        ValueError: there is no target of that name.
    """
    if kind not in TARGETS:
        raise ValueError(f"targets are {', '.join(TARGETS)}, got {kind!r}")
    return TARGETS[kind](alpha, sigma)


def noised(
    data: Float[Tensor, "batch ..."],
    noise: Float[Tensor, "batch ..."],
    alpha: Number,
    sigma: Number,
) -> Float[Tensor, "batch ..."]:
    """x = alpha x_0 + sigma noise."""
    return alpha * data + sigma * noise


def target(kind: str, parts: Parts, alpha: Number, sigma: Number) -> Float[Tensor, "batch ..."]:
    """What a network of this kind should answer."""
    p, q = coefficients(kind, alpha, sigma)
    return p * parts.data + q * parts.noise


def parts_of(
    kind: str,
    answer: Float[Tensor, "batch ..."],
    x: Float[Tensor, "batch ..."],
    alpha: Number,
    sigma: Number,
) -> Parts:
    """Data and noise that a network's answer to x amounts to."""
    p, q = coefficients(kind, alpha, sigma)
    determinant = alpha * q - sigma * p
    return Parts((q * x - sigma * answer) / determinant, (alpha * answer - p * x) / determinant)


def loss_ratio(learnt: str, measured: str, alpha: Number, sigma: Number) -> Number:
    """The squared error of one target, over that of another, of one and the same network."""
    there, here = (
        alpha * q - sigma * p
        for p, q in (coefficients(kind, alpha, sigma) for kind in (measured, learnt))
    )
    return (there / here) ** 2


class Posterior(NamedTuple):
    """Where x was a step before, if the data are known: mean and variance."""

    mean: Float[Tensor, "batch ..."]
    variance: float


def posterior(
    x: Float[Tensor, "batch ..."], data: Float[Tensor, "batch ..."], now: Level, then: Level
) -> Posterior:
    """q(x_then | x_now, x_0), `then` being the less noisy one.

    Raises:
        ValueError: it is not.
    """
    if not now.log_snr < then.log_snr:
        raise ValueError(f"a step leads to less noise, got {now} to {then}")
    variance = posterior_variance(now, then)
    if then.sigma == 0:
        return Posterior(then.alpha * data, variance)
    keep = then.sigma**2 * now.alpha / (now.sigma**2 * then.alpha)
    return Posterior(keep * x + then.alpha * variance / then.sigma**2 * data, variance)


def posterior_variance(now: Level, then: Level) -> float:
    """sigma_s² (1 - SNR_t / SNR_s): less than the noise that is there, and none at the data."""
    if then.sigma == 0:
        return 0.0
    return then.sigma**2 * -math.expm1(now.log_snr - then.log_snr)


def ddpm_step(
    betas: Float[Tensor, " step"],
    step: int,
    x: Float[Tensor, "batch ..."],
    noise_estimate: Float[Tensor, "batch ..."],
    fresh: Float[Tensor, "batch ..."],
) -> Float[Tensor, "batch ..."]:
    """One line of algorithm 2: from x_t to x_{t-1}, t from T down to 1; the last adds no noise.

        x_{t-1} = (x_t - beta_t / sqrt(1 - alpha_bar_t) noise_estimate) / sqrt(1 - beta_t)
                  + sqrt(beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)) fresh

    Raises:
        ValueError: the step is not one of 1 ... T.
    """
    if not 1 <= step <= len(betas):
        raise ValueError(f"steps count from 1 to {len(betas)}, got {step}")
    bars, beta = alpha_bars(betas), betas[step - 1]
    bar = bars[step - 1]
    before = bars[step - 2] if step > 1 else torch.ones_like(bar)
    mean = (x - beta / (1 - bar).sqrt() * noise_estimate) / (1 - beta).sqrt()
    return mean + (beta * (1 - before) / (1 - bar)).sqrt() * fresh


def main() -> None:
    torch.manual_seed(0)
    parts = Parts(*(torch.randn(2, 1000, 2, dtype=torch.float64)))
    print("from one target to all others: largest error")
    alpha, sigma = 0.6, 0.8
    x = noised(*parts, alpha, sigma)
    for kind in TARGETS:
        again = parts_of(kind, target(kind, parts, alpha, sigma), x, alpha, sigma)
        print(
            f"  {kind:6} {max((a - b).abs().max() for a, b in zip(again, parts, strict=True)):.0e}"
        )
    print("a unit error in the target counts as so much in the data, squared")
    for alpha in (0.99, 0.6, 0.1):
        sigma = math.sqrt(1 - alpha**2)
        row = "".join(f"  {kind} {loss_ratio(kind, 'data', alpha, sigma):7.3f}" for kind in TARGETS)
        print(f"  alpha {alpha:4}{row}")


if __name__ == "__main__":
    main()
