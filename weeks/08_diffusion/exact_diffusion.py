"""Does diffusion work, where everything about it is known?

A mixture of five Gaussians on a circle is noised and brought back, by its exact score: no network,
no training, so that what is left is the method's own error. An animation of the way back is written
to the cache folder.

Expected: Tweedie's identity to rounding. Samples of every sampler have the mixture's mean and
covariance, within what chance allows. On a line, where the probability flow is known, halving the
steps divides the error by 2 for Euler and by 4 for Heun and DPM-Solver++ 2M. The flow's likelihood
is the mixture's.

Paper   Song et al. 2020, arXiv:2011.13456; Karras et al. 2022, arXiv:2206.00364
Run     uv run python weeks/08_diffusion/exact_diffusion.py
"""

import math
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from torch import Tensor

from implementations.generative.flow_likelihood import flow_log_likelihood
from implementations.generative.gaussian_mixture import Mixture, ring, transport
from implementations.generative.samplers import SAMPLERS, sample
from implementations.generative.schedules import SCHEDULES
from implementations.lab.files import cache_folder
from implementations.lab.findings import Finding, at_most, within
from implementations.lab.script import run

LIMIT = 4.5  # standard errors: about 1 false alarm in 150,000, and some 40 numbers are asked
CURVES = {"euler": 1.0, "heun": 2.0, "dpm++": 2.0}


@dataclass(frozen=True)
class Config:
    """Noise a mixture of Gaussians, and bring it back by its exact score."""

    points: int = 20_000
    """of each sampler"""
    steps: int = 400
    """of each sampler, for the moments"""
    finest: int = 640
    """steps of the finest grid on which the order is measured"""
    frames: int = 60
    """of the animation; 0 for none"""


def moments_in_errors(made: Tensor, mixture: Mixture) -> float:
    """The largest deviation of mean and covariance, in standard errors of the sample."""
    mean, covariance = mixture.moments()
    apart = made - mean
    products = (apart[:, :, None] * apart[:, None]).flatten(1)[:, [0, 1, 3]]
    wanted = covariance.flatten()[[0, 1, 3]]
    numbers = torch.cat((apart, products - wanted), 1)
    return (numbers.mean(0) / (numbers.std(0) / len(made) ** 0.5)).abs().max().item()


def orders(finest: int) -> tuple[dict[str, list[float]], list[int]]:
    """Errors of the deterministic samplers against the exact flow of two Gaussians on a line."""
    parts = ([0.3, 0.7], [[-1.0], [0.8]], [[[0.04]], [[0.09]]])
    mixture = Mixture(*(torch.tensor(part, dtype=torch.float64) for part in parts))
    schedule, last, first = SCHEDULES["cosine"], 0.02, 0.98
    start, end = schedule.level(first), schedule.level(last)
    x = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]
    exact = transport(mixture, x, (start.alpha, start.sigma), (end.alpha, end.sigma))
    counts, errors = [finest // 8, finest // 4, finest // 2, finest], {}
    for name in CURVES:
        errors[name] = []
        for steps in counts:
            grid = schedule.grid_by_log_snr(steps, last, first)
            found = sample(mixture.denoised, x, grid, SAMPLERS[name])
            # The mean over the points: at the watershed between the modes one order is not enough.
            errors[name].append((found - exact).abs().mean().item())
    return errors, counts


def draw(mixture: Mixture, errors: dict[str, list[float]], counts: list[int], frames: int) -> None:
    """The cloud under noise, the way back, and the errors of the solvers."""
    schedule, generator = SCHEDULES["cosine"], torch.Generator().manual_seed(1)
    data, _ = mixture.sample(1500, generator)
    noise = torch.randn(data.shape, generator=generator, dtype=torch.float64)
    figure, axes = plt.subplots(3, 5, figsize=(11, 7), layout="constrained")
    seen = []
    levels = [schedule.level(t) for t in torch.linspace(0.999, 0.0, max(frames, 8) + 1).tolist()]
    sample(mixture.denoised, noise, levels, SAMPLERS["heun"], watch=lambda *now: seen.append(now))
    for column, time in enumerate((0.0, 0.2, 0.45, 0.7, 0.95)):
        level = schedule.level(time)
        forward = level.alpha * data + level.sigma * noise
        back = min(seen, key=lambda now: abs(now[0].time - time))
        for row, cloud in enumerate((forward, back[1])):
            axes[row, column].scatter(*cloud.T, s=1, color=f"C{row}")
            axes[row, column].set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[], yticks=[])
        axes[0, column].set_title(f"t = {time}")
    axes[0, 0].set_ylabel("noised")
    axes[1, 0].set_ylabel("brought back (Heun)")
    grid = axes[2, 0].get_gridspec()
    for axis in axes[2]:
        axis.remove()
    axis = figure.add_subplot(grid[2, 1:4])
    for name, values in errors.items():
        axis.loglog(counts, values, "o-", label=f"{name}, order {CURVES[name]:g} expected")
    axis.set(xlabel="steps", ylabel="mean error", title="against the exact probability flow")
    axis.legend(fontsize=8)
    if frames:
        animate(seen)


def animate(seen: list[tuple]) -> None:
    """The way back as a file that moves."""
    figure, axis = plt.subplots(figsize=(4, 4))
    dots = axis.scatter(*seen[0][1].T, s=1)
    axis.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")

    def show(index: int) -> None:
        dots.set_offsets(seen[index][1].numpy())
        axis.set_title(f"t = {seen[index][0].time:.2f}")

    path = cache_folder("figures", "08_diffusion") / "exact_diffusion.gif"
    FuncAnimation(figure, show, frames=len(seen)).save(path, writer=PillowWriter(fps=15), dpi=80)
    plt.close(figure)
    print(f"animation {path}")


def main(config: Config) -> list[Finding]:
    torch.set_num_threads(1)
    mixture, schedule = ring(), SCHEDULES["cosine"]
    generator = torch.Generator().manual_seed(0)
    x, _ = mixture.sample(config.points, generator)
    x = 0.8 * x + 0.6 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    by_score = (x + 0.36 * mixture.noised(0.8, 0.6).score(x)) / 0.8
    gap = (by_score - mixture.denoised(x, 0.8, 0.6)).abs().max().item()
    findings = [
        Finding("Tweedie: (x + sigma² score) / alpha and E[x_0 | x] differ by", gap,
                expected=at_most(1e-10), source="Robbins 1956; Efron 2011"),
    ]  # fmt: skip
    # From where alpha is 0.1%, on levels at equal distances of log SNR.
    first = schedule.time_of(torch.tensor(-13.8, dtype=torch.float64)).item()
    last = schedule.time_of(torch.tensor(9.0, dtype=torch.float64)).item()
    grid = schedule.grid_by_log_snr(config.steps, last, first)
    noise = torch.randn(config.points, 2, generator=generator, dtype=torch.float64)
    for name, sampler in SAMPLERS.items():
        made = sample(mixture.denoised, noise, grid, sampler, generator)
        errors = moments_in_errors(made, mixture.noised(grid[-1].alpha, grid[-1].sigma))
        findings.append(
            Finding(f"{name}: moments are off by, at most", errors, "standard errors",
                    expected=at_most(LIMIT), source="the mixture's moments")
        )  # fmt: skip
    errors, counts = orders(config.finest)
    for name, order in CURVES.items():
        found = math.log2(errors[name][-2] / errors[name][-1])
        findings.append(
            Finding(f"{name}: order of convergence", found,
                    expected=within(order - 0.15, order + 0.25), source="Karras et al., Lu et al.")
        )  # fmt: skip
    data, _ = mixture.sample(200, generator)
    exact = mixture.noised(1.0, 0.05).log_density(data)
    found = flow_log_likelihood(mixture.denoised, data, (1.0, 0.05), mean=mixture.moments()[0])
    findings.append(
        Finding("flow's log-likelihood differs from the mixture's by, at most",
                (found - exact).abs().max().item(), "nats", expected=at_most(1e-4),
                source="Song et al. 2020, appendix D.2")
    )  # fmt: skip
    draw(mixture, errors, counts, config.frames)
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(points=1000, steps=120, finest=160, frames=0))
