"""Samplers: every way from noise to data is one line, and the ways are a table.

    x_then = keep x + first D(x) + second D₂ + noise fresh         D: the denoised guess of the data

    ddpm      the posterior q(x_then | x, x_0 = D): ancestral sampling
    ddim      the same without its noise: D and the noise that D implies, mixed anew
    euler     the probability flow dx/dt, one slope a step                       order 1
    heun      two slopes a step, D₂ at where Euler would lead                    order 2
    sde       Euler and Maruyama on the reversed diffusion
    dpm++     exact in x, D extrapolated in log SNR from the step before         order 2
              (DPM-Solver++ 2M; D₂ is the D of the step before)

The probability flow's slope is alpha' D + sigma' (x - alpha D) / sigma: every picture keeps its own
noise, and only the mixture changes. With alpha = 1 - t and sigma = t Euler *is* DDIM.
A step to a level without noise returns D itself: nothing is added there.

Paper   Ho et al. 2020, arXiv:2006.11239; Song et al. 2020, arXiv:2010.02502 (DDIM); Song et al.
        2020, arXiv:2011.13456 (flow, SDE); Karras et al. 2022, arXiv:2206.00364 (Heun); Lu et al.
        2022, arXiv:2211.01095 (DPM-Solver++)
Shapes  x [batch, ...]
Run     uv run python implementations/generative/samplers.py
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from implementations.generative.diffusion import posterior_variance
from implementations.generative.schedules import SCHEDULES, Level

Denoise = Callable[[Tensor, float, float], Tensor]
"""denoise(x, alpha, sigma) -> the guess of x_0"""


class Row(NamedTuple):
    """The numbers of one step."""

    keep: float
    first: float
    second: float = 0.0
    noise: float = 0.0


class Sampler(NamedTuple):
    """A row of the table: how to make a step's numbers, and where its second D comes from."""

    row: Callable[[Level | None, Level, Level], Row]
    second: Literal["none", "predicted", "remembered"] = "none"
    needs_clock: bool = False

    @property
    def evaluations(self) -> int:
        """How often a step asks the network."""
        return 2 if self.second == "predicted" else 1


def implicit(churn: float) -> Callable[[Level | None, Level, Level], Row]:
    """DDIM, with a part of the posterior's noise: 0 for none of its deviation, 1 for DDPM."""

    def row(before: Level | None, now: Level, then: Level) -> Row:
        variance = churn**2 * posterior_variance(now, then)
        keep = math.sqrt(then.sigma**2 - variance) / now.sigma
        return Row(keep, then.alpha - keep * now.alpha, noise=math.sqrt(variance))

    return row


def slope(level: Level) -> tuple[float, float]:
    """dx/dt = a x + b D at this level."""
    growth = level.sigma_rate / level.sigma
    return growth, level.alpha_rate - growth * level.alpha


def euler_row(before: Level | None, now: Level, then: Level) -> Row:
    step, (of_x, of_data) = then.time - now.time, slope(now)
    return Row(1 + step * of_x, step * of_data)


def heun_row(before: Level | None, now: Level, then: Level) -> Row:
    """Half of the slope at now, half of that at the place where Euler leads."""
    half = (then.time - now.time) / 2
    guess, (of_x, of_data) = euler_row(before, now, then), slope(now)
    of_x_then, of_data_then = slope(then)
    keep = 1 + half * (of_x + of_x_then * guess.keep)
    return Row(keep, half * (of_data + of_x_then * guess.first), half * of_data_then)


def sde_row(before: Level | None, now: Level, then: Level) -> Row:
    """dx = (f x - g² score) dt + g dw, backwards; score = (alpha D - x) / sigma²."""
    if now.alpha == 0:
        raise ValueError("this sampler divides by alpha: begin where a little of the data is left")
    step = then.time - now.time
    f = now.alpha_rate / now.alpha
    g_squared = 2 * now.sigma * (now.sigma_rate - f * now.sigma)
    keep = 1 + step * (f + g_squared / now.sigma**2)
    pull = -step * g_squared * now.alpha / now.sigma**2
    return Row(keep, pull, noise=math.sqrt(-step * g_squared))


def multistep_row(before: Level | None, now: Level, then: Level) -> Row:
    """DPM-Solver++ 2M: a straight line through two D's, integrated exactly in log SNR."""
    keep, length = then.sigma / now.sigma, (then.log_snr - now.log_snr) / 2
    whole = -then.alpha * math.expm1(-length)
    if before is None:
        return Row(keep, whole)
    ratio = (now.log_snr - before.log_snr) / 2 / length
    return Row(keep, whole * (1 + 1 / (2 * ratio)), -whole / (2 * ratio))


SAMPLERS = {
    "ddpm": Sampler(implicit(1.0)),
    "ddim": Sampler(implicit(0.0)),
    "euler": Sampler(euler_row, needs_clock=True),
    "heun": Sampler(heun_row, "predicted", needs_clock=True),
    "sde": Sampler(sde_row, needs_clock=True),
    "dpm++": Sampler(multistep_row, "remembered"),
}


def sample(
    denoise: Denoise,
    x: Float[Tensor, "batch ..."],
    levels: Sequence[Level],
    sampler: Sampler,
    generator: torch.Generator | None = None,
    watch: Callable[[Level, Tensor, Tensor], None] | None = None,
) -> Float[Tensor, "batch ..."]:
    """Lead x from the first of the levels to the last.

    Args:
        denoise: the guess of the data, a network in eval mode say.
        x: as noisy as the first level.
        generator: of the noise that some samplers add, on the device of x.
        watch: called before each step with its level, x, and the guess of the data.

    Raises:
        ValueError: noise does not fall from level to level, there are fewer than two, the sampler
            needs a clock and these levels have none, it needs data in the first level and there
            are none, or a guess is not as large as x.
    """
    check(levels, sampler)
    before, remembered = None, None
    for now, then in pairwise(levels):
        first = denoise(x, now.alpha, now.sigma)
        if first.shape != x.shape:
            shapes = f"got {tuple(first.shape)} for {tuple(x.shape)}"
            raise ValueError(f"a guess of the data is as large as x, {shapes}")
        if watch:
            watch(now, x, first)
        if then.sigma == 0:
            return then.alpha * first
        row = sampler.row(before, now, then)
        moved = row.keep * x + row.first * first
        if sampler.second == "remembered" and before is not None:
            moved = moved + row.second * remembered
        if sampler.second == "predicted":
            guess = euler_row(before, now, then)
            second = denoise(guess.keep * x + guess.first * first, then.alpha, then.sigma)
            moved = moved + row.second * second
        if row.noise:
            fresh = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            moved = moved + row.noise * fresh
        x, before, remembered = moved, now, first
    return x


def check(levels: Sequence[Level], sampler: Sampler) -> None:
    if len(levels) < 2:
        raise ValueError(f"a way from noise to data has two levels at least, got {len(levels)}")
    for now, then in pairwise(levels):
        if not now.log_snr < then.log_snr:
            raise ValueError(
                f"noise falls from level to level, got log SNR {now.log_snr:.4g} and then "
                f"{then.log_snr:.4g}"
            )
    if sampler.needs_clock and any(math.isnan(level.time) for level in levels):
        raise ValueError("this sampler follows a clock: take levels from a Schedule, not of betas")


def main() -> None:
    from implementations.generative.gaussian_mixture import Mixture, transport

    parts = ([0.3, 0.7], [[-1.0], [0.8]], [[[0.04]], [[0.09]]])
    mixture = Mixture(*(torch.tensor(part, dtype=torch.float64) for part in parts))
    schedule = SCHEDULES["cosine"]
    start, end = schedule.level(0.98), schedule.level(0.02)
    x = torch.linspace(-2, 2, 101, dtype=torch.float64)[:, None]
    exact = transport(mixture, x, (start.alpha, start.sigma), (end.alpha, end.sigma))
    print("largest error against the exact probability flow, by steps")
    for name in ("ddim", "euler", "heun", "dpm++"):
        errors = [
            (sample(mixture.denoised, x, schedule.grid(steps, 0.02, 0.98), SAMPLERS[name]) - exact)
            .abs()
            .max()
            .item()
            for steps in (25, 50, 100, 200)
        ]
        row = "".join(f"{error:9.1e}" for error in errors)
        print(f"  {name:6}{row}   order {math.log2(errors[-2] / errors[-1]):.2f}")


if __name__ == "__main__":
    main()
