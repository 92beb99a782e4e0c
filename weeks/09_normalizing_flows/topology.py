"""A flow bends, stretches and folds up the plane. Can it tear it?

No: a flow and its inverse are continuous, so it leads one connected piece to one connected piece.
Two modes with nothing between them are learnt as two modes joined by a bridge. How thin the bridge
may be is a theorem: let x be the flow's output across the gap, L the largest |dx/dnoise| inside the
gap and w its width. Left and right are then w / L apart in the noise, and of all sets with that
mass a half plane gains least when it grows (Borell; Sudakov and Tsirelson):

    mass in the gap  >=  Phi(Phi⁻¹(mass on the left) + w / L) - mass on the left

Expected: the theorem, at every moment of the training. Less bridge needs more slope. A base with
two modes needs no bridge: it is the other way out.

Paper   Cornish et al. 2019, arXiv:1909.13833, theorem 2.1; Borell 1975, doi:10.1007/BF01425510
Run     uv run python weeks/09_normalizing_flows/topology.py
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.distributions import Distribution, Normal

from implementations.flows.affine_coupling import coupling_layers
from implementations.flows.bijection import Flow, negative_log_likelihood
from implementations.flows.plane import grid, log_density, two_modes
from implementations.flows.spline_coupling import spline
from implementations.lab.findings import Finding, at_least, at_most
from implementations.lab.script import run
from implementations.training.fit import fit
from implementations.training.rows import RandomRows

DEVIATION = 0.5
UNIT = Normal(0.0, 1.0)


@dataclass(frozen=True)
class Config:
    """Train a flow on two modes apart, and measure what joins them."""

    distance: float = 6.0
    """between the two centres; each has deviation 0.5"""
    steps: int = 1200
    """training steps of each flow"""
    batch: int = 256
    """points in a step"""
    looks: int = 8
    """moments at which the bridge is measured"""
    cells: int = 500
    """cells along each axis, of noise and of data"""


def masses(flow: Flow, half: float, cells: int) -> tuple[float, float]:
    """The flow's mass left of the gap and inside it, from its density on a grid."""
    area = grid(-10, 10, -8, 8, cells)
    density = log_density(flow.log_prob, area.points).exp()
    across = area.points[:, 0]
    left = area.integral(torch.where(across < -half, density, 0.0))
    return left, area.integral(torch.where(across.abs() < half, density, 0.0))


def steepest(flow: Flow, half: float, cells: int) -> float:
    """The largest |dx/dnoise| over all noise that is led into the gap, x being across the gap."""
    noise = grid(-5, 5, -5, 5, cells).points.requires_grad_()
    across = flow.bijection.inverse(noise).value[:, 0]
    (slope,) = torch.autograd.grad(across.sum(), noise)
    inside = across.detach().abs() < half
    return slope[inside].norm(dim=1).max().item() if inside.any() else float("inf")


def least(left: float, width: float, slope: float) -> float:
    """The theorem's bound on the mass in the gap."""
    start = UNIT.icdf(torch.tensor(left))
    return (UNIT.cdf(start + width / slope) - left).item()


def train(
    base: Distribution | None, target: Distribution, half: float, config: Config
) -> tuple[Flow, list[tuple[int, float, float, float]]]:
    """A trained flow, and (step, mass in the gap, bound, steepest slope) as it learnt."""
    torch.manual_seed(0)
    rows = RandomRows(target.sample((50_000,)), batch=config.batch)
    flow = Flow(coupling_layers(2, 4, 32, spline(8, bound=6.0)).double(), (2,), base)
    history = []

    def watch(step: int) -> None:
        if step and step % max(1, config.steps // config.looks) == 0:
            left, bridge = masses(flow, half, config.cells)
            slope = steepest(flow, half, config.cells) if base is None else float("nan")
            bound = least(left, 2 * half, slope) if base is None else float("nan")
            history.append((step, bridge, bound, slope))

    title = "normal base" if base is None else "base of two modes"
    options = {"learning_rate": 5e-3, "clip": 5.0, "watch": watch, "title": title}
    fit(flow, rows, negative_log_likelihood, steps=config.steps, **options)
    return flow, history


def draw(flows: dict[str, Flow], target: Distribution, half: float, history: list) -> None:
    """Densities in logarithms, so that bridges show; the bridge by step, above its bound."""
    _, axes = plt.subplots(2, 2, figsize=(11.5, 6.8), layout="constrained")
    axes = axes.flat
    area = grid(-5, 5, -3, 3, 300)
    densities = {"the truth": target.log_prob, **{n: flow.log_prob for n, flow in flows.items()}}
    for axis, (name, density) in zip(axes, densities.items(), strict=False):
        picture = area.picture(log_density(density, area.points)) / np.log(10)
        image = axis.imshow(picture, extent=area.extent, vmin=-8, vmax=0, cmap="viridis")
        for side in (-half, half):
            axis.axvline(side, color="white", linestyle=":")
        axis.set(title=name)
    axes[2].figure.colorbar(image, ax=axes[2], shrink=0.8, label="log10 of the density")
    steps, bridge, bound, _ = np.array(history).T
    axes[3].semilogy(steps, bridge, "o-", label="mass in the gap, between the dotted lines")
    axes[3].semilogy(steps, bound, "s--", label="no flow as steep has less")
    axes[3].set(xlabel="training step", title="normal base: the bridge and its bound")
    axes[3].grid(alpha=0.3)
    axes[3].set_ylim(min(bound) / 2, 8 * max(bridge))  # room for the legend above the curves
    axes[3].legend(loc="upper right")


def main(config: Config) -> list[Finding]:
    torch.set_num_threads(1)
    target = two_modes(config.distance, DEVIATION)
    half = config.distance / 2 - 4 * DEVIATION  # 4 deviations from either centre
    if half <= 0:
        raise ValueError(f"the modes must be over {8 * DEVIATION} apart, got {config.distance}")
    part = Normal(config.distance / 2, DEVIATION)  # the other is its mirror image
    truth = (part.cdf(torch.tensor(half)) - part.cdf(torch.tensor(-half))).item()
    normal, history = train(None, target, half, config)
    # Not the target itself, which would leave nothing to learn: closer together, and wider.
    base = two_modes(config.distance / 2, 2 * DEVIATION / 3)
    repaired, repair = train(base, target, half, config)
    draw({"normal base": normal, "base of two modes": repaired}, target, half, history)
    first, last = history[0], history[-1]
    ratio = min(bridge / bound for _, bridge, bound, _ in history)
    source = "Gaussian isoperimetry; Cornish et al. 2019"
    return [
        Finding("mass of the truth in the gap", truth),
        Finding("mass of the flow in the gap, early", first[1]),
        Finding("mass of the flow in the gap, trained", last[1]),
        Finding("the bound for a flow as steep, trained", last[2]),
        Finding(
            "least mass over bound while training", ratio, expected=at_least(1.0), source=source
        ),
        Finding("steepest slope in the gap, early", first[3]),
        Finding("steepest slope in the gap, trained", last[3]),
        Finding("slope grows while training by", last[3] / first[3], "x", goal=at_least(1)),
        Finding("mass in the gap with a base of two modes", repair[-1][1]),
        Finding("of the bridge, that base leaves", repair[-1][1] / last[1], goal=at_most(0.5)),
    ]


if __name__ == "__main__":
    run(main, Config(), quick=Config(steps=8, batch=64, looks=2, cells=80))
