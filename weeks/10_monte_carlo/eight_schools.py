"""Why should the same posterior be written in two ways?

Eight schools measured what coaching does, each with its own standard error. Centred, the sampler
moves the schools' effects themselves: when their spread is small they must all lie close to their
mean, so the density narrows to a neck that no step fits. Non-centred, it moves how many spreads
each effect is away: the same posterior, and no neck, because eight noisy schools say little.

Expected: the centred form diverges where the neck begins, and its chains never see what lies below,
so the spread is estimated too large. Steps that are more careful (a higher target acceptance) begin
the same trouble deeper. The non-centred form goes all the way down and does not diverge.

Paper   Rubin 1981; Papaspiliopoulos, Roberts & Sköld 2007, doi:10.1214/088342307000000014
        Betancourt & Girolami 2013, arXiv:1312.0906
Run     uv run python weeks/10_monte_carlo/eight_schools.py
"""

from dataclasses import dataclass

import jax
import matplotlib.pyplot as plt
import numpy as np

from implementations.bayesian.chains import run_chains
from implementations.bayesian.diagnostics import ess_bulk, mcse_mean, r_hat
from implementations.bayesian.targets import TARGETS
from implementations.lab.findings import Finding, at_least, at_most
from implementations.lab.host_devices import use_host_devices
from implementations.lab.script import run

FORMS = {"centred": "eight_schools_centred", "non-centred": "eight_schools_non_centred"}


@dataclass(frozen=True)
class Config:
    """Sample eight schools in both forms."""

    chains: int = 8
    draws: int = 5000
    """of each chain"""
    warm_up: int = 1000
    careful: float = 0.95
    """a second target acceptance for the centred form, besides 0.8; 0 for none"""
    seed: int = 0


def sampled(form: str, target_acceptance: float, config: Config) -> dict[str, np.ndarray]:
    """Log spread, first school's effect, and divergences, [chain, draw] each."""
    target = TARGETS[FORMS[form]]()
    start_key, key = jax.random.split(jax.random.key(config.seed))
    start = jax.random.uniform(
        start_key, (config.chains, target.dimension), minval=-2.0, maxval=2.0
    )
    settings = {"warm_up": config.warm_up, "draws": config.draws, "target": target_acceptance}
    raw = run_chains(key, start, target.log_density, **settings)
    values = jax.vmap(jax.vmap(target.unflatten))(raw.position)
    return {
        "log spread": np.log(np.asarray(values["spread"], np.float64)),
        "effect": np.asarray(values["effect"][..., 0], np.float64),
        "divergent": np.asarray(raw.info.divergent),
    }


def draw(runs: dict[str, dict[str, np.ndarray]]) -> None:
    """The neck with its divergences, and how the mean of the spread settles."""
    figure, axes = plt.subplots(1, len(runs) + 1, figsize=(4.2 * (len(runs) + 1), 4))
    for axis, (name, values) in zip(axes, runs.items(), strict=False):
        broken = values["divergent"]
        dots = {"s": 3, "linewidths": 0}
        axis.scatter(values["effect"], values["log spread"], color="C0", alpha=0.15, **dots)
        axis.scatter(values["effect"][broken], values["log spread"][broken], color="C3", s=12)
        axis.set(title=f"{name}: {broken.sum()} divergences (red)", xlim=(-30, 60), ylim=(-6, 5))
        axis.set(xlabel="effect of the first school", ylabel="log spread")
    for name, values in runs.items():
        spread = values["log spread"].mean(axis=0)
        settling = np.cumsum(spread) / np.arange(1, len(spread) + 1)
        axes[-1].plot(settling, label=name)
    axes[-1].set(title="mean of the log spread so far", xlabel="draws of each chain")
    axes[-1].legend()
    figure.tight_layout()


def main(config: Config) -> list[Finding]:
    use_host_devices(2)
    careful = f"centred, acceptance {config.careful:g}"
    runs = {"centred": sampled("centred", 0.8, config)}
    if config.careful:
        runs[careful] = sampled("centred", config.careful, config)
    runs["non-centred"] = sampled("non-centred", 0.8, config)
    draw(runs)
    right = runs["non-centred"]["log spread"]
    rules = {"centred": at_least(0.002), "non-centred": at_most(0.001)}
    source = "Betancourt & Girolami 2013, section 4"
    findings = []
    for name, values in runs.items():
        spread, share = values["log spread"], values["divergent"].mean().item()
        claim, rule = f"{name}: share of steps that diverge", rules.get(name)
        findings += [
            Finding(claim, share, expected=rule, source=source if rule else ""),
            Finding(
                f"{name}: share of draws with log spread under -2", (spread < -2).mean().item()
            ),
            Finding(f"{name}: R-hat of the log spread", r_hat(spread)),
            Finding(f"{name}: bulk ESS of it", round(ess_bulk(spread)), "draws"),
        ]
        if name != "non-centred":
            error = np.hypot(mcse_mean(spread), mcse_mean(right))
            claim = f"{name}: log spread is larger than non-centred by"
            gap = float(spread.mean() - right.mean())
            findings.append(Finding(claim, gap, spread=float(error)))
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(chains=2, draws=1000, careful=0.0))
