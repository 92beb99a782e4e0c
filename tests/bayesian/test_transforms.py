"""Transforms are NumPyro's, and their log-determinants those of the dense Jacobian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.distributions import biject_to, constraints

from implementations.bayesian.transforms import (
    CORRELATION_FACTOR,
    ORDERED,
    POSITIVE,
    REAL,
    SIMPLEX,
    interval,
)

CASES = {  # transform, NumPyro's constraint, shape of the parameter
    "real": (REAL, constraints.real, (3,)),
    "positive": (POSITIVE, constraints.positive, (4,)),
    "interval": (interval(-2.0, 5.0), constraints.interval(-2.0, 5.0), (2, 3)),
    "ordered": (ORDERED, constraints.ordered_vector, (5,)),
    "one is ordered": (ORDERED, constraints.ordered_vector, (1,)),
    "simplex": (SIMPLEX, constraints.simplex, (6,)),
    "correlation": (CORRELATION_FACTOR, constraints.corr_cholesky, (4, 4)),
}
# The entries that are as many as the free numbers; the others follow from them.
INDEPENDENT = {
    "simplex": lambda value: value[:-1],
    "correlation": lambda value: value[jnp.tril_indices(4, -1)],
}


@pytest.fixture(params=CASES)
def case(request):
    """Name, transform, NumPyro's transform and three random points, in float64."""
    with jax.enable_x64(True):
        transform, constraint, shape = CASES[request.param]
        size = (3, *transform.free_shape(shape))
        points = jnp.asarray(np.random.default_rng(0).normal(0, 1.5, size=size))
        yield request.param, transform, biject_to(constraint), points


def test_equals_numpyro(case):
    """Values and log-determinants at rtol 1e-10 (both are a handful of roundings away)."""
    _, transform, theirs, points = case

    @jax.jit
    @jax.vmap
    def both(point):
        log_det = jnp.sum(theirs.log_abs_det_jacobian(point, theirs(point)))
        return (transform.constrain(point), transform.log_det(point)), (theirs(point), log_det)

    ours, expected = both(points)
    for value, want in zip(ours, expected, strict=True):
        np.testing.assert_allclose(value, want, rtol=1e-10, atol=1e-12)


def test_log_det_is_that_of_the_dense_jacobian(case):
    """By automatic differentiation and an LU decomposition, rtol 1e-10."""
    name, transform, _, points = case
    entries = INDEPENDENT.get(name, lambda value: value)

    def flat(free):
        return entries(transform.constrain(free.reshape(points.shape[1:]))).ravel()

    jacobians = jax.jit(jax.vmap(jax.jacobian(flat)))(points.reshape(len(points), -1))
    _, log_dets = np.linalg.slogdet(jacobians)
    ours = jax.jit(jax.vmap(transform.log_det))(points)
    np.testing.assert_allclose(ours, log_dets, rtol=1e-10, atol=1e-12)


def test_unconstrain_goes_back(case):
    """rtol 1e-9: arctanh and log lose a few digits of a value close to its bound."""
    _, transform, _, points = case
    back = jax.jit(jax.vmap(lambda point: transform.unconstrain(transform.constrain(point))))
    np.testing.assert_allclose(back(points), points, rtol=1e-9, atol=1e-9)


def test_values_keep_their_constraint():
    point = jnp.array([-8.0, 0.0, 8.0])
    values = {name: jax.jit(case[0].constrain)(point) for name, case in CASES.items()}
    assert (values["positive"] > 0).all()
    assert (values["interval"] >= -2).all() and (values["interval"] <= 5).all()
    assert (jnp.diff(values["ordered"]) >= 0).all()
    assert abs(values["simplex"].sum() - 1) < 1e-6
    lengths = (values["correlation"] ** 2).sum(1)
    np.testing.assert_allclose(lengths, 1.0, rtol=1e-6)


def test_log_det_of_the_far_interval_is_finite():
    """log(s (1 - s)) would be -inf where float32 rounds the sigmoid s to 1."""
    log_det = interval(0.0, 1.0).log_det(jnp.array([40.0]))
    np.testing.assert_allclose(log_det, -40.0, rtol=1e-6)


def test_zero_breaks_the_stick_evenly():
    np.testing.assert_allclose(SIMPLEX.constrain(jnp.zeros(3)), np.full(4, 0.25), rtol=1e-6)


def test_an_empty_interval_is_refused():
    with pytest.raises(ValueError, match=r"needs low < high, got 3\.0 and 2\.0"):
        interval(3.0, 2.0)
