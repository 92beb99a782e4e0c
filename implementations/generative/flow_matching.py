"""Flow matching: learn the velocity that carries noise to data along straight lines.

    x = (1 - t) x_0 + t noise           one line a pair
    velocity = noise - x_0              of that line; a network learns its mean given x
    dx/dt = u(x, t)                     from t = 1 to t = 0 it makes data out of noise

It is diffusion on the schedule alpha = 1 - t, sigma = t with the target `flow`: the mean velocity
is the slope of that schedule's probability flow, and Euler's method on it is DDIM. What is new is
how often each noise is trained on: t uniform, or the sigmoid of a normal number, which prefers the
middle.

Paper   Lipman et al. 2022, arXiv:2210.02747; Liu et al. 2022, arXiv:2209.03003; logit-normal: Esser
        et al. 2024, arXiv:2403.03206
Shapes  x, data, noise [batch, ...]    time [batch]
Run     uv run python implementations/generative/flow_matching.py
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from implementations.generative.samplers import SAMPLERS, Denoise, sample
from implementations.generative.schedules import SCHEDULES

Velocity = Callable[[Tensor, Tensor], Tensor]


def on_the_line(
    data: Float[Tensor, "batch ..."],
    noise: Float[Tensor, "batch ..."],
    time: Float[Tensor, " batch"],
) -> Float[Tensor, "batch ..."]:
    """Each pair's point at its time."""
    t = time.reshape(-1, *[1] * (data.ndim - 1))
    return (1 - t) * data + t * noise


def flow_matching_loss(
    velocity: Velocity,
    data: Float[Tensor, "batch ..."],
    noise: Float[Tensor, "batch ..."],
    time: Float[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Mean squared error of the velocity, for each pair."""
    error = velocity(on_the_line(data, noise, time), time) - (noise - data)
    return error.square().flatten(1).mean(1)


def logit_normal_times(
    count: int,
    generator: torch.Generator | None = None,
    *,
    mean: float = 0.0,
    deviation: float = 1.0,
) -> Float[Tensor, " batch"]:
    """sigmoid of normal numbers: times that are seldom near the ends."""
    return torch.sigmoid(mean + deviation * torch.randn(count, generator=generator))


def velocity_of(denoise: Denoise) -> Velocity:
    """The velocity that a guess of the data amounts to: (x - D) / t."""

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        t = time.reshape(-1, *[1] * (x.ndim - 1))
        return (x - denoise(x, 1 - t, t)) / t

    return velocity


def integrate(
    velocity: Velocity, x: Float[Tensor, "batch ..."], steps: int
) -> Float[Tensor, "batch ..."]:
    """Euler's method from t = 1 to t = 0, as it is written in papers on flow matching.

    Raises:
        ValueError: there is no step.
    """
    if steps < 1:
        raise ValueError(f"a way from t = 1 to t = 0 has a step at least, got {steps}")
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for now, then in pairwise(times):
        x = x + (then - now) * velocity(x, torch.full_like(x.flatten(1)[:, 0], now))
    return x


def main() -> None:
    from implementations.generative.gaussian_mixture import ring

    mixture = ring()

    def denoise(x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
        alpha, sigma = (float(torch.as_tensor(n, dtype=x.dtype).max()) for n in (alpha, sigma))
        return mixture.denoised(x, alpha, sigma)

    noise = torch.randn(500, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    print("steps   mean log density of what is made   apart from DDIM")
    for steps in (5, 10, 50, 200):
        made = integrate(velocity_of(denoise), noise, steps)
        ddim = sample(denoise, noise, SCHEDULES["straight"].grid(steps), SAMPLERS["ddim"])
        apart = (made - ddim).abs().max()
        print(f"{steps:5}   {mixture.log_density(made).mean():34.3f}   {apart:.1e}")
    real, _ = mixture.sample(5000, torch.Generator().manual_seed(0))
    print(f"{'data':5}   {mixture.log_density(real).mean():34.3f}")


if __name__ == "__main__":
    main()
