"""Is it the posterior that the sampler draws from?

Draw parameters from the prior and data from the parameters: then the parameters are one draw from
the posterior of those data, and their rank among the sampler's draws is uniform. Thousands of
ranks make a histogram, flat if density and sampler are right. Here they are, clean and broken:
a precision that is wrong by 5%, a scale without the determinant of its transform, MALA without
the correction for its drift, and a sampler that never looked at the data. Geweke's joint test,
which alternates sampler and new data, judges the same cases after some rounds.

Expected: clean ones pass, with a rate of false alarms of 1e-3 each; broken ones are caught. A
sampler that ignores the data is caught by the ranks of the log-density alone: those of parameters
stay flat.

Paper   Talts et al. 2018, arXiv:1804.06788; Modrák et al. 2023, arXiv:2211.02383; Geweke 2004
Run     uv run python weeks/10_monte_carlo/calibrated.py
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import binom
from tqdm import tqdm

from implementations.bayesian.calibration import (
    Model,
    calibrated,
    geweke_values,
    joint_p_values,
    rank_p_values,
    sbc_ranks,
)
from implementations.bayesian.calibration_models import line, schools
from implementations.bayesian.langevin import init, move
from implementations.bayesian.langevin import step as mala_step
from implementations.bayesian.nuts import step as nuts_step
from implementations.lab.findings import Finding, equals
from implementations.lab.script import run

QUANTITIES = ("intercept", "log spread", "log noise", "log density")
"""by number, of the cases that show them"""


@dataclass(frozen=True)
class Config:
    """Rank the truth among a sampler's draws, in clean and broken cases."""

    replications: int = 20_000
    draws: int = 31
    """of each chain; ranks are 0 to that"""
    rounds: int = 20
    """of sampler and new data in Geweke's test; 0 leaves it out"""
    cases: tuple[str, ...] = ()
    """some of them, by name; all if empty"""
    false_alarms: float = 1e-3
    seed: int = 0


class Case(NamedTuple):
    """A model and a sampler, one of them perhaps broken, and the quantities to show."""

    model: Model
    move: Callable
    shown: tuple[int, ...]
    clean: bool = False


def with_nuts(key, position, log_density):
    state = init(position, log_density)
    return nuts_step(key, state, log_density, 0.15, jnp.ones(position.shape))[0].position


def with_mala(key, position, log_density):
    state = init(position, log_density)
    return mala_step(key, state, log_density, 0.2, jnp.ones(position.shape))[0].position


def uncorrected(key, position, log_density):
    """MALA's proposal, always accepted: no probability is below a uniform of -1."""
    state, noise = init(position, log_density), jax.random.normal(key, position.shape)
    metric = jnp.ones(position.shape)
    return move(noise, -1.0, state, log_density, 0.2, metric)[0].position


def ignores_data(key, position, log_density):
    return jax.random.normal(key, position.shape) * jnp.array([1.0, 1.0, 0.3])


def without_determinant() -> Model:
    """Schools, but log_joint forgets log |d spread / d log spread|."""
    right = schools()
    forgets = lambda position, y: right.log_joint(position, y) - position[1]  # noqa: E731
    return right._replace(log_joint=forgets)


CASES = {
    "a line, NUTS": Case(line(), with_nuts, (2,), clean=True),
    "schools, NUTS": Case(schools(), with_nuts, (1,), clean=True),
    "a line, MALA": Case(line(), with_mala, (0,), clean=True),
    "a line, precision 5% wrong": Case(line(1.05), with_nuts, (2,)),
    "schools, no determinant": Case(without_determinant(), with_nuts, (1,)),
    "a line, MALA uncorrected": Case(line(), uncorrected, (0,)),
    "a line, data ignored": Case(line(), ignores_data, (0, 3)),
}


def judge(name: str, config: Config) -> tuple[np.ndarray, bool, bool | None]:
    """Ranks [replication, quantity], their verdict, and Geweke's."""
    case, keys = CASES[name], jax.random.split(jax.random.key(config.seed), 3)
    sizes = {"replications": config.replications, "batch": min(2_000, config.replications)}
    ranks = sbc_ranks(keys[0], case.model, case.move, draws=config.draws, **sizes)
    passes = calibrated(rank_p_values(ranks, config.draws), config.false_alarms)
    joint = None
    if config.rounds:
        after, fresh = (
            geweke_values(key, case.model, case.move, rounds=rounds, **sizes)
            for key, rounds in ((keys[1], config.rounds), (keys[2], 0))
        )
        joint = calibrated(joint_p_values(after, fresh), config.false_alarms)
    return ranks, passes, joint


def draw(shown: dict[str, np.ndarray], config: Config) -> None:
    """A histogram of ranks a case, with the band that holds 99% of the bars of a flat one."""
    panels = [(name, number) for name in shown for number in CASES[name].shown]
    columns = (len(panels) + 1) // 2
    figure, axes = plt.subplots(2, columns, figsize=(4.2 * columns, 5.6), sharex=True, sharey=True)
    low, high = binom.ppf([0.005, 0.995], config.replications, 1 / (config.draws + 1))
    for axis, (name, number) in zip(axes.flat, panels, strict=False):
        counts = np.bincount(shown[name][:, number], minlength=config.draws + 1)
        colour = "C0" if CASES[name].clean else "C3"
        axis.axhspan(low, high, color="gray", alpha=0.35)
        axis.bar(np.arange(config.draws + 1), counts, width=1.0, color=colour, alpha=0.7)
        axis.set(title=name, xlabel=f"rank of the true {QUANTITIES[number]}", ylim=(0, 2.5 * high))
    figure.tight_layout()


def main(config: Config) -> list[Finding]:
    if unknown := set(config.cases) - set(CASES):
        raise ValueError(f"cases are some of {', '.join(CASES)}, got {', '.join(unknown)}")
    shown, findings = {}, []
    for name in tqdm(config.cases or CASES, unit="case"):
        shown[name], passes, joint = judge(name, config)
        clean = CASES[name].clean
        source = "Talts et al. 2018" if clean else "planted"
        claim = f"{name}: ranks are uniform"
        findings.append(Finding(claim, passes, expected=equals(clean), source=source))
        if joint is not None:
            claim, source = f"{name}: passes Geweke's test", "Geweke 2004" if clean else "planted"
            findings.append(Finding(claim, joint, expected=equals(clean), source=source))
    draw(shown, config)
    return findings


if __name__ == "__main__":
    few = ("a line, MALA", "a line, MALA uncorrected")
    run(main, Config(), quick=Config(replications=2_000, draws=15, rounds=0, cases=few))
