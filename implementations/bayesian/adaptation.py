"""Adaptation: during warm-up a chain learns its step size and its metric; then both are frozen.

    step size   dual averaging on its logarithm x, after t steps with errors e = target - acceptance
                mean <- mean + (e - mean) / (t + 10)       x = center - sqrt(t) / 0.05 · mean
                average <- t^-0.75 x + (1 - t^-0.75) average,  which is what is used afterwards
    metric      diagonal   inverse mass = variance of the draws
                dense      inverse mass = covariance of the draws
                fisher     inverse mass = sqrt(variance of the draws / variance of their gradients)

The metric is estimated in windows of doubling length, each from nothing, because early draws are no
draws of the posterior; after each the step size starts anew. The Fisher diagonal minimizes the
distance between gradients of the posterior and of a normal; for a normal with independent
coordinates it is exact after two draws, since gradient = -(position - mean) / variance.

Paper   dual averaging: Nesterov 2009; Hoffman & Gelman 2014, arXiv:1111.4246, section 3.2
        windows and shrinkage: Stan reference manual, "HMC algorithm parameters"
        variances in one pass: Welford 1962, doi:10.1080/00401706.1962.10490022
        fisher: Seyboldt, Carlson & Carpenter 2026, "Preconditioning HMC by minimizing Fisher
        divergence" (nutpie)
Run     uv run python implementations/bayesian/adaptation.py
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

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


class Moments(NamedTuple):
    """Count, mean and summed squared deviations of what was seen."""

    count: Float[Array, ""]
    mean: Float[Array, " dim"]
    squares: Metric


def no_moments(like: Float[Array, " dim"], dense: bool = False) -> Moments:
    """Nothing seen yet."""
    zeros = jnp.zeros_like(like)
    return Moments(zeros[:0].sum(), zeros, jnp.outer(zeros, zeros) if dense else zeros)


def update_moments(moments: Moments, x: Float[Array, " dim"]) -> Moments:
    """Welford's update: no difference of large numbers, whatever the mean."""
    count = moments.count + 1
    before = x - moments.mean
    mean = moments.mean + before / count
    after = x - mean
    product = jnp.outer(before, after) if moments.squares.ndim == 2 else before * after
    return Moments(count, mean, moments.squares + product)


def variance(moments: Moments) -> Metric:
    """Squares / (count - 1)."""
    return moments.squares / (moments.count - 1)


def shrunk(positions: Moments, gradients: Moments) -> Metric:
    """The (co)variance, drawn to 0.001 with the weight of five draws (Stan)."""
    del gradients
    keep = positions.count / (positions.count + 5)
    estimate = variance(positions)
    one = jnp.ones_like(estimate) if estimate.ndim == 1 else jnp.eye(len(estimate))
    return keep * estimate + (1 - keep) * 1e-3 * one.astype(estimate.dtype)


def fisher(positions: Moments, gradients: Moments) -> Metric:
    """sqrt(variance of positions / variance of gradients), one where either is nothing."""
    ratio = jnp.sqrt(variance(positions) / variance(gradients))
    return jnp.where(jnp.isfinite(ratio) & (ratio > 0), ratio, 1.0)


METRICS: dict[str, Callable[[Moments, Moments], Metric]] = {
    "diagonal": shrunk,
    "dense": shrunk,
    "fisher": fisher,
}


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


def schedule(warm_up: int) -> tuple[np.ndarray, np.ndarray]:
    """For every step of the warm-up: is its draw used for the metric, and does a window end?"""
    collects, ends = np.zeros((2, warm_up), bool)
    for start, stop in windows(warm_up):
        collects[start:stop], ends[stop - 1] = True, True
    return collects, ends


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

    def accepts(step_size: Float[Array, ""]):
        end = integrate(start, log_density, step_size, scale)
        return energy(start) - energy(end) > np.log(0.8)  # NaN is not

    grow = accepts(step_size)
    factor = jnp.where(grow, 2.0, 0.5).astype(step_size.dtype)

    def going_on(step_size: Float[Array, ""]):
        inside = (step_size > 1e3 * tiny) & (step_size < huge / 1e3)
        return inside & (accepts(step_size) == grow)

    return jax.lax.while_loop(going_on, lambda step_size: step_size * factor, step_size)


class Tuned(NamedTuple):
    """What a warm-up has learnt."""

    state: NamedTuple
    step_size: Float[Array, ""]
    inverse_mass: Metric


def warm_up(
    key: PRNGKeyArray,
    state: NamedTuple,
    log_density: LogDensity,
    step: Callable,
    *,
    steps: int,
    target: float = 0.8,
    metric: MetricName = "diagonal",
    step_size: float = 1.0,
) -> Tuned:
    """Run `steps` steps and tune the step size to the target acceptance, and the metric.

    Args:
        state: of a sampler; without a `gradient` it can have no Fisher metric, and its first step
            size is used as it is.
        step: the sampler's, called with (key, state, log_density, step_size, inverse_mass).
    """
    position = state.position
    has_gradient = hasattr(state, "gradient")
    dense = metric == "dense"
    empty = no_moments(position, dense)
    unit = jnp.eye(len(position), dtype=position.dtype) if dense else jnp.ones_like(position)

    def search(key, state, step_size, inverse_mass):
        if not has_gradient:
            return step_size
        return find_step_size(key, state, log_density, step_size, inverse_mass)

    def window_ends(key, state, averaging, positions, gradients, inverse_mass):
        inverse_mass = METRICS[metric](positions, gradients)
        step_size = search(key, state, jnp.exp(averaging.log_average), inverse_mass)
        return start_averaging(step_size), empty, empty, inverse_mass

    def window_goes_on(key, state, *tuning):
        return tuning

    def one_step(carry, xs):
        state, averaging, positions, gradients, inverse_mass = carry
        key, collects, ends = xs
        step_key, search_key = jax.random.split(key)
        step_size = jnp.exp(averaging.log_step)
        state, info = step(step_key, state, log_density, step_size, inverse_mass)
        averaging = update_averaging(averaging, info.acceptance, target)
        seen = lambda moments, x: jax.tree.map(  # noqa: E731
            lambda new, old: jnp.where(collects, new, old), update_moments(moments, x), moments
        )
        positions = seen(positions, state.position)
        if has_gradient and metric == "fisher":
            gradients = seen(gradients, state.gradient)
        tuning = (averaging, positions, gradients, inverse_mass)
        tuning = jax.lax.cond(ends, window_ends, window_goes_on, search_key, state, *tuning)
        return (state, *tuning), None

    key, search_key = jax.random.split(key)
    first = search(search_key, state, jnp.array(step_size, position.dtype), unit)
    collects, ends = schedule(steps)
    start = (state, start_averaging(first), empty, empty, unit)
    xs = (jax.random.split(key, steps), collects, ends)
    (state, averaging, _, _, inverse_mass), _ = jax.lax.scan(one_step, start, xs)
    final = averaging.log_average if steps else averaging.log_step
    return Tuned(state, jnp.exp(final), inverse_mass)


def main() -> None:
    pass


if __name__ == "__main__":
    main()
