"""Where does a trajectory of NUTS go, and how does it know when to stop?

Three trajectories on the banana are drawn point by point, in the order in which the doublings made
them. Then NUTS runs on a standard normal with step sizes from timid to coarse, and its depths are
counted.

Expected: half a turn of an oscillator takes a time of π, so that the flight before the turn is the
same however it is cut into steps. Halving the step size doubles the steps and makes the tree
deeper by one. Trees only have 2^depth points: the flight is somewhere between half a turn and
twice that.

Paper   Hoffman & Gelman 2014, arXiv:1111.4246; Betancourt 2017, arXiv:1701.02434
Run     uv run python weeks/10_monte_carlo/nuts_trees.py
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from implementations.bayesian.integrators import Phase, integrate
from implementations.bayesian.nuts import explore, init, step
from implementations.bayesian.targets import banana
from implementations.lab.findings import Finding, within
from implementations.lab.script import run

SIZES = (0.025, 0.05, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class Config:
    """Look at trees."""

    draws: int = 2000
    """draws at each step size"""
    dimension: int = 10
    """of the normal whose trees are counted"""


def normal(position):
    return -0.5 * position @ position


@partial(jax.jit, static_argnames="config")
def statistics(size, config: Config):
    """Info of a chain that starts with an exact draw."""

    def draw(state, key):
        return step(key, state, normal, size, jnp.ones(config.dimension))

    start = jax.random.normal(jax.random.key(1), (config.dimension,))
    keys = jax.random.split(jax.random.key(0), config.draws)
    return jax.lax.scan(draw, init(start, normal), keys)[1]


fly = jax.jit(explore, static_argnames="log_density")
advance = jax.jit(integrate, static_argnames="log_density")


def path(log_density, start: np.ndarray, seed: int, size: float) -> tuple[list, np.ndarray]:
    """The points of one trajectory, a list for each doubling, and the one that was chosen.

    The sampler does not keep the points, but the coins tell on which side each doubling went.
    """
    rng = np.random.default_rng(seed)
    momentum, coins = jnp.asarray(rng.normal(size=2)), jnp.asarray(rng.uniform(size=(8, 3)))
    state, metric = init(jnp.asarray(start), log_density), jnp.ones(2)
    chosen, info = fly(momentum, coins, state, log_density, size, metric)
    ends = [Phase(state.position, momentum, state.log_density, state.gradient)] * 2
    doublings, left = [[np.asarray(start)]], int(info.steps)
    for depth in range(int(info.depth)):
        forwards = int(coins[depth, 0] < 0.5)
        points = []
        for _ in range(min(2**depth, left)):
            signed = size if forwards else -size
            ends[forwards] = advance(ends[forwards], log_density, signed, metric)
            points.append(np.asarray(ends[forwards].position))
        left -= len(points)
        doublings.append(points)
    return doublings, np.asarray(chosen.position)


def draw_paths(axes) -> None:
    """Trajectories over the banana's contours, later doublings darker."""
    target = banana()
    x, y = np.meshgrid(np.linspace(-24, 24, 160), np.linspace(-8, 12, 120))
    grid = jnp.stack((x.ravel(), y.ravel()), 1)
    height = np.asarray(jax.vmap(target.log_density)(grid)).reshape(x.shape)
    axes.contour(x, y, height, height.max() - np.array([8, 4.5, 2, 0.5]), colors="0.8")
    for seed, start in enumerate(([0.0, -3.0], [12.0, 1.5], [-18.0, 7.0])):
        doublings, chosen = path(target.log_density, np.array(start), seed, 0.35)
        for depth, points in enumerate(doublings):
            shade = 0.25 + 0.75 * depth / len(doublings)
            axes.plot(*np.array(points).T, ".", color=plt.cm.viridis_r(shade), markersize=5)
        axes.plot(*start, "k*", markersize=9)
        axes.plot(*chosen, "ro", markersize=8, fillstyle="none")
    axes.set(xlabel="x", ylabel="y", title="Trajectories: star the start, circle the draw")


def main(config: Config) -> list[Finding]:
    found = {size: statistics(size, config) for size in SIZES}
    depth = {size: np.asarray(info.depth) for size, info in found.items()}
    times = {size: float(info.steps.mean()) * size for size, info in found.items()}

    _, axes = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained", width_ratios=(5, 4, 3))
    draw_paths(axes[0])
    for place, (size, depths) in enumerate(depth.items()):
        shares = np.bincount(depths, minlength=10)[:10] / len(depths)
        axes[1].plot(range(10), shares, "o-", color=f"C{place}", label=f"step size {size}")
    axes[1].set(xlabel="depth of the tree", ylabel="share of draws", title="A standard normal")
    axes[2].semilogx(times.keys(), times.values(), "o-")
    axes[2].axhline(np.pi, color="gray", linestyle=":", label="half a turn")
    axes[2].set(xlabel="step size", ylabel="steps x step size", ylim=(0, 8))
    axes[2].set_xticks(SIZES, [str(size) for size in SIZES])
    axes[2].minorticks_off()
    axes[2].set_title("Time of flight")
    for one in axes[1:]:
        one.grid(alpha=0.3)
        one.legend()

    means = [float(depths.mean()) for depths in depth.values()]
    slope = float(np.polyfit(-np.log2(SIZES), means, 1)[0])
    source = "the flight's length does not depend on the step"
    findings = [
        Finding(
            "depth gained when the step size is halved",
            slope,
            expected=within(0.8, 1.2),
            source=source,
        )
    ]
    for size, time in times.items():
        claim = f"step size {size}: mean time of flight, in half turns"
        rule = within(0.7, 2.2)
        source = "a tree stops at the first doubling after half a turn"
        findings.append(Finding(claim, time / np.pi, expected=rule, source=source))
    whole = 2.0 ** depth[0.1] - 1
    lost = float((np.asarray(found[0.1].steps) < whole).mean())
    findings.append(Finding("step size 0.1: draws whose last doubling was thrown away", lost))
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(draws=200))
