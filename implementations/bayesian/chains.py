"""Chains: warm-up and draws of every chain in one compiled program, each chain on its own core.

    chain    start -> warm-up, which tunes step size and metric -> both frozen -> draws
    chains   one program on every device (host_devices.py); a device runs its chains in turn

Chains that run in lock-step under vmap all wait for the longest trajectory of each draw; chains on
devices of their own wait for nobody. Warm-up and draws are one loop, so the sampler is compiled
once, and nothing returns to Python before the end.

Paper   Vehtari et al. 2021, arXiv:1903.08008 (why several chains); Lao & Louf 2020, "BlackJAX"
Shapes  position [chain, draw, dim]
Run     uv run python implementations/bayesian/chains.py
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from tqdm import tqdm

from implementations.bayesian.adaptation import (
    FROZEN,
    MetricName,
    schedule,
    start_tuning,
    tune,
)
from implementations.bayesian.integrators import LogDensity
from implementations.bayesian.nuts import init as start_nuts
from implementations.bayesian.nuts import step as nuts_step


class Draws(NamedTuple):
    """The raw arrays of a run, its warm-up left out."""

    position: Float[Array, "chain draw dim"]
    info: tuple
    """the sampler's Info, every field [chain, draw]"""
    step_size: Float[Array, " chain"]
    inverse_mass: Float[Array, "chain dim"] | Float[Array, "chain dim dim"]


class Progress:
    """A bar that compiled code moves: chains report every so many steps."""

    bar: tqdm | None = None

    def tick(self, steps: Int[Array, ""] | np.ndarray) -> None:
        """`steps` more are done."""
        if self.bar is not None:
            self.bar.update(int(steps))


PROGRESS = Progress()


def run_chain(
    key: PRNGKeyArray,
    position: Float[Array, " dim"],
    log_density: LogDensity,
    *,
    init: Callable = start_nuts,
    step: Callable = nuts_step,
    warm_up: int = 1000,
    draws: int = 1000,
    target: float = 0.8,
    metric: MetricName = "diagonal",
    step_size: float = 1.0,
    progress: bool = False,
) -> Draws:
    """One chain, as a pure function to be compiled, mapped or vmapped; settings as in `sample`."""
    key, tune_key = jax.random.split(key)
    state = init(position, log_density)
    tuning = start_tuning(tune_key, state, log_density, step_size, metric)
    learn = partial(tune, target=target, metric=metric)
    every = max(1, (warm_up + draws) // 100)

    def one_step(carry, xs):
        (state, tuning), (key, phase, count) = carry, xs
        step_key, tune_key = jax.random.split(key)
        current = jnp.exp(tuning.averaging.log_step)
        state, info = step(step_key, state, log_density, current, tuning.inverse_mass)
        tuning = jax.lax.cond(
            phase == FROZEN,
            lambda: tuning,
            lambda: learn(tune_key, tuning, state, log_density, info.acceptance, phase),
        )
        if progress:
            tell = partial(jax.debug.callback, PROGRESS.tick, every)
            jax.lax.cond(count % every == 0, tell, lambda: None)
        return (state, tuning), (state.position, info)

    steps = warm_up + draws
    keys = jax.random.split(key, steps)
    xs = (keys, schedule(warm_up, draws), np.arange(1, steps + 1))
    (_, tuning), seen = jax.lax.scan(one_step, (state, tuning), xs)
    position, info = jax.tree.map(lambda x: x[warm_up:], seen)
    return Draws(position, info, jnp.exp(tuning.averaging.log_step), tuning.inverse_mass)


STATIC = ("log_density", "init", "step", "warm_up", "draws", "target", "metric", "step_size")


@partial(jax.jit, static_argnames=(*STATIC, "progress"))
def run_chains(
    key: PRNGKeyArray,
    positions: Float[Array, "chain dim"],
    log_density: LogDensity,
    **settings: Any,
) -> Draws:
    """A chain from each position, spread over the devices; settings are those of `run_chain`.

    Compiled once for a log-density and its settings, and kept.
    """

    def chain(key_and_position: tuple) -> Draws:
        return run_chain(*key_and_position, log_density, **settings)

    chains = len(positions)
    return spread(chain, chains)((jax.random.split(key, chains), positions))


def spread(chain: Callable[[PyTree], PyTree], chains: int) -> Callable[[PyTree], PyTree]:
    """The function for arrays with a leading axis of `chains`, as many at a time as devices.

    The number of devices used divides the number of chains.
    """
    devices = max(n for n in range(1, jax.local_device_count() + 1) if chains % n == 0)
    local = jax.local_devices()[:devices]
    mesh = jax.make_mesh((devices,), ("chain",), axis_types=(AxisType.Auto,), devices=local)
    spec = PartitionSpec("chain")
    return jax.shard_map(
        partial(jax.lax.map, chain), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )


def main() -> None:
    from implementations.lab.host_devices import use_host_devices

    use_host_devices(2)
    positions = jnp.zeros((4, 10))

    def log_density(position):
        return -0.5 * position @ position

    print("4 chains of 1000 warm-up steps and 1000 draws from a standard normal in 10 dimensions")
    for run in ("the first run, compiling", "the second"):
        started = time.perf_counter()
        draws = run_chains(jax.random.key(0), positions, log_density)
        jax.block_until_ready(draws)
        print(f"  {run:25} {time.perf_counter() - started:6.3f} s")
    print(f"  step sizes {draws.step_size}, on {jax.local_device_count()} devices")


if __name__ == "__main__":
    main()
