"""Moments: mean and variance in one pass, and the metric that they propose.

    diagonal   inverse mass = variance of the draws
    dense      inverse mass = covariance of the draws
    fisher     inverse mass = sqrt(variance of the draws / variance of their gradients)

The Fisher diagonal minimizes the distance between the gradients of the posterior and those of a
normal. For a normal with independent coordinates it is exact after two draws, since there
gradient = -(position - mean) / variance, and the deviations cancel.

Paper   variances in one pass: Welford 1962, doi:10.1080/00401706.1962.10490022
        shrinkage: Stan reference manual, "HMC algorithm parameters"
        fisher: Seyboldt, Carlson & Carpenter 2026, arXiv:2603.18845 (nutpie)
Shapes  draws, gradients [dim]    metric [dim] or [dim, dim]
Run     uv run python implementations/bayesian/moments.py
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from implementations.bayesian.integrators import Metric


class Moments(NamedTuple):
    """Count, mean and summed squared deviations of what was seen."""

    count: Float[Array, ""]
    mean: Float[Array, " dim"]
    squares: Metric


def no_moments(like: Float[Array, " dim"], dense: bool = False) -> Moments:
    """Nothing seen yet."""
    zeros = jnp.zeros_like(like)
    squares = jnp.outer(zeros, zeros) if dense else zeros
    return Moments(jnp.zeros((), like.dtype), zeros, squares)


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


def main() -> None:
    scales = jnp.array([0.1, 1.0, 10.0])
    print("a normal with variances 0.01, 1, 100: what 50 draws from it tell of the inverse mass")
    draws = scales * jax.random.normal(jax.random.key(0), (50, 3))
    positions = gradients = no_moments(scales)
    covariance = no_moments(scales, dense=True)
    for draw in draws:
        positions, covariance = update_moments(positions, draw), update_moments(covariance, draw)
        gradients = update_moments(gradients, -draw / scales**2)
    print("  diagonal", shrunk(positions, gradients))
    print("  dense   ", jnp.diag(shrunk(covariance, gradients)), "on the diagonal")
    print("  fisher  ", fisher(positions, gradients))


if __name__ == "__main__":
    main()
