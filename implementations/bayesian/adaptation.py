"""Adaptation: during warm-up a chain learns its step size and its metric; then both are frozen.

    step size   dual averaging on its logarithm x, after t steps with errors e = target - acceptance
                mean <- mean + (e - mean) / (t + 10)       x = center - sqrt(t) / 0.05 · mean
                average <- t^-0.75 x + (1 - t^-0.75) average,  which is what is used afterwards
    metric      from the moments of the draws in a window (moments.py)

Windows double in length, and each begins from nothing, because early draws are no draws of the
posterior; after each the step size starts anew.

Paper   dual averaging: Nesterov 2009; Hoffman & Gelman 2014, arXiv:1111.4246, section 3.2
        windows: Stan reference manual, "HMC algorithm parameters"
Run     uv run python implementations/bayesian/adaptation.py
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from implementations.bayesian.hmc import State
from implementations.bayesian.integrators import (
    LogDensity,
    Metric,
    Phase,
    StepSize,
    energy,
    integrate,
    scale_of,
)
from implementations.bayesian.moments import METRICS, Moments, no_moments, update_moments

MetricName = Literal["diagonal", "dense", "fisher"]


class DualAveraging(NamedTuple):
    """A search for the step size at which the acceptance is as wanted."""

    steps: Float[Array, ""]
    error: Float[Array, ""]
    """mean of target - acceptance, early steps counting less"""
    log_step: Float[Array, ""]
    """the next step's, noisy so as to explore"""
    log_average: Float[Array, ""]
    """the answer"""
    center: Float[Array, ""]
    """what log_step is drawn to: ten times the first step size, so that large steps are tried"""


def start_averaging(step_size: StepSize) -> DualAveraging:
    """A search that begins at `step_size`."""
    log_step = jnp.log(step_size)
    zero = jnp.zeros_like(log_step)
    return DualAveraging(zero, zero, log_step, zero, log_step + np.log(10).astype(zero.dtype))


def update_averaging(
    state: DualAveraging, acceptance: Float[Array, ""], target: float
) -> DualAveraging:
    """Equation 6 of Hoffman & Gelman 2014, with their constants."""
    steps = state.steps + 1
    error = state.error + (target - acceptance - state.error) / (steps + 10)
    log_step = state.center - jnp.sqrt(steps) / 0.05 * error
    weight = steps**-0.75
    log_average = weight * log_step + (1 - weight) * state.log_average
    return DualAveraging(steps, error, log_step, log_average, state.center)


def windows(warm_up: int) -> list[tuple[int, int]]:
    """First step and end of each window in which the metric is estimated (Stan's schedule).

    75 steps come before the first and 50 follow the last, for the step size alone; the windows'
    lengths are 25, 50, 100, ..., and the last takes what is left.
    """
    if warm_up < 20:
        return []
    before, first, after = 75, 25, 50
    if before + first + after > warm_up:
        before, after = int(0.15 * warm_up), int(0.1 * warm_up)
        first = warm_up - before - after
    found, start, length, end = [], before, first, warm_up - after
    while start < end:
        stop = start + length if start + 3 * length <= end else end
        found.append((start, stop))
        start, length = stop, 2 * length
    return found


STEP_SIZE_ONLY, COLLECTS, WINDOW_ENDS, SETTLES, FROZEN = range(5)


def schedule(warm_up: int, draws: int) -> Int[np.ndarray, " step"]:
    """What each step of a run does for the tuning: one of the five words above."""
    phases = np.full(warm_up + draws, STEP_SIZE_ONLY)
    for start, stop in windows(warm_up):
        phases[start:stop] = COLLECTS
        phases[stop - 1] = WINDOW_ENDS
    phases[warm_up:] = FROZEN
    if warm_up:
        phases[warm_up - 1] = SETTLES
    return phases


def find_step_size(
    key: PRNGKeyArray,
    state: State,
    log_density: LogDensity,
    step_size: Float[Array, ""],
    inverse_mass: Metric,
) -> Float[Array, ""]:
    """Double or halve until one leapfrog step's acceptance crosses 0.8 (algorithm 4 of the paper,
    with Stan's 0.8)."""
    momentum = jax.random.normal(key, state.position.shape, state.position.dtype)
    start = Phase(state.position, momentum, state.log_density, state.gradient)
    scale = scale_of(inverse_mass)
    tiny, huge = jnp.finfo(step_size.dtype).tiny, jnp.finfo(step_size.dtype).max

    def going_on(carry: tuple) -> Bool[Array, ""]:
        step_size, _, _, crossed = carry
        return ~crossed & (step_size > 1e3 * tiny) & (step_size < huge / 1e3)

    def try_out(carry: tuple) -> tuple:  # the only gradient, since it is compiled where it stands
        step_size, grows, first, _ = carry
        end = integrate(start, log_density, step_size, scale)
        accepts = energy(start) - energy(end) > np.log(0.8)  # NaN does not
        grows = jnp.where(first, accepts, grows)
        crossed = accepts != grows
        factor = jnp.where(crossed, 1.0, jnp.where(grows, 2.0, 0.5)).astype(step_size.dtype)
        return step_size * factor, grows, jnp.array(False), crossed

    first, false = jnp.array(True), jnp.array(False)
    return jax.lax.while_loop(going_on, try_out, (step_size, false, first, false))[0]


class Tuning(NamedTuple):
    """What a chain has learnt so far, and what it needs to learn more."""

    averaging: DualAveraging
    inverse_mass: Metric
    positions: Moments
    gradients: Moments


def start_tuning(
    key: PRNGKeyArray, state: tuple, log_density: LogDensity, step_size: float, metric: str
) -> Tuning:
    """A unit metric, and the first step size that one leapfrog step finds from `step_size`.

    A state without a gradient cannot look for one: its sampler starts at `step_size` itself.

    Raises:
        ValueError: the metric has no such name, or needs gradients that the sampler has not.
    """
    if metric not in METRICS:
        raise ValueError(f"the metric is one of {', '.join(METRICS)}, got {metric!r}")
    if metric == "fisher" and not hasattr(state, "gradient"):
        raise ValueError("the Fisher metric needs gradients, which this sampler does not keep")
    dense, position = metric == "dense", state.position
    unit = jnp.eye(len(position), dtype=position.dtype) if dense else jnp.ones_like(position)
    first = search(key, state, log_density, jnp.array(step_size, position.dtype), unit)
    empty = no_moments(position, dense)
    return Tuning(start_averaging(first), unit, empty, no_moments(position))


def search(
    key: PRNGKeyArray,
    state: tuple,
    log_density: LogDensity,
    step_size: Float[Array, ""],
    inverse_mass: Metric,
) -> Float[Array, ""]:
    """`find_step_size` where the state has a gradient."""
    if not hasattr(state, "gradient"):
        return step_size
    return find_step_size(key, state, log_density, step_size, inverse_mass)


def tune(
    key: PRNGKeyArray,
    tuning: Tuning,
    state: tuple,
    log_density: LogDensity,
    acceptance: Float[Array, ""],
    phase: Int[Array, ""],
    *,
    target: float,
    metric: str,
) -> Tuning:
    """Learn from one step of the warm-up; `phase` is the step's entry in `schedule`."""
    averaging = update_averaging(tuning.averaging, acceptance, target)
    positions, gradients = tuning.positions, tuning.gradients
    collects = (phase == COLLECTS) | (phase == WINDOW_ENDS)
    positions = select(collects, update_moments(positions, state.position), positions)
    if metric == "fisher":
        gradients = select(collects, update_moments(gradients, state.gradient), gradients)

    def next_window() -> Tuning:
        inverse_mass = METRICS[metric](positions, gradients)
        step_size = jnp.exp(averaging.log_average)
        step_size = search(key, state, log_density, step_size, inverse_mass)
        nothing = jax.tree.map(jnp.zeros_like, (positions, gradients))
        return Tuning(start_averaging(step_size), inverse_mass, *nothing)

    same_window = Tuning(averaging, tuning.inverse_mass, positions, gradients)
    tuning = jax.lax.cond(phase == WINDOW_ENDS, next_window, lambda: same_window)
    averaging = tuning.averaging
    settled = averaging._replace(log_step=averaging.log_average)
    return tuning._replace(averaging=select(phase == SETTLES, settled, averaging))


def select(condition: Bool[Array, ""], new: tuple, old: tuple) -> tuple:
    """`new` where the condition holds, field by field."""
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)


def main() -> None:
    print("windows of 1000 steps of warm-up:", windows(1000))
    print("acceptance is exp(-step size²), wanted is 0.8: what dual averaging makes of it")
    state, rng = start_averaging(jnp.array(0.1)), np.random.default_rng(0)
    for step in range(1, 401):
        noisy = np.clip(np.exp(-jnp.exp(2 * state.log_step)) + 0.2 * rng.normal(), 0, 1)
        state = update_averaging(state, jnp.array(noisy), 0.8)
        if step in (1, 5, 20, 100, 400):
            tried, average = jnp.exp(state.log_step), jnp.exp(state.log_average)
            print(f"  after {step:3} steps: tries {tried:6.3f}, average {average:.3f}")
    print(f"  exactly right: {np.sqrt(-np.log(0.8)):.3f}")


if __name__ == "__main__":
    main()
