"""How long should a step be, and how long a flight?

First many single HMC steps from exact draws of a standard normal in 100 dimensions, all flights a
quarter of a turn long, from timid to reckless step sizes. Then flights of all lengths up to one
whole turn, at a small step size, in one dimension of many alike.

Expected: in many dimensions the acceptance A follows from the step size, which is as the root of s
in A = 2 Φ(-s / 2). The distance flown per gradient is most at A = 0.651. A refused flight repeats a
draw, so that the correlation is 1 - A and a flight is worth A / (2 - A) draws: that per gradient is
most at A = 0.757, and within 2% of it from 0.69 to 0.82.

A normal is an oscillator: after a flight of length t the correlation with the start is cos(t). At
half a turn the chain swings to the other side, draws of the mean become better than independent,
but |q| has not changed at all; at a whole turn it is where it was. That is resonance, and why NUTS
measures its flights.

NUTS is not free of it. On a hundred equal coordinates there is a step size at which seven steps are
just short of half a turn, so that the tree is doubled, and fifteen are a whole turn, at whose end
nothing looks turned: the tree goes on. Stan asks for turns across the middle of a tree as well,
this repository and NumPyro do not. The finding says how many steps a draw takes in that hole.

Paper   Beskos et al. 2013, arXiv:1001.4460 (0.651); Neal 2011, arXiv:1206.1901, section 3.2
Run     uv run python weeks/10_monte_carlo/step_size_and_length.py
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from implementations.bayesian.chains import run_chains
from implementations.bayesian.diagnostics import entrywise, ess_bulk
from implementations.bayesian.hmc import init, step
from implementations.lab.findings import Finding, at_most, within
from implementations.lab.host_devices import use_host_devices
from implementations.lab.script import run

QUARTER = np.pi / 2
TARGETS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Config:
    """Vary step size and length of flight."""

    dimension: int = 100
    draws: int = 20_000
    """exact draws from which a step is taken"""
    sizes: int = 25
    """step sizes tried"""
    lengths: int = 41
    """lengths of flight tried, up to one turn"""
    nuts_draws: int = 2000
    """draws of NUTS at each target acceptance; 0 leaves NUTS out"""


def log_density(position):
    return -0.5 * position @ position


@jax.jit
def steps_from(keys, starts, step_size, length):
    """One HMC step from each start, of a length that is right on average."""
    metric = jnp.ones(starts.shape[1])

    def one(key, start):
        length_key, key = jax.random.split(key)
        flight = jnp.floor(length / step_size + jax.random.uniform(length_key)).astype(int)
        state = init(start, log_density)
        state, info = step(key, state, log_density, step_size, metric, steps=flight)
        return state.position, info.acceptance

    return jax.vmap(one)(keys, starts)


def exact(draws: int, dimension: int):
    """Keys, and exact draws."""
    keys = jax.random.split(jax.random.key(1), draws)
    return keys, jax.random.normal(jax.random.key(0), (draws, dimension))


def correlation(before, after) -> float:
    return float(np.corrcoef(np.ravel(before), np.ravel(after))[0, 1])


def by_step_size(config: Config) -> np.ndarray:
    """Acceptance, and effective draws per gradient, for each step size."""
    keys, starts = exact(config.draws // 20, config.dimension)
    rows = []
    for size in np.geomspace(0.1, 1.2, config.sizes):
        after, acceptance = steps_from(keys, starts, size, QUARTER)
        r = correlation(starts, after)
        rows.append((acceptance.mean(), (1 - r) / (1 + r) * size / QUARTER))
    return np.array(rows)


def by_length(config: Config) -> np.ndarray:
    """Length, correlation of q with its start and of q², for each length of flight."""
    keys, starts = exact(config.draws, 1)
    rows = []
    for length in np.linspace(0.1, 2 * np.pi, config.lengths):
        after, _ = steps_from(keys, starts, 0.1, length)
        rows.append((length, correlation(starts, after), correlation(starts**2, after**2)))
    return np.array(rows)


def nuts_by_target(config: Config) -> np.ndarray:
    """Acceptance reached, effective draws per gradient, and steps a draw, for each target."""
    rows = []
    for target in TARGETS:
        given = {"draws": config.nuts_draws, "target": target}
        start = jnp.zeros((2, config.dimension))
        found = run_chains(jax.random.key(2), start, log_density, **given)
        draws = np.asarray(found.position[..., :10], float)
        worth = entrywise(ess_bulk, draws).mean() / float(found.info.steps.sum())
        steps = float(found.info.steps.mean())
        rows.append((float(found.info.acceptance.mean()), worth, steps))
    return np.array(rows)


def draw(sizes: np.ndarray, lengths: np.ndarray, trees: np.ndarray) -> None:
    """Worth over acceptance, and correlation over length."""
    _, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    left.plot(*sizes.T, "o-", label="HMC, a quarter of a turn")
    if len(trees):
        left.plot(*trees[:, :2].T, "s-", label="NUTS, targets 0.5 to 0.95")
    left.axvline(0.757, color="gray", linestyle=":", label="0.757")
    left.set(xlabel="acceptance", ylabel="effective draws per gradient", ylim=(0, None))
    left.set_title("Step size")
    turns = lengths[:, 0] / (2 * np.pi)
    right.plot(turns, np.cos(lengths[:, 0]), color="gray", lw=4, alpha=0.4, label="cos")
    right.plot(turns, lengths[:, 1], "o", markersize=4, label="q")
    right.plot(turns, lengths[:, 2], "^", markersize=4, label="q²")
    right.set(xlabel="length of flight, in turns", ylabel="correlation with the start")
    right.set_title("Length: resonance at half a turn and at a whole one")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()


def main(config: Config) -> list[Finding]:
    use_host_devices(2)
    sizes, lengths = by_step_size(config), by_length(config)
    trees = nuts_by_target(config) if config.nuts_draws else np.zeros((0, 3))
    draw(sizes, lengths, trees)
    best = sizes[sizes[:, 1].argmax()]
    careful = sizes[abs(sizes[:, 0] - 0.9).argmin()]
    away = abs(lengths[:, 1] - np.cos(lengths[:, 0])).max()
    half = abs(lengths[:, 0] - np.pi).argmin()
    findings = [
        Finding(
            f"HMC, {config.dimension} dimensions: acceptance at which a gradient is worth most",
            float(best[0]),
            expected=within(0.65, 0.85),
            source="0.757 where √s A / (2 - A) is largest, and flat",
        ),
        Finding("at acceptance 0.9 a gradient is worth, of the best", float(careful[1] / best[1])),
        Finding(
            "correlation of q after a flight of length t: largest distance from cos(t)",
            float(away),
            expected=at_most(0.05),
            source="a normal is an oscillator",
        ),
        Finding("correlation of q after half a turn", float(lengths[half, 1])),
        Finding("correlation of q² after half a turn", float(lengths[half, 2])),
    ]
    for target, (reached, worth, steps) in zip(TARGETS, trees, strict=len(trees) > 0):
        findings.append(Finding(f"NUTS, target {target}: acceptance reached", float(reached)))
        share = float(worth / trees[:, 1].max())
        findings.append(Finding(f"NUTS, target {target}: worth, of the best target's", share))
        findings.append(Finding(f"NUTS, target {target}: steps a draw", float(steps)))
    return findings


if __name__ == "__main__":
    quick = Config(draws=4000, sizes=8, lengths=9, nuts_draws=0)
    run(main, Config(), quick=quick)
