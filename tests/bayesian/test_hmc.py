"""One flight of the particle: by hand, in NumPy, and what it must leave as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from implementations.bayesian.hmc import DIVERGENCE, fly, init, step
from implementations.bayesian.hmc_numpy import step as numpy_step
from implementations.bayesian.integrators import YOSHIDA


def normal(position):
    return -0.5 * position @ position


def bent(position):
    a, b = position
    return -(a**4) / 4 - (b - a**2) ** 2 / 2


@pytest.mark.parametrize("step_size, steps", [(0.1, 1), (0.5, 7), (0.9, 4)])
def test_equals_numpy_step_for_step(step_size, steps):
    """40 steps in a row in float64, from the same momenta and uniforms; some are refused."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        ours = jax.jit(lambda *a: fly(*a, bent, step_size, jnp.ones(2), steps))
        gradient = jax.jit(jax.grad(bent))
        start = jax.jit(lambda position: init(position, bent))
        position, kept = np.array([0.5, -0.5]), []
        for _ in range(40):
            momentum, uniform = rng.normal(size=2), rng.uniform()
            state = start(jnp.asarray(position))  # rounding must not grow from step to step
            state, info = ours(jnp.asarray(momentum), jnp.asarray(uniform), state)
            before = position
            position, rate = numpy_step(
                momentum,
                uniform,
                position,
                lambda q: float(bent(q)),
                lambda q: np.asarray(gradient(q)),
                step_size,
                steps,
            )
            np.testing.assert_allclose(state.position, position, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(state.gradient, gradient(position), rtol=1e-8, atol=1e-10)
            np.testing.assert_allclose(info.acceptance, rate, rtol=1e-9, atol=1e-12)
            assert info.accepted == (position != before).any()
            kept.append(info.accepted)
        assert any(kept)
        assert step_size < 0.9 or not all(kept)


def test_one_step_worked_by_hand():
    """q = 1, p = 1/2, ε = 1 on a standard normal: p -> 0, q -> 1, p -> -1/2; H stays 5/8.
    With ε = 2: p -> -1/2, q -> 0, p -> -1/2, so H falls from 5/8 to 1/8."""
    state = init(jnp.array([1.0]), normal)
    for step_size, position, after in ((1.0, 1.0, 0.625), (2.0, 0.0, 0.125)):
        new, info = fly(jnp.array([0.5]), jnp.array(0.99), state, normal, step_size, jnp.ones(1), 1)
        assert (new.position[0], info.energy, info.acceptance) == (position, after, 1.0)


def test_a_rise_of_energy_is_accepted_with_its_exponential():
    """q = 0, p = 1, ε = 1: q -> 1, p -> 1/2, so H rises from 1/2 to 5/8, and exp(-1/8) = 0.8825."""
    state, momentum = init(jnp.zeros(1), normal), jnp.ones(1)
    for uniform, position in ((0.882, 1.0), (0.883, 0.0)):
        new, info = fly(momentum, jnp.array(uniform), state, normal, 1.0, jnp.ones(1), 1)
        np.testing.assert_allclose(info.acceptance, np.exp(-1 / 8), rtol=1e-6)
        assert new.position[0] == position
        assert info.energy == (0.625 if position else 0.5)


def test_a_metric_is_a_change_of_units():
    """Sampling A x with metric A Aᵀ is sampling x with the unit metric, momenta being the same."""
    with jax.enable_x64(True):
        root = jnp.asarray([[2.0, 0.0], [-1.0, 0.5]])
        start, momentum = jnp.array([0.3, -0.7]), jnp.array([1.1, 0.4])
        plain, _ = fly(momentum, jnp.array(0.0), init(start, bent), bent, 0.3, jnp.ones(2), 5)

        def stretched(position):
            return bent(jnp.linalg.solve(root, position))

        state = init(root @ start, stretched)
        new, _ = fly(momentum, jnp.array(0.0), state, stretched, 0.3, root @ root.T, 5)
        np.testing.assert_allclose(new.position, root @ plain.position, rtol=1e-10)


def test_exact_draws_stay_exact():
    """One step from 200,000 exact draws, at a step size that refuses 3 in 10 proposals.

    Mean, variance and fourth moment of a standard normal, each within 4 standard errors: a false
    alarm in 1 of 4,000 seeds. Momentum and uniform from one key, or an acceptance without |p|²,
    move them by tens.
    """
    count = 200_000
    keys = jax.random.split(jax.random.key(1), count)
    starts = jax.random.normal(jax.random.key(2), (count, 1))

    def once(key, start):
        state, info = step(key, init(start, normal), normal, 1.6, jnp.ones(1), steps=1)
        return state.position[0], info.accepted

    after, accepted = jax.jit(jax.vmap(once))(keys, starts)
    assert 0.65 < accepted.mean() < 0.75
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = (np.asarray(after, float) ** power).mean() - mean
        assert abs(error) < 4 * np.sqrt(variance / count), (power, error)


@pytest.mark.parametrize("beyond", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_no_number_away_from_the_start_is_a_divergence_and_refused(beyond):
    def walled(position):
        return jnp.where(position[0] > 1, beyond, -0.5 * position @ position)

    state = init(jnp.zeros(1), walled)
    new, info = fly(jnp.array([3.0]), jnp.array(0.0), state, walled, 0.5, jnp.ones(1), 3)
    assert (info.divergent, info.accepted, info.acceptance) == (True, False, 0)
    assert (new.position == 0).all() and jnp.isfinite(info.energy)


def test_an_energy_error_over_a_thousand_is_a_divergence():
    """p = 1, ε = 2 on -k q²/2 from 0: q = 2, p = 1 - 2 k, H rises by 2 k² to leading order."""
    for stiffness, divergent in ((20.0, False), (30.0, True)):

        def stiff(position, stiffness=stiffness):
            return -0.5 * stiffness * position @ position

        _, info = fly(
            jnp.ones(1), jnp.array(0.5), init(jnp.zeros(1), stiff), stiff, 2.0, jnp.ones(1), 1
        )
        rise = 2 * stiffness + ((1 - 2 * stiffness) ** 2 - 1) / 2
        assert divergent == (rise > DIVERGENCE) == bool(info.divergent)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_both_dtypes_and_the_higher_order(dtype):
    with jax.enable_x64(True):
        state = init(jnp.ones(2, dtype), bent)
        size, metric = jnp.asarray(0.2, dtype), jnp.ones(2, dtype)
        new, info = step(jax.random.key(0), state, bent, size, metric, scheme=YOSHIDA)
        assert {x.dtype for x in (*new, info.acceptance, info.energy)} == {jnp.dtype(dtype)}
