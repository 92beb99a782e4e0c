"""Kicks and drifts: the leapfrog of NumPyro, exact rotations, and what Hamiltonian flow keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer.hmc_util import euclidean_kinetic_energy, velocity_verlet

from implementations.bayesian.integrators import (
    LEAPFROG,
    YOSHIDA,
    Phase,
    composed,
    energy,
    integrate,
    scale_of,
)

SCHEMES = {"leapfrog": LEAPFROG, "yoshida": YOSHIDA}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def bent(position):
    """Neither normal nor separable."""
    a, b, c = position
    return -(a**4) / 4 - (b - a**2) ** 2 / 2 - jnp.cosh(c - b)


def phase_at(log_density, position, momentum) -> Phase:
    return Phase(position, momentum, *jax.value_and_grad(log_density)(position))


def random_phase(seed: int = 0, log_density=bent) -> Phase:
    position, momentum = np.random.default_rng(seed).normal(size=(2, 3))
    return phase_at(log_density, jnp.asarray(position), jnp.asarray(momentum))


def random_metric(dense: bool):
    root = np.random.default_rng(5).normal(size=(3, 3))
    covariance = jnp.asarray(root @ root.T + np.eye(3))
    return covariance if dense else jnp.diag(covariance)


@every_scheme
@pytest.mark.parametrize("dense", [False, True], ids=["diagonal", "dense"])
def test_thirty_steps_there_and_thirty_back_return_to_the_start(scheme, dense):
    """1e-12: 60 steps of rounding at 1e-16, in numbers near 1."""
    start, scale = random_phase(), scale_of(random_metric(dense))
    step = jax.jit(lambda phase, size: integrate(phase, bent, size, scale, scheme))
    phase = start
    for size in [0.02] * 30 + [-0.02] * 30:
        phase = step(phase, size)
    np.testing.assert_allclose(phase.position, start.position, atol=1e-12)
    np.testing.assert_allclose(phase.momentum, start.momentum, atol=1e-12)


@every_scheme
def test_turning_the_momentum_is_going_back(scheme):
    """What HMC's detailed balance rests on; 1e-12 as above."""
    start, scale = random_phase(1), scale_of(random_metric(True))
    there = integrate(start, bent, 0.1, scale, scheme)
    back = integrate(there._replace(momentum=-there.momentum), bent, 0.1, scale, scheme)
    np.testing.assert_allclose(back.position, start.position, atol=1e-12)
    np.testing.assert_allclose(-back.momentum, start.momentum, atol=1e-12)


@every_scheme
@pytest.mark.parametrize("dense", [False, True], ids=["diagonal", "dense"])
def test_volume_is_kept(scheme, dense):
    """The Jacobian of a step in all six coordinates; 1e-12 for a 6 x 6 determinant near 1."""
    start, scale = random_phase(2), scale_of(random_metric(dense))

    def step(both):
        phase = integrate(phase_at(bent, both[:3], both[3:]), bent, 0.1, scale, scheme)
        return jnp.concatenate((phase.position, phase.momentum))

    jacobian = jax.jacfwd(step)(jnp.concatenate((start.position, start.momentum)))
    assert abs(jacobian - np.eye(6)).max() > 0.05  # it is no identity
    np.testing.assert_allclose(np.linalg.det(jacobian), 1, rtol=1e-12)


@pytest.mark.parametrize("name, order", [("leapfrog", 2), ("yoshida", 4)])
def test_energy_error_falls_with_its_order(name, order):
    """Over one unit of time, 64 steps against 128: the next term is order + 2, so 0.05 is ample."""
    start, scale = random_phase(3), jnp.ones(3)

    def worst(steps):
        def advance(phase, _):
            phase = integrate(phase, bent, 1 / steps, scale, SCHEMES[name])
            return phase, abs(energy(phase) - energy(start))

        return jax.lax.scan(advance, start, None, length=steps)[1].max()

    assert abs(np.log2(worst(64) / worst(128)) - order) < 0.05


def test_leapfrog_on_a_parabola_is_a_rotation_by_a_known_angle():
    """q_n = q_0 cos(n θ) + p_0 sin(n θ) / sqrt(1 - ε²/4) with cos θ = 1 - ε²/2 (Neal 2011)."""
    size, steps = 0.7, 11
    parabola = lambda position: -0.5 * position @ position  # noqa: E731
    phase = phase_at(parabola, jnp.array([0.3]), jnp.array([-1.1]))
    for _ in range(steps):
        phase = integrate(phase, parabola, size, jnp.ones(1))
    angle = steps * np.arccos(1 - size**2 / 2)
    exact = 0.3 * np.cos(angle) - 1.1 * np.sin(angle) / np.sqrt(1 - size**2 / 4)
    np.testing.assert_allclose(phase.position[0], exact, rtol=1e-12)


@pytest.mark.parametrize("dense", [False, True], ids=["diagonal", "dense"])
def test_leapfrog_is_numpyros(dense):
    """Their momentum has the mass as its covariance: Lᵀ p is ours."""
    start, inverse_mass = random_phase(4), random_metric(dense)
    scale = scale_of(inverse_mass)
    matrix = scale if dense else jnp.diag(scale)
    their_start, their_step = velocity_verlet(lambda q: -bent(q), euclidean_kinetic_energy)
    theirs = their_start(start.position, jnp.linalg.solve(matrix.T, start.momentum))
    ours = start
    for _ in range(5):
        theirs = their_step(0.05, inverse_mass, theirs)
        ours = integrate(ours, bent, 0.05, scale)
    np.testing.assert_allclose(ours.position, theirs.z, rtol=1e-10)
    np.testing.assert_allclose(ours.momentum, matrix.T @ theirs.r, rtol=1e-10)
    np.testing.assert_allclose(ours.gradient, -theirs.z_grad, rtol=1e-10)


def test_yoshidas_shares_are_the_published_ones():
    """Yoshida 1990, equation 2.11: 1.3512071919596578 and -1.7024143839193153."""
    outer, inner = 1.3512071919596578, -1.7024143839193153
    np.testing.assert_allclose(YOSHIDA.drifts, [outer, inner, outer], rtol=1e-12)
    np.testing.assert_allclose(sum(YOSHIDA.kicks), 1, rtol=1e-12)


def test_two_half_steps_make_a_scheme_of_two_drifts():
    twice = composed((0.5, 0.5))
    start = random_phase(6)
    once = integrate(start, bent, 0.1, jnp.ones(3), twice)
    halves = start
    for _ in range(2):
        halves = integrate(halves, bent, 0.05, jnp.ones(3))
    np.testing.assert_allclose(once.position, halves.position, rtol=1e-12)
    np.testing.assert_allclose(once.momentum, halves.momentum, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_dtype_stays(dtype):
    start = jax.tree.map(lambda x: x.astype(dtype), random_phase())
    phase = integrate(start, bent, 0.1, jnp.ones(3, dtype), YOSHIDA)
    assert {value.dtype for value in phase} == {jnp.dtype(dtype)}
