"""The likelihood of a diffusion model: its probability flow is a continuous normalizing flow.

    y = x / alpha,  s = sigma / alpha,  u = log s
    dy/du = y - D(y; s)                          D: the denoised guess of the data
    log p(x) = log N(y_end; mean, s_end² I) + integral of tr(d(y - D)/dy) du - dim log alpha

In these coordinates every schedule is the same equation, so one function serves them all. The trace
is exact at the price of a product a dimension, or estimated by Hutchinson's probes. The density is
that of the data with the first level's noise; the end is taken for a normal around the mean of the
data, which costs about variance / s_end² nats.

Paper   Song et al. 2020, arXiv:2011.13456, appendix D.2; the coordinates: Karras et al. 2022,
        arXiv:2206.00364
Shapes  x [batch, dim]
Run     uv run python implementations/generative/flow_likelihood.py
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from implementations.flows.bijection import normal_log_density
from implementations.flows.continuous import Continuous
from implementations.generative.samplers import Denoise


def flow_log_likelihood(
    denoise: Denoise,
    x: Float[Tensor, "batch dim"],
    start: tuple[float, float],
    *,
    mean: float | Tensor = 0.0,
    highest: float = 300.0,
    steps: int = 100,
    probes: int | None = None,
) -> Float[Tensor, " batch"]:
    """log p(x) in nats, of x at the level `start` = (alpha, sigma).

    Args:
        denoise: the guess of the data.
        mean: of the data; leaving it out costs about mean / highest, not its square.
        highest: sigma / alpha at which all is taken for noise.
        steps: of Runge and Kutta's method, evenly in log(sigma / alpha).
        probes: how many random probes estimate the trace; None for the exact trace.

    Raises:
        ValueError: x is not [batch, dim], or the start has no noise, or more than the end.
    """
    if x.ndim != 2:
        raise ValueError(f"x is [batch, dim], its pixels in one row, got {tuple(x.shape)}")
    alpha, sigma = start
    if not 0 < sigma < alpha * highest:
        raise ValueError(
            f"the flow leads from a little noise to sigma/alpha = {highest}, got alpha {alpha} and "
            f"sigma {sigma}"
        )

    def field(log_noise: float, y: Tensor) -> Tensor:
        return y - denoise(y, 1.0, math.exp(log_noise))

    flow = Continuous(field, steps=steps, probes=probes)
    y, log_det = flow.along(x / alpha, math.log(sigma / alpha), math.log(highest))
    dim = x.shape[1]
    at_the_end = normal_log_density((y - mean) / highest) - dim * math.log(highest)
    return at_the_end + log_det - dim * math.log(alpha)


def main() -> None:
    from implementations.generative.gaussian_mixture import ring

    mixture = ring()
    x, _ = mixture.sample(200, torch.Generator().manual_seed(0))
    exact = mixture.noised(1.0, 0.05).log_density(x)
    print("steps   error of log p(x), largest of 200 points")
    for steps in (25, 50, 100, 200):
        found = flow_log_likelihood(
            mixture.denoised, x, (1.0, 0.05), mean=mixture.moments()[0], steps=steps
        )
        print(f"{steps:5}   {(found - exact).abs().max():.1e}")


if __name__ == "__main__":
    main()
