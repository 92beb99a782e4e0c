"""Schedules: how much of a noisy picture is data and how much is noise, from t = 0 to t = 1.

    x_t = alpha(t) x_0 + sigma(t) noise           log SNR = 2 log(alpha / sigma), falling in t

    linear    alpha = exp(-t² (20 - 0.1)/4 - t 0.1/2),  sigma² = 1 - alpha²     DDPM's betas
    cosine    alpha = cos(pi/2 (t + s)/(1 + s)) / cos(pi/2 s/(1 + s)),  s = 0.008
    edm       alpha = 1,  sigma^(1/7) straight from 0.002^(1/7) to 80^(1/7)
    straight  alpha = 1 - t,  sigma = t                                         flow matching
    even      log SNR = 12 - 24 t,  alpha² + sigma² = 1                         for likelihoods

In steps, beta is what each adds: alpha_bar_t = (1 - beta_1) ... (1 - beta_t), and level t has
alpha = sqrt(alpha_bar_t), sigma = sqrt(1 - alpha_bar_t). A square root too few or too many is the
commonest mistake of all.

Divided by sqrt(alpha² + sigma²) every schedule runs along the same circle; what is left of it is
its log SNR. So a network that is told the log SNR serves them all.

Paper   Ho et al. 2020, arXiv:2006.11239; Nichol & Dhariwal 2021, arXiv:2102.09672 (cosine);
        Karras et al. 2022, arXiv:2206.00364 (edm); Kingma et al. 2021, arXiv:2107.00630 (log SNR)
Shapes  betas [step], for steps 1 ... T
Run     uv run python implementations/generative/schedules.py
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Curve = Callable[[Tensor], Tensor]
OFFSET = 0.008  # of the cosine: the first step's noise is about a grey level
LARGEST_BETA = 0.999  # the cosine's last beta would be 1, and its posterior divides by 1 - beta
EDM_LOWEST, EDM_HIGHEST, EDM_POWER = 0.002, 80.0, 7.0


class Level(NamedTuple):
    """One place on a schedule: data and noise there, and how fast they change with the clock."""

    alpha: float
    sigma: float
    time: float = math.nan
    """NaN where there are only steps and no clock"""
    alpha_rate: float = math.nan
    sigma_rate: float = math.nan

    @property
    def log_snr(self) -> float:
        if 0 in (self.alpha, self.sigma):
            return math.inf if self.alpha else -math.inf
        return 2 * math.log(self.alpha / self.sigma)


class Schedule(NamedTuple):
    """Two curves over t from 0 (data) to 1 (noise)."""

    alpha: Curve
    sigma: Curve

    def log_snr(self, time: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        return 2 * (self.alpha(time).log() - self.sigma(time).log())

    def level(self, time: float) -> Level:
        """Both curves and their slopes at one time.

        Raises:
            ValueError: the time is not between 0 and 1.
        """
        if not 0 <= time <= 1:
            raise ValueError(f"a schedule runs from t = 0 to t = 1, got {time}")
        with torch.enable_grad():
            t = torch.tensor(time, dtype=torch.float64, requires_grad=True)
            values = [curve(t) for curve in (self.alpha, self.sigma)]
            # A product with zero, because a constant curve would not depend on t.
            rates = [torch.autograd.grad(value + 0 * t, t)[0].item() for value in values]
        return Level(*(value.item() for value in values), time, *rates)

    def time_of(self, log_snr: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """When the schedule has this log SNR: by bisection, to the last bits of float64.

        Raises:
            ValueError: a log SNR is not a number.
        """
        wanted = log_snr.double()
        if wanted.isnan().any():
            raise ValueError("no time has a log SNR that is not a number")
        low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
        for _ in range(60):
            middle = (low + high) / 2
            early = self.log_snr(middle) > wanted
            low, high = torch.where(early, middle, low), torch.where(early, high, middle)
        return (low + high) / 2

    def grid(self, steps: int, last: float = 0.0, first: float = 1.0) -> list[Level]:
        """Levels at equally spaced times, from noise to data; `steps` of them lead to the last.

        Raises:
            ValueError: there is no step, or the times do not fall from `first` to `last`.
        """
        check_ends(steps, first, last)
        times = torch.linspace(first, last, steps + 1, dtype=torch.float64)
        return [self.level(time) for time in times.tolist()]

    def grid_by_log_snr(self, steps: int, last: float, first: float = 1.0) -> list[Level]:
        """Levels at equally spaced log SNR, between two times at which it is finite.

        Raises:
            ValueError: as `grid`, or an end is without noise or without data.
        """
        check_ends(steps, first, last)
        ends = self.log_snr(torch.tensor([first, last], dtype=torch.float64)).tolist()
        if not all(map(math.isfinite, ends)):
            raise ValueError(
                f"even log SNR needs finite ends, got {ends[0]:.4g} at t = {first} and "
                f"{ends[1]:.4g} at {last}"
            )
        times = self.time_of(torch.linspace(*ends, steps + 1, dtype=torch.float64)).tolist()
        return [self.level(time) for time in [first, *times[1:-1], last]]


def check_ends(steps: int, first: float, last: float) -> None:
    if steps < 1 or not first > last:
        raise ValueError(
            f"a grid has at least one step and leads from noise to data, got {steps} from "
            f"t = {first} to {last}"
        )


def linear_alpha(time: Tensor) -> Tensor:
    return torch.exp(-(time**2) * (20.0 - 0.1) / 4 - time * 0.1 / 2)


def cosine_alpha(time: Tensor) -> Tensor:
    at_zero = math.cos(math.pi / 2 * OFFSET / (1 + OFFSET))
    return torch.cos(math.pi / 2 * (time + OFFSET) / (1 + OFFSET)) / at_zero


def edm_sigma(time: Tensor) -> Tensor:
    low, high = EDM_LOWEST ** (1 / EDM_POWER), EDM_HIGHEST ** (1 / EDM_POWER)
    return (low + time * (high - low)) ** EDM_POWER


def preserving(alpha: Curve) -> Schedule:
    """The schedule of this alpha on which a variance of one stays one."""
    # 1 - alpha² where alpha is nearly 1, without losing all digits.
    return Schedule(alpha, lambda time: ((1 - alpha(time)) * (1 + alpha(time))).clamp(min=0).sqrt())


SCHEDULES = {
    "linear": preserving(linear_alpha),
    "cosine": preserving(cosine_alpha),
    "edm": Schedule(torch.ones_like, edm_sigma),
    "straight": Schedule(lambda time: 1 - time, lambda time: time + 0),
    "even": Schedule(
        lambda time: torch.sigmoid(12 - 24 * time).sqrt(),
        lambda time: torch.sigmoid(24 * time - 12).sqrt(),
    ),
}


def variance_preserving(
    log_snr: Float[Tensor, "*batch"],
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """alpha and sigma of this log SNR with alpha² + sigma² = 1."""
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


def linear_betas(steps: int, first: float = 1e-4, last: float = 0.02) -> Float[Tensor, " step"]:
    """DDPM's betas, from 1e-4 to 0.02 over its 1,000 steps."""
    return torch.linspace(first, last, steps, dtype=torch.float64)


def cosine_betas(steps: int) -> Float[Tensor, " step"]:
    """beta_t = 1 - alpha_bar(t / T) / alpha_bar((t - 1) / T), and no more than 0.999."""
    alpha = cosine_alpha(torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    return (1 - (alpha[1:] / alpha[:-1]).square()).clamp(max=LARGEST_BETA)


def alpha_bars(betas: Float[Tensor, " step"]) -> Float[Tensor, " step"]:
    """The share of the data's variance that is left after each step.

    Raises:
        ValueError: a beta is not between 0 and 1, or so small that 1 - beta rounds to 1: noise
            would not grow with every step.
    """
    kept = 1 - betas
    if betas.numel() == 0 or not ((kept > 0) & (kept < 1)).all():
        raise ValueError(
            f"every beta lies between 0 and 1, and 1 - beta in {betas.dtype} too, got "
            f"{betas.tolist()[:5]} ..."
        )
    return kept.cumprod(0)


def levels_of_betas(betas: Float[Tensor, " step"], steps: int | None = None) -> list[Level]:
    """From the noisiest step to pure data: all steps, or so many of them, evenly.

    Raises:
        ValueError: as `alpha_bars`, or there are not so many steps.
    """
    total = len(betas)
    steps = total if steps is None else steps
    if not 1 <= steps <= total:
        raise ValueError(f"between 1 and all {total} steps can be taken, got {steps}")
    bars = alpha_bars(betas)
    chosen = [round(total - index * total / steps) - 1 for index in range(steps)]
    levels = [Level(math.sqrt(bar), math.sqrt(1 - bar)) for bar in bars[chosen].tolist()]
    return [*levels, Level(1.0, 0.0)]


def main() -> None:
    print("log SNR at t =" + "".join(f"{t:8.2f}" for t in (0.05, 0.25, 0.5, 0.75, 0.95)))
    times = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    for name, schedule in SCHEDULES.items():
        print(f"  {name:12}" + "".join(f"{value:8.2f}" for value in schedule.log_snr(times)))
    for name, betas in (("linear", linear_betas(1000)), ("cosine", cosine_betas(1000))):
        print(f"{name}: after 1,000 steps {alpha_bars(betas)[-1]:.1e} of the variance is data")


if __name__ == "__main__":
    main()
