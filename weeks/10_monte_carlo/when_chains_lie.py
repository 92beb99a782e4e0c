"""When do all diagnostics say yes and the answer is wrong?

Two normal humps, the right one with a share of 0.3, ever further apart. Four chains of NUTS on
each, many times over: once all from the left hump, once from places drawn wide over both. R-hat,
bulk and tail ESS are judged by the usual limits (1.01 and 400), and the mean of the draws is
compared with the true one. A *lie* is a run that passes every check with a mean over four of its
own standard errors away.

Expected: while chains cross between the humps nothing is wrong. When they no longer cross, chains
that began together agree perfectly about half of the truth: R-hat is 1 and the ESS is excellent.
R-hat sees only what chains disagree about, so wide starts are caught, unless all four begin on one
side. Divergences are no help: both humps are smooth.

Paper   Vehtari et al. 2021, arXiv:1903.08008, section 2; Gelman & Rubin 1992 (starts that are wide)
Run     uv run python weeks/10_monte_carlo/when_chains_lie.py
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.scipy.special import logsumexp
from scipy.stats import norm
from tqdm import tqdm

from implementations.bayesian.chains import run_chain
from implementations.bayesian.diagnostics import complaints, mcse_mean, r_hat
from implementations.lab.findings import Finding, at_least, at_most
from implementations.lab.script import run

RIGHT_SHARE, CHAINS = 0.3, 4
STARTS = ("together", "wide")


@dataclass(frozen=True)
class Config:
    """Sample two humps that move apart."""

    distances: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0, 14.0)
    """between the humps, in their deviations; at the last they are apart for good"""
    repetitions: int = 60
    """runs of four chains at each distance, from each kind of start"""
    draws: int = 1000
    warm_up: int = 300
    seed: int = 0


@partial(jax.jit, static_argnames="config")
def chains(keys, starts, distances, config: Config):
    """Draws [run, chain, draw] and divergences, from starts [run, chain] and distances [run]."""
    log_shares = jnp.log(jnp.array([1 - RIGHT_SHARE, RIGHT_SHARE]))

    def one(key, start, distance):
        def log_density(x):
            centres = distance * jnp.array([-0.5, 0.5])
            return logsumexp(log_shares - 0.5 * (x - centres) ** 2)

        settings = {"warm_up": config.warm_up, "draws": config.draws}
        raw = run_chain(key, start[None], log_density, **settings)
        return raw.position[:, 0], raw.info.divergent

    return jax.vmap(jax.vmap(one, (0, 0, None)))(keys, starts, distances)


def runs(kind: str, config: Config) -> tuple[np.ndarray, int]:
    """Draws [distance, repetition, chain, draw] and the number of divergences."""
    start_key, key = jax.random.split(jax.random.key(config.seed + STARTS.index(kind)))
    shape = (len(config.distances) * config.repetitions, CHAINS)
    distances = jnp.repeat(jnp.array(config.distances), config.repetitions)
    noise = jax.random.normal(start_key, shape)
    # Wide: all over both humps, as if nothing were known. Together: near the left one.
    starts = noise * distances[:, None] if kind == "wide" else noise - distances[:, None] / 2
    position, divergent = chains(jax.random.split(key, shape), starts, distances, config)
    draws = np.asarray(position, np.float64)
    return draws.reshape(len(config.distances), -1, *draws.shape[1:]), int(divergent.sum())


def verdicts(draws: np.ndarray, distance: float) -> tuple[float, bool, bool]:
    """Of one run: R-hat, whether it passes every check, whether its mean is wrong."""
    truth = distance * (RIGHT_SHARE - 0.5)
    wrong = abs(draws.mean() - truth) > 4 * mcse_mean(draws)
    return r_hat(draws), not complaints({"x": draws}), bool(wrong)


def draw(config: Config, judged: dict[str, np.ndarray], example: np.ndarray) -> None:
    """One lying run, then shares of runs by distance for both kinds of start."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    far = config.distances[-1]
    grid = np.linspace(-far / 2 - 4, far / 2 + 4, 400)
    left, right = (norm.pdf(grid, centre) for centre in (-far / 2, far / 2))
    axes[0].plot(grid, (1 - RIGHT_SHARE) * left + RIGHT_SHARE * right, "k--", label="the truth")
    axes[0].hist(example.ravel(), bins=60, density=True, alpha=0.6, label="four chains")
    axes[0].set(title=f"R-hat {r_hat(example):.3f}, no complaint", xlabel="x")
    axes[0].legend()
    for axis, kind in zip(axes[1:], STARTS, strict=True):
        _, passes, wrong = judged[kind].transpose(2, 0, 1)
        axis.plot(config.distances, passes.mean(1), "o-", color="C0", label="passes every check")
        axis.plot(config.distances, wrong.mean(1), "s-", color="C1", label="the mean is wrong")
        axis.plot(config.distances, (passes * wrong).mean(1), "x-", color="C3", label="lies: both")
        axis.set(title=f"chains start {kind}", xlabel="distance of the humps", ylim=(-0.05, 1.05))
        axis.set_ylabel("share of runs")
    axes[-1].legend()
    figure.tight_layout()


def main(config: Config) -> list[Finding]:
    found = {kind: runs(kind, config) for kind in STARTS}
    judged = {}
    with tqdm(total=2 * len(config.distances) * config.repetitions, unit="run") as bar:
        for kind, (draws, _) in found.items():
            judged[kind] = np.zeros((*draws.shape[:2], 3))
            for at, distance in enumerate(config.distances):
                for repetition in range(config.repetitions):
                    judged[kind][at, repetition] = verdicts(draws[at, repetition], distance)
                    bar.update()
    draw(config, judged, found["together"][0][-1, 0])
    findings = [Finding("steps that diverged, of all", sum(count for _, count in found.values()))]
    far, source = config.distances[-1], "chains cannot disagree about what none has seen"
    for kind in STARTS:
        ratio, passes, wrong = judged[kind].transpose(2, 0, 1)
        near = float((passes * wrong)[0].mean())
        rule = at_most(1.01) if kind == "together" else at_least(1.1)
        claim = f"start {kind}, distance {far:g}: median R-hat"
        findings += [
            Finding(f"start {kind}, distance {config.distances[0]:g}: share of lies", near),
            Finding(claim, float(np.median(ratio[-1])), expected=rule, source=source),
            Finding(
                f"start {kind}, distance {far:g}: share of lies", float((passes * wrong)[-1].mean())
            ),
        ]
    claim = "four wide starts fall on one side with probability"
    findings.append(Finding(claim, 2 * 0.5**CHAINS))
    return findings


if __name__ == "__main__":
    quick = Config(distances=(1.0, 4.0, 14.0), repetitions=5, draws=500)
    run(main, Config(), quick=quick)
