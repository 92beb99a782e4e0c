"""Transforms: a constrained parameter as a function of free numbers, so that a sampler
may go anywhere.

    log p(free) = log p(constrained(free)) + log |det d constrained / d free|

Without the second term the sampler would draw from another density: the same height over stretched
ground is more mass. The simplex and the correlation matrix have fewer free numbers than entries;
the determinant is that of as many entries as there are free numbers.

Paper   Stan Reference Manual, chapter "Constraint Transforms"; Lewandowski, Kurowicka & Joe 2009
        (correlation matrices), doi:10.1016/j.jmva.2009.04.008
Run     uv run python implementations/bayesian/transforms.py
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Shape = tuple[int, ...]


class Transform(NamedTuple):
    """A smooth one-to-one map from free numbers to a constrained parameter."""

    constrain: Callable[[Float[Array, "..."]], Float[Array, "..."]]
    unconstrain: Callable[[Float[Array, "..."]], Float[Array, "..."]]
    """its inverse"""
    log_det: Callable[[Float[Array, "..."]], Float[Array, ""]]
    """log |det d constrained / d free| at the free numbers, summed over all of them"""
    free_shape: Callable[[Shape], Shape] = lambda shape: shape
    """shape of the free numbers, by that of the parameter"""


REAL = Transform(lambda free: free, lambda value: value, lambda free: jnp.zeros((), free.dtype))
POSITIVE = Transform(jnp.exp, jnp.log, jnp.sum)


def interval(low: float, high: float) -> Transform:
    """Numbers strictly between `low` and `high`: low + (high - low) sigmoid(free).

    Raises:
        ValueError: the interval is empty.
    """
    if not low < high:
        raise ValueError(f"an interval needs low < high, got {low} and {high}")

    def log_det(free: Float[Array, "..."]) -> Float[Array, ""]:
        # The slope of the sigmoid is sigmoid(x) sigmoid(-x); in logs neither factor underflows.
        slopes = jax.nn.log_sigmoid(free) + jax.nn.log_sigmoid(-free)
        return jnp.sum(slopes + jnp.log(high - low))

    return Transform(
        lambda free: low + (high - low) * jax.nn.sigmoid(free),
        lambda value: jnp.log(value - low) - jnp.log(high - value),
        log_det,
    )


def increasing(free: Float[Array, " entry"]) -> Float[Array, " entry"]:
    """An ordered vector: the first number as it is, then steps exp(free) upward."""
    return jnp.cumsum(jnp.concatenate([free[:1], jnp.exp(free[1:])]))


ORDERED = Transform(
    increasing,
    lambda value: jnp.concatenate([value[:1], jnp.log(jnp.diff(value))]),
    lambda free: jnp.sum(free[1:]),  # the Jacobian is triangular, with 1 and the steps on it
)


def shares(free: Float[Array, " broken"]) -> Float[Array, " broken"]:
    """The logits of what is broken off; all zeros break a stick of K into K equal parts."""
    return free - jnp.log(jnp.arange(free.shape[0], 0, -1, dtype=free.dtype))


def break_stick(free: Float[Array, " broken"]) -> Float[Array, " entry"]:
    """A point of the simplex: break off a share of what is left, K - 1 times."""
    logit = shares(free)
    left = jnp.concatenate([jnp.ones(1, free.dtype), jnp.cumprod(jax.nn.sigmoid(-logit))])
    return left * jnp.append(jax.nn.sigmoid(logit), 1.0)


def mend_stick(value: Float[Array, " entry"]) -> Float[Array, " broken"]:
    """The inverse: each entry against the sum of those after it."""
    after = jnp.cumsum(value[::-1])[::-1][1:]
    logit = jnp.log(value[:-1]) - jnp.log(after)
    return logit + jnp.log(jnp.arange(logit.shape[0], 0, -1, dtype=value.dtype))


def stick_log_det(free: Float[Array, " broken"]) -> Float[Array, ""]:
    """Triangular again: entry k has slope left_k sigmoid'(logit_k)."""
    here, on = jax.nn.log_sigmoid(shares(free)), jax.nn.log_sigmoid(-shares(free))
    left = jnp.cumsum(on) - on
    return jnp.sum(left + here + on)


SIMPLEX = Transform(
    break_stick, mend_stick, stick_log_det, lambda shape: (*shape[:-1], shape[-1] - 1)
)


def partial_correlations(free: Float[Array, " pair"]) -> Float[Array, "row row"]:
    """tanh(free), below the diagonal, row by row: correlations given the columns before."""
    rows = int((1 + (1 + 8 * free.shape[0]) ** 0.5) / 2)
    return jnp.zeros((rows, rows), free.dtype).at[jnp.tril_indices(rows, -1)].set(jnp.tanh(free))


def left_in_rows(partial: Float[Array, "row row"]) -> Float[Array, "row row"]:
    """log of the length that a row of length 1 has left, before each of its entries."""
    after = jnp.cumsum(0.5 * jnp.log1p(-(partial**2)), axis=1)
    return jnp.pad(after, ((0, 0), (1, 0)))[:, :-1]


def correlation_factor(free: Float[Array, " pair"]) -> Float[Array, "row row"]:
    """The lower triangular L of a correlation matrix L Lᵀ: its rows have length 1."""
    partial = partial_correlations(free)
    return (partial + jnp.eye(len(partial), dtype=free.dtype)) * jnp.exp(left_in_rows(partial))


def free_of_factor(factor: Float[Array, "row row"]) -> Float[Array, " pair"]:
    """The inverse: each entry over the length that its row has left."""
    below = jnp.tril_indices(len(factor), -1)
    left = jnp.sqrt(1 - jnp.pad(jnp.cumsum(factor**2, axis=1), ((0, 0), (1, 0)))[:, :-1])
    return jnp.arctanh(factor[below] / left[below])


def factor_log_det(free: Float[Array, " pair"]) -> Float[Array, ""]:
    """Entry by entry: the length left, times the slope 1 - tanh² of the partial correlation."""
    partial = partial_correlations(free)
    below = jnp.tril_indices(len(partial), -1)
    return jnp.sum((left_in_rows(partial) + jnp.log1p(-(partial**2)))[below])


CORRELATION_FACTOR = Transform(
    correlation_factor,
    free_of_factor,
    factor_log_det,
    lambda shape: (shape[-1] * (shape[-1] - 1) // 2,),
)


def main() -> None:
    draws = jax.random.normal(jax.random.key(0), (3,))
    factor = correlation_factor(draws)
    for name, transform in {
        "positive": POSITIVE,
        "between 0 and 2": interval(0.0, 2.0),
        "ordered": ORDERED,
        "simplex": SIMPLEX,
    }.items():
        print(f"{name:18}", transform.constrain(draws), f"log det {transform.log_det(draws):.3f}")
    print("correlation matrix\n", factor @ factor.T)


if __name__ == "__main__":
    main()
