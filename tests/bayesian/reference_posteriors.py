"""Long runs of NumPyro's NUTS on every target, to hold other samplers against.

Writes reference_posteriors.json: of each quantity its mean and deviation, and the Monte Carlo
standard errors of both, entry by entry. Of the two targets that NUTS itself cannot explore, the
non-centred forms are run: the same distribution of the same quantities.

Run     uv run python tests/bayesian/reference_posteriors.py
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import MCMC, NUTS
from numpyro.infer.util import potential_energy

from implementations.bayesian.diagnostics import (
    entrywise,
    ess_bulk,
    mcse_deviation,
    mcse_mean,
    r_hat,
)
from implementations.bayesian.targets import TARGETS, Target
from implementations.bayesian.targets_numpyro import MODELS
from implementations.lab.files import write_atomically
from implementations.lab.host_devices import use_host_devices

FILE = Path(__file__).with_suffix(".json")
HELPERS = {"raw", "raw_v", "raw_x", "shock"}
"""what a non-centred form samples instead of what is asked for"""
EASIER = {"funnel": "funnel_non_centred", "eight_schools_centred": "eight_schools_non_centred"}
DRAWS = 20_000


def quantities(target: Target, positions: jax.Array) -> dict[str, np.ndarray]:
    """Draws [chain, draw, ...] of everything that is asked for, from flat positions."""
    values = jax.jit(jax.vmap(jax.vmap(target.unflatten)))(positions)
    return {name: np.asarray(value) for name, value in values.items() if name not in HELPERS}


def summary(draws: np.ndarray) -> dict[str, list | float]:
    """Five significant digits of mean, deviation and their standard errors, entry by entry."""
    found = {
        "mean": draws.mean(axis=(0, 1)),
        "deviation": draws.std(axis=(0, 1)),
        "mean_error": entrywise(mcse_mean, draws),
        "deviation_error": entrywise(mcse_deviation, draws),
    }
    return {
        name: np.vectorize(lambda x: float(f"{x:.5g}"))(x).tolist() for name, x in found.items()
    }


def run(name: str) -> dict[str, dict]:
    """Four chains of NumPyro's NUTS, which must have mixed."""
    target, model = TARGETS[name](), MODELS[name]
    kernel = NUTS(
        potential_fn=lambda free: potential_energy(model, (), {}, free), target_accept_prob=0.9
    )
    chains = MCMC(
        kernel,
        num_warmup=2_000,
        num_samples=DRAWS,
        num_chains=4,
        chain_method="parallel",
        progress_bar=False,
    )
    key, start_key = jax.random.split(jax.random.key(2026))
    start = jax.random.uniform(start_key, (4, target.dimension), minval=-2.0, maxval=2.0)
    chains.run(key, init_params=jax.vmap(target.free)(start))
    free = chains.get_samples(group_by_chain=True)
    parts = [free[site].reshape(4, DRAWS, -1) for site in sorted(free)]
    flat = jnp.concatenate(parts, axis=-1)  # by alphabet, as the target's own vector
    found = {}
    for quantity, draws in quantities(target, flat).items():
        worst, fewest = entrywise(r_hat, draws).max(), entrywise(ess_bulk, draws).min()
        print(f"{name:26} {quantity:14} R-hat {worst:.4f}  bulk ESS {fewest:8.0f}", flush=True)
        assert worst < 1.005 and fewest > 4_000, "the reference itself has not mixed"
        found[quantity] = summary(draws)
    return found


def main() -> None:
    use_host_devices(4)
    with jax.enable_x64(True):
        found = {name: run(name) for name in TARGETS if name not in EASIER}
    found |= {name: found[easier] for name, easier in EASIER.items()}
    write_atomically(FILE, json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
