"""What can each flow learn of a density that is known?

scikit-learn's two moons with noise 0.1 are a mixture of normals, so their density is a sum and
KL(moons || flow) an integral over the plane, which no sampling error blurs. Every kind of flow is
trained on the same points for as many steps; the spline coupling is watched while it learns.

Expected: every density integrates to one, whatever it has learnt, and no divergence is negative.
That is the change of variables; which flow is closest is measured.

Paper   Papamakarios et al. 2019, arXiv:1912.02762; each flow's own is named in its file
Run     uv run python weeks/09_normalizing_flows/two_moons.py
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from implementations.flows.affine_coupling import coupling_layers
from implementations.flows.autoregressive import (
    inverse_autoregressive_flow,
    masked_autoregressive_flow,
)
from implementations.flows.bijection import Bijection, Compose, Flow, negative_log_likelihood
from implementations.flows.continuous import Continuous, Velocity
from implementations.flows.planar import Planar, Radial
from implementations.flows.plane import Grid, divergence, grid, log_density, two_moons
from implementations.flows.spline_coupling import spline
from implementations.lab.findings import Finding, at_least, at_most, within
from implementations.lab.script import run
from implementations.training.fit import fit
from implementations.training.rows import RandomRows

KINDS: dict[str, Callable[[], Bijection]] = {
    "planar": lambda: Compose(*(Planar(2) for _ in range(16))),
    "radial": lambda: Compose(*(Radial(2) for _ in range(16))),
    "affine coupling": lambda: coupling_layers(2, 8, 32),
    "MAF": lambda: masked_autoregressive_flow(2, 8, 32),
    "IAF": lambda: inverse_autoregressive_flow(2, 8, 32),
    "spline coupling": lambda: coupling_layers(2, 4, 32, spline(8)),
    "continuous": lambda: Continuous(Velocity(2, 48), steps=8),
}
WATCHED = "spline coupling"


@dataclass(frozen=True)
class Config:
    """Train every kind of flow on two moons, and compare it with the truth."""

    steps: int = 1000
    """training steps of each flow"""
    batch: int = 256
    """points in a step"""
    points: int = 50_000
    """points to train on"""
    learning_rate: float = 5e-3
    """the first and highest one"""
    cells: int = 500
    """cells of the grid along each axis"""


def moments(steps: int) -> list[int]:
    """When the watched flow is drawn: at the beginning often, then less and less."""
    return [0, *(max(1, round(steps * share)) for share in (0.02, 0.06, 0.2)), steps]


def draw(cells: Grid, truth: Tensor, films: dict[int, Tensor], final: dict[str, Tensor]) -> None:
    """Above, one flow while it learns; below, the truth and what every flow has learnt."""
    columns = max(len(films), (len(final) + 2) // 2)
    figure, axes = plt.subplots(3, columns, figsize=(3 * columns, 7.6), layout="constrained")
    panels = [(f"{WATCHED}, step {step}", density) for step, density in films.items()]
    panels += [("", None)] * (columns - len(films))
    panels += [("the truth", truth), *final.items()]
    panels += [("", None)] * (3 * columns - len(panels))
    for axis, (title, log_p) in zip(axes.flat, panels, strict=True):
        axis.axis("off")
        if log_p is not None:
            picture = cells.picture(log_p.exp())
            axis.imshow(picture, extent=cells.extent, vmin=0, vmax=truth.exp().max(), cmap="magma")
            axis.set(title=title, xlim=(-1.7, 2.7), ylim=(-1.2, 1.7))
    figure.suptitle("Density, in one scale of colours; two moons with noise 0.1")


def main(config: Config) -> list[Finding]:
    torch.set_num_threads(1)  # matrices this small only wait for a second thread
    torch.manual_seed(0)
    moons, cells = two_moons(), grid(-5, 6, -5, 5, config.cells)
    rows = RandomRows(moons.sample((config.points,)).float(), batch=config.batch)
    truth = log_density(moons.log_prob, cells.points)
    entropy = -cells.integral(truth.exp() * truth)
    # Untimed: the first training of a process also loads the optimizer.
    fit(Flow(Planar(2), (2,)), rows, negative_log_likelihood, steps=1, learning_rate=1e-3)
    findings = [Finding("entropy of the two moons", entropy, "nats")]
    films, final = {}, {}
    for name, make in KINDS.items():
        torch.manual_seed(1)
        flow = Flow(make(), (2,))

        def see(flow: Flow = flow) -> Tensor:
            return log_density(flow.log_prob, cells.points.float())

        def watch(step: int, see: Callable = see, watched: bool = name == WATCHED) -> None:
            if watched and step in moments(config.steps):
                films[step] = see()

        started = time.perf_counter()
        options = {"learning_rate": config.learning_rate, "clip": 5.0, "watch": watch}
        fit(flow, rows, negative_log_likelihood, steps=config.steps, title=name, **options)
        seconds = time.perf_counter() - started
        final[name] = see()
        distance = divergence(cells, truth, final[name])
        integral = cells.integral(final[name].exp())
        count = sum(parameter.numel() for parameter in flow.parameters())
        findings += [
            Finding(f"{name}: KL(moons || flow)", distance, "nats", expected=at_least(-1e-4)),
            Finding(f"{name}: integral of its density", integral, expected=within(0.99, 1.01)),
            Finding(f"{name}: negative log-likelihood", entropy + distance, "nats a point"),
            Finding(f"{name}: parameters", count),
            Finding(f"{name}: training takes", seconds, "s"),
        ]
    best = {name: divergence(cells, truth, log_q) for name, log_q in final.items()}
    ratio = best["spline coupling"] / best["affine coupling"]
    findings.append(Finding("KL of splines over that of affine couplings", ratio, goal=at_most(1)))
    draw(cells, truth, films, final)
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(steps=4, batch=32, points=1000, cells=60))
