"""MALA leaves its target alone: by brute force, as one leapfrog, as BlackJAX's, by many chains."""

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blackjax.mcmc.diffusions import overdamped_langevin
from scipy.stats import kstest, norm

from implementations.bayesian import hmc
from implementations.bayesian.langevin import init, move, step


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def bent(position):
    """A density that is not symmetric, so that drifts there and back differ."""
    return -0.25 * jnp.sum(position**4) + 0.7 * jnp.sum(jnp.sin(2 * position)) - position[0]


def test_detailed_balance_on_a_grid():
    """π(x) K(x, y) = π(y) K(y, x) for every pair of 41 points, at rtol 1e-10.

    The noise that leads from x to y is known, so K is its density times the acceptance that `move`
    reports.
    """
    grid, step_size = np.linspace(-2.5, 2.5, 41), 0.8
    slope = jax.vmap(jax.grad(bent))(jnp.asarray(grid)[:, None])[:, 0]
    drifted = grid + step_size**2 / 2 * np.asarray(slope)
    noise = (grid[None] - drifted[:, None]) / step_size

    def acceptance(x, noise):
        state = init(x[None], bent)
        return move(noise[None], 0.5, state, bent, step_size, jnp.ones(1))[1].acceptance

    from_to = jax.jit(jax.vmap(jax.vmap(acceptance, (None, 0))))(jnp.asarray(grid), noise)
    kernel = norm.pdf(noise) / step_size * np.asarray(from_to)
    flow = np.exp(jax.vmap(bent)(jnp.asarray(grid)[:, None]))[:, None] * kernel
    np.testing.assert_allclose(flow, flow.T, rtol=1e-10)
    assert 0.2 < (np.asarray(from_to) < 1).mean() < 0.8


@pytest.mark.parametrize("metric", [[1.0, 1.0], [0.5, 2.0], [[1.0, 0.4], [0.4, 0.5]]], ids=str)
def test_is_one_leapfrog(metric):
    """HMC's step with one leapfrog, the noise being its momentum, at rtol 1e-10."""
    rng, metric = np.random.default_rng(0), jnp.asarray(metric)
    arrays = rng.normal(size=(20, 2)), rng.normal(size=(20, 2)), rng.uniform(size=20)

    @jax.jit
    @jax.vmap
    def both(position, noise, uniform):
        state = init(position, bent)
        mine = move(noise, uniform, state, bent, 0.6, metric)
        theirs = hmc.fly(noise, uniform, state, bent, 0.6, metric, steps=1)
        return (mine[0], mine[1].acceptance), (theirs[0], theirs[1].acceptance)

    mine, theirs = both(*map(jnp.asarray, arrays))
    for value, expected in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-10, atol=1e-12)
    assert (mine[1] < 1).any()


def test_is_blackjaxs():
    """Acceptances equal at rtol 1e-10 for BlackJAX's own noise; its step is half our step squared.

    The proposal is taken from its integrator with the key that its kernel hands on.
    """
    step_size = 0.5
    algorithm = blackjax.mala(bent, step_size**2 / 2)
    dynamics = overdamped_langevin(jax.value_and_grad(bent))
    position = jnp.array([0.3, -0.8])

    @jax.jit
    @jax.vmap
    def both(key):
        state, mine = algorithm.init(position), init(position, bent)
        _, info = algorithm.step(key, state)
        proposal = dynamics(jax.random.split(key)[0], state, step_size**2 / 2)
        noise = (proposal.position - position - step_size**2 / 2 * mine.gradient) / step_size
        _, ours = move(noise, 0.5, mine, bent, step_size, jnp.ones(2))
        return ours.acceptance, info.acceptance_rate

    ours, theirs = both(jax.random.split(jax.random.key(0), 50))
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)
    assert (ours < 1).any()


def test_many_chains_stay_where_they_belong():
    """20 steps from exact normal draws: KS of 40,000 chains, false alarms 1e-4 in each of two.

    Without the correction the deviation would be 1 / sqrt(1 - step² / 4), 1.15 here.
    """

    def log_density(position):
        return -0.5 * position @ position

    @jax.jit
    @jax.vmap
    def chain(key):
        start_key, key = jax.random.split(key)
        state = init(jax.random.normal(start_key, (2,), jnp.float64), log_density)
        advance = lambda state, key: step(key, state, log_density, 1.0, jnp.ones(2))  # noqa: E731
        return jax.lax.scan(advance, state, jax.random.split(key, 20))

    state, info = chain(jax.random.split(jax.random.key(1), 40_000))
    for column in state.position.T:
        assert kstest(np.asarray(column), "norm").pvalue > 1e-4
    assert abs(float(info.accepted.mean() - info.acceptance.mean())) < 5 * 0.5 / 800_000**0.5


def test_a_gradient_that_is_not_a_number_is_refused():
    """sqrt of a negative proposal: NaN in value and gradient, and the chain stays."""
    root = lambda x: jnp.sqrt(x[0])  # noqa: E731
    state = init(jnp.array([0.1]), root)
    kept, info = move(jnp.array([-5.0]), 0.0, state, root, 0.5, jnp.ones(1))
    assert float(kept.position[0]) == 0.1
    assert float(info.acceptance) == 0
