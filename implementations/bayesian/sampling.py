"""Sampling: warm-up and draws of every chain in one compiled program, each chain on its own core.

Paper   Vehtari et al. 2021, arXiv:1903.08008 (why several chains)
Run     uv run python implementations/bayesian/sampling.py
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from implementations.bayesian import nuts
from implementations.bayesian.adaptation import MetricName, warm_up as tune
from implementations.bayesian.integrators import LogDensity, Metric


class Draws(NamedTuple):
    """Raw arrays of a run."""

    position: Float[Array, "chain draw dim"]
    info: NamedTuple
    """the sampler's Info, every field [chain, draw]"""
    step_size: Float[Array, " chain"]
    inverse_mass: Float[Array, "chain dim"] | Float[Array, "chain dim dim"]


def run_chain(key, position, log_density, *, init, step, warm_up, draws, target, metric) -> Draws:
    """One chain: tune, freeze, draw."""
    tune_key, draw_key = jax.random.split(key)
    state = init(position, log_density)
    tuned = tune(tune_key, state, log_density, step, steps=warm_up, target=target, metric=metric)

    def draw(state, key):
        state, info = step(key, state, log_density, tuned.step_size, tuned.inverse_mass)
        return state, (state.position, info)

    _, (positions, info) = jax.lax.scan(draw, tuned.state, jax.random.split(draw_key, draws))
    return Draws(positions, info, tuned.step_size, tuned.inverse_mass)


@partial(
    jax.jit, static_argnames=("log_density", "init", "step", "warm_up", "draws", "target", "metric")
)
def run_chains(
    key: PRNGKeyArray,
    positions: Float[Array, "chain dim"],
    log_density: LogDensity,
    *,
    init: Callable = nuts.init,
    step: Callable = nuts.step,
    warm_up: int = 1000,
    draws: int = 1000,
    target: float = 0.8,
    metric: MetricName = "diagonal",
) -> Draws:
    """All chains in one program."""
    chains = len(positions)
    devices = max(n for n in range(1, jax.local_device_count() + 1) if chains % n == 0)
    one = partial(
        run_chain,
        log_density=log_density,
        init=init,
        step=step,
        warm_up=warm_up,
        draws=draws,
        target=target,
        metric=metric,
    )
    on_a_device = lambda keys, positions: jax.lax.map(lambda xs: one(*xs), (keys, positions))
    mesh = jax.make_mesh(
        (devices,),
        ("chain",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.local_devices()[:devices],
    )
    spec = jax.sharding.PartitionSpec("chain")
    spread = jax.shard_map(on_a_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return spread(jax.random.split(key, chains), positions)
