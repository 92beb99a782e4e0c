"""What is a gradient worth as the dimension grows?

A random walk, MALA and HMC take one step from each of many exact draws of a standard normal. Each
has its step size bisected to the acceptance that theory calls best; HMC flies for a quarter of a
turn. The correlation r of a coordinate before and after tells the effective draws of a step,
(1 - r) / (1 + r); divided by the gradients that the step takes (for the random walk: densities),
and fitted by a power of the dimension. The powers are those of a limit, so that the fit begins at
256 dimensions: below, MALA steps so far that its steps are no longer small.

Expected: effective draws per gradient fall as dimension to the power -1 for the random walk, -1/3
for MALA and -1/4 for HMC.

Paper   random walk: Roberts, Gelman & Gilks 1997    MALA: Roberts & Rosenthal 1998
        HMC: Beskos et al. 2013, arXiv:1001.4460
Run     uv run python weeks/10_monte_carlo/random_walk_or_gradient.py
"""

from dataclasses import dataclass
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from implementations.bayesian.hmc import init as start_hmc
from implementations.bayesian.hmc import step as hmc_step
from implementations.bayesian.langevin import init as start_mala
from implementations.bayesian.langevin import step as mala_step
from implementations.bayesian.metropolis import init as start_walk
from implementations.bayesian.metropolis import step as walk_step
from implementations.lab.findings import Finding, within
from implementations.lab.script import run

QUARTER = np.pi / 2
LIMIT = 256
"""dimensions from which the powers are fitted"""
SAMPLERS = {  # init and step, the best acceptance, the power, how far from it a fit may be
    "random walk": ((start_walk, walk_step), 0.234, -1, 0.1),
    "MALA": ((start_mala, mala_step), 0.574, -1 / 3, 0.06),
    "HMC": ((start_hmc, hmc_step), 0.651, -1 / 4, 0.06),
}


@dataclass(frozen=True)
class Config:
    """Take single steps from exact draws in several dimensions."""

    dimensions: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    draws: int = 1000
    """exact draws from which a step is taken"""
    seeds: int = 4
    """how often all of it is done"""


def log_density(position):
    return -0.5 * position @ position


@partial(jax.jit, static_argnames="sampler")
def steps_from(sampler, keys, starts, step_size):
    """One step from each start: positions after, and acceptances."""
    (init, step), metric = sampler, jnp.ones(starts.shape[1])

    def one(key, start):
        length_key, key = jax.random.split(key)
        # A quarter of a turn is no whole number of steps: some fly one more, on average it is one.
        flight = jnp.floor(QUARTER / step_size + jax.random.uniform(length_key)).astype(int)
        more = {"steps": flight} if step is hmc_step else {}
        state = init(start, log_density)
        state, info = step(key, state, log_density, step_size, metric, **more)
        return state.position, info.acceptance

    return jax.vmap(one)(keys, starts)


def worth_of(name: str, dimension: int, draws: int, seed: int) -> float:
    """Effective draws per gradient at the best acceptance."""
    sampler, wanted, *_ = SAMPLERS[name]
    start_key, step_key = jax.random.split(jax.random.key(seed))
    starts = jax.random.normal(start_key, (draws, dimension))
    keys = jax.random.split(step_key, draws)
    low, high = 1e-2, 2.0
    for _ in range(12):
        size = (low * high) ** 0.5
        after, acceptance = steps_from(sampler, keys, starts, size)
        low, high = (size, high) if acceptance.mean() > wanted else (low, size)
    correlation = float((starts * after).mean() / (starts**2).mean())
    gradients = QUARTER / size if name == "HMC" else 1.0
    return (1 - correlation) / (1 + correlation) / gradients


def draw(dimensions: np.ndarray, worth: dict[str, np.ndarray], powers: dict[str, float]) -> None:
    """Effective draws per gradient, and the fits."""
    _, axes = plt.subplots(figsize=(7, 4.8), layout="constrained")
    for place, (name, values) in enumerate(worth.items()):
        axes.loglog(dimensions, values.T, ".", color=f"C{place}")
        middle = np.exp(np.log(values).mean(0))
        many = dimensions[dimensions >= LIMIT]
        fit = middle[-1] * (many / many[-1]) ** powers[name]
        axes.loglog(many, fit, color=f"C{place}", label=f"{name}: power {powers[name]:.2f}")
    axes.set(xlabel="dimension", ylabel="effective draws per gradient (or density)")
    axes.set_title("A standard normal, each sampler at its best acceptance")
    axes.grid(alpha=0.3, which="both")
    axes.legend()


def main(config: Config) -> list[Finding]:
    dimensions = np.array(config.dimensions)
    worth = {name: np.zeros((config.seeds, len(dimensions))) for name in SAMPLERS}
    combinations = list(product(SAMPLERS, range(config.seeds), range(len(dimensions))))
    for name, seed, place in tqdm(combinations, unit="fit"):
        worth[name][seed, place] = worth_of(name, config.dimensions[place], config.draws, seed)
    findings, powers = [], {}
    for name, values in worth.items():
        many = dimensions >= LIMIT
        fits = [np.polyfit(np.log(dimensions[many]), np.log(row[many]), 1)[0] for row in values]
        powers[name] = float(np.mean(fits))
        _, acceptance, power, margin = SAMPLERS[name]
        claim = f"{name} at acceptance {acceptance}: draws per gradient fall with the power"
        rule = within(power - margin, power + margin)
        spread = {"spread": np.std(fits, ddof=1).item()} if len(fits) > 1 else {}
        source = f"theory: {power:.3g}"
        findings.append(
            Finding(claim, powers[name], expected=rule, source=source, seeds=len(fits), **spread)
        )
    last = {name: float(values[:, -1].mean()) for name, values in worth.items()}
    for name in ("MALA", "HMC"):
        claim = f"{name} over the random walk in {dimensions[-1]} dimensions, per evaluation"
        findings.append(Finding(claim, last[name] / last["random walk"], "x"))
    draw(dimensions, worth, powers)
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(dimensions=(256, 4096), draws=300, seeds=1))
