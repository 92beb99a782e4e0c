"""What does a sampler miss when its chains look well?

Neal's funnel: v is normal with deviation 3, and nine numbers are normal with deviation exp(v / 2).
In the mouth a step of 10 is small, in the neck one of 0.1 is large; one step size cannot serve
both, and one metric neither. Drawn in its non-centred form, v and nine numbers are independent.

Expected: v has mean 0 and deviation 3, exactly. NUTS with one step size stops short of the neck, so
it finds a mean above 0 and too small a deviation, and divergences mark the place. The non-centred
form finds both, and nothing diverges. Random-walk Metropolis has no divergences to give a warning.

Paper   Neal 2003, doi:10.1214/aos/1056562461, section 8
        Betancourt & Girolami 2013, arXiv:1312.0906
Run     uv run python weeks/10_monte_carlo/funnel.py
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import norm

from implementations.bayesian.chains import run_chains
from implementations.bayesian.diagnostics import ess_bulk, mcse_mean, r_hat
from implementations.bayesian.metropolis import init, step
from implementations.bayesian.targets import TARGETS
from implementations.lab.findings import Finding, at_least, at_most
from implementations.lab.host_devices import use_host_devices
from implementations.lab.script import run


@dataclass(frozen=True)
class Config:
    """Sample the funnel by three samplers."""

    chains: int = 8
    draws: int = 5000
    """of each chain of NUTS"""
    warm_up: int = 1000
    thin: int = 20
    """Metropolis takes so many steps a draw: about as many densities as NUTS takes gradients"""
    seed: int = 0


def nuts_draws(name: str, config: Config) -> dict[str, np.ndarray]:
    """v, the first of the nine, and divergences, [chain, draw] each."""
    target = TARGETS[name]()
    start = jax.random.normal(jax.random.key(config.seed), (config.chains, target.dimension))
    settings = {"warm_up": config.warm_up, "draws": config.draws}
    raw = run_chains(jax.random.key(config.seed + 1), start, target.log_density, **settings)
    values = jax.vmap(jax.vmap(target.unflatten))(raw.position)
    divergent = np.asarray(raw.info.divergent)
    return {
        "v": np.asarray(values["v"], np.float64),
        "x": np.asarray(values["x"][..., 0], np.float64),
        "divergent": divergent,
    }


def metropolis_draws(config: Config) -> dict[str, np.ndarray]:
    """The same of random-walk Metropolis with a step of 1."""
    target = TARGETS["funnel"]()
    metric = jnp.ones(target.dimension)
    advance = partial(step, log_density=target.log_density, step_size=1.0, inverse_mass=metric)

    @jax.jit
    @jax.vmap
    def chain(key):
        start_key, key = jax.random.split(key)
        state = init(jax.random.normal(start_key, (target.dimension,)), target.log_density)

        def draw(state, key):
            keys = jax.random.split(key, config.thin)
            state, _ = jax.lax.scan(lambda state, key: (advance(key, state)[0], None), state, keys)
            return state, state.position

        keys = jax.random.split(key, config.warm_up + config.draws)
        return jax.lax.scan(draw, state, keys)[1][config.warm_up :]

    position = chain(jax.random.split(jax.random.key(config.seed + 2), config.chains))
    values = jax.vmap(jax.vmap(target.unflatten))(position)
    v, x = (np.asarray(values[name], np.float64) for name in ("v", "x"))
    return {"v": v, "x": x[..., 0], "divergent": np.zeros(v.shape, bool)}


def draw(runs: dict[str, dict[str, np.ndarray]]) -> None:
    """The funnel as each sampler saw it, and v's distribution."""
    figure, axes = plt.subplots(1, len(runs) + 1, figsize=(4 * (len(runs) + 1), 4))
    for axis, (name, values) in zip(axes, runs.items(), strict=False):
        broken = values["divergent"]
        axis.scatter(values["x"], values["v"], s=3, linewidths=0, alpha=0.15, color="C0")
        axis.scatter(values["x"][broken], values["v"][broken], s=12, color="C3")
        axis.set(title=f"{name}: {broken.sum()} divergences (red)", xlim=(-20, 20), ylim=(-10, 10))
        axis.set(xlabel="first of the nine numbers", ylabel="v")
    grid = np.linspace(-10, 10, 201)
    for name, values in runs.items():
        counts, edges = np.histogram(values["v"], bins=40, range=(-10, 10), density=True)
        axes[-1].stairs(counts, edges, label=name)
    axes[-1].plot(grid, norm.pdf(grid, 0, 3), "k--", label="the truth")
    axes[-1].set(title="the distribution of v", xlabel="v", ylabel="density", ylim=(0, 0.25))
    axes[-1].legend()
    figure.tight_layout()


def main(config: Config) -> list[Finding]:
    use_host_devices(2)
    runs = {
        "NUTS": nuts_draws("funnel", config),
        "Metropolis": metropolis_draws(config),
        "NUTS, non-centred": nuts_draws("funnel_non_centred", config),
    }
    draw(runs)
    findings = []
    rules = {"NUTS": at_least(1), "NUTS, non-centred": at_most(2)}
    for name, values in runs.items():
        v, exact = values["v"], name == "NUTS, non-centred"
        error, chance = abs(float(v.mean())), mcse_mean(v)
        if name in rules:
            claim, count = f"{name}: divergences", int(values["divergent"].sum())
            findings.append(Finding(claim, count, expected=rules[name]))
        rule = {"expected": at_most(4 * chance), "source": "the mean is 0"} if exact else {}
        findings += [
            Finding(f"{name}: mean of v is wrong by", error, spread=chance, **rule),
            Finding(f"{name}: share of draws with v under -6", (v < -6).mean().item()),
            Finding(f"{name}: R-hat of v", r_hat(v)),
            Finding(f"{name}: bulk ESS of v", round(ess_bulk(v)), "draws"),
        ]
    findings.append(Finding("the true share under -6", norm.cdf(-2).item()))
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(chains=4, draws=1000, thin=5))
