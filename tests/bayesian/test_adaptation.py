"""Step size and metric: NumPyro's and NumPy's numbers, and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer.hmc_util import build_adaptation_schedule, dual_averaging, welford_covariance

from implementations.bayesian.adaptation import (
    COLLECTS,
    FROZEN,
    SETTLES,
    STEP_SIZE_ONLY,
    WINDOW_ENDS,
    find_step_size,
    schedule,
    start_averaging,
    start_tuning,
    tune,
    update_averaging,
    windows,
)
from implementations.bayesian.chains import run_chain
from implementations.bayesian.hmc import fly, init
from implementations.bayesian.moments import (
    fisher,
    no_moments,
    shrunk,
    update_moments,
    variance,
)


def test_dual_averaging_is_numpyros():
    """60 updates by random acceptances in float64: the next step and the average, each time."""
    start, update = dual_averaging()
    with jax.enable_x64(True):
        ours, theirs = start_averaging(jnp.array(0.3)), start(np.log(10 * 0.3))
        for acceptance in np.random.default_rng(0).uniform(size=60):
            ours = update_averaging(ours, jnp.array(acceptance), 0.8)
            theirs = update(0.8 - acceptance, theirs)
            np.testing.assert_allclose(ours.log_step, theirs[0], rtol=1e-10)
            np.testing.assert_allclose(ours.log_average, theirs[1], rtol=1e-10)


def test_dual_averaging_worked_by_hand():
    """Target 0.8, acceptance 0.25: mean error 0.55 / 11 = 0.05, and x = log 10 - 0.05 / 0.05."""
    state = update_averaging(start_averaging(jnp.array(1.0)), jnp.array(0.25), 0.8)
    np.testing.assert_allclose(state.log_step, np.log(10) - 1, rtol=1e-5)
    np.testing.assert_allclose(state.log_average, state.log_step, rtol=1e-6)


@pytest.mark.parametrize("dense", [False, True], ids=["diagonal", "dense"])
def test_moments_are_numpys_and_their_shrinkage_numpyros(dense):
    """Far from zero, where a difference of squares would lose every digit."""
    draws = 1e6 + np.random.default_rng(0).normal(size=(30, 4)) * [0.1, 1, 10, 3]
    start, update, final = welford_covariance(diagonal=not dense)
    with jax.enable_x64(True):
        moments, theirs = no_moments(jnp.zeros(4), dense), start(4)
        for draw in draws:
            moments = update_moments(moments, jnp.asarray(draw))
            theirs = update(jnp.asarray(draw), theirs)
        exact = np.cov(draws.T) if dense else draws.var(0, ddof=1)
        # 1e-7: deviations of numbers near 1e6 keep 10 digits, and some covariances cancel.
        np.testing.assert_allclose(variance(moments), exact, rtol=1e-7)
        shrunken = shrunk(moments, no_moments(jnp.zeros(4)))
        np.testing.assert_allclose(shrunken, final(theirs, regularize=True)[0], rtol=1e-7)


def test_fisher_diagonal_of_a_normal_is_exact_after_three_draws():
    """Gradients are -(x - mean) / σ², whatever the draws: sqrt(σ⁴) remains."""
    scales = np.array([0.01, 1.0, 100.0])
    with jax.enable_x64(True):
        positions = gradients = no_moments(jnp.zeros(3))
        for draw in np.random.default_rng(0).normal(size=(3, 3)):
            positions = update_moments(positions, jnp.asarray(5 + scales * draw))
            gradients = update_moments(gradients, jnp.asarray(-draw / scales))
        np.testing.assert_allclose(fisher(positions, gradients), scales**2, rtol=1e-10)


def test_fisher_diagonal_without_gradients_is_one():
    moments = update_moments(update_moments(no_moments(jnp.zeros(1)), jnp.ones(1)), jnp.zeros(1))
    flat = update_moments(update_moments(no_moments(jnp.zeros(1)), jnp.zeros(1)), jnp.zeros(1))
    assert fisher(moments, flat) == 1 and fisher(flat, moments) == 1 and fisher(flat, flat) == 1


@pytest.mark.parametrize("warm_up", [20, 99, 150, 151, 300, 500, 1000, 1234, 5000])
def test_windows_are_numpyros(warm_up):
    """Theirs name first and last step, and count the buffers before and after as windows."""
    theirs = [(start, end + 1) for start, end in build_adaptation_schedule(warm_up)]
    assert windows(warm_up) == theirs[1:-1]


def test_a_schedule_says_what_each_step_is_for():
    phases = schedule(100, 5)
    assert windows(100) == [(15, 90)]
    assert (phases[:15] == STEP_SIZE_ONLY).all() and (phases[15:89] == COLLECTS).all()
    assert phases[89] == WINDOW_ENDS and phases[99] == SETTLES and (phases[100:] == FROZEN).all()
    assert list(schedule(0, 2)) == [FROZEN, FROZEN] and list(schedule(1, 1)) == [SETTLES, FROZEN]
    assert windows(19) == []


@pytest.mark.parametrize("first", [1e-4, 1.0, 50.0])
def test_the_first_step_size_is_where_acceptance_crosses_four_fifths(first):
    """The size found and the one before it, a factor of two away, lie on either side."""

    def log_density(position):
        return -50 * position @ position

    state, key = init(jnp.array([0.1, -0.05]), log_density), jax.random.key(0)
    found = find_step_size(key, state, log_density, jnp.array(first), jnp.ones(2))
    momentum = jax.random.normal(key, (2,))

    def acceptance(size):
        return fly(momentum, jnp.array(0.0), state, log_density, size, jnp.ones(2), 1)[1].acceptance

    before = found * (2 if found < first else 0.5)
    assert (acceptance(found) > 0.8) != (acceptance(before) > 0.8)


SCALES = np.array([0.1, 1.0, 10.0])


def uneven(position):
    return -0.5 * (position / SCALES) @ (position / SCALES)


@pytest.fixture(scope="module")
def tuned():
    """One warm-up and its draws for each metric."""
    compiled = jax.jit(
        lambda key, metric: run_chain(
            key, jnp.ones(3), uneven, warm_up=600, draws=400, metric=metric
        ),
        static_argnums=1,
    )
    return {name: compiled(jax.random.key(0), name) for name in ("diagonal", "dense", "fisher")}


@pytest.mark.parametrize("metric, factor", [("diagonal", 1.6), ("dense", 1.6), ("fisher", 1.001)])
def test_a_warm_up_learns_the_variances(tuned, metric, factor):
    """From 350 draws in the last window: 5 standard errors of a variance are 0.38. The Fisher
    diagonal is exact for a normal."""
    inverse_mass = tuned[metric].inverse_mass
    learnt = np.diag(inverse_mass) if metric == "dense" else inverse_mass
    ratio = learnt / SCALES**2
    assert ((1 / factor < ratio) & (ratio < factor)).all(), ratio


@pytest.mark.parametrize("metric", ["diagonal", "dense", "fisher"])
def test_a_warm_up_reaches_its_target(tuned, metric):
    """Three scales look like one, so that few steps are needed. Averaging on the logarithm settles
    a little above its target: 0.8 gives 0.8 to 0.95 here and in Stan."""
    info = tuned[metric].info
    assert 0.78 < info.acceptance.mean() < 0.96
    assert info.steps.mean() < 12
    assert not info.divergent.any()


def tuned_once(phase: int, draws: int = 5):
    """Tuning after some draws that were collected, and after one more step of the given phase."""
    state, key = init(jnp.ones(3), uneven), jax.random.key(0)
    tuning = start_tuning(key, state, uneven, 1.0, "diagonal")
    for i, step in enumerate([COLLECTS] * draws + [phase]):
        state = init(jax.random.normal(jax.random.key(i), (3,)), uneven)
        before, acceptance = tuning, jnp.array(0.5)
        given = {"target": 0.8, "metric": "diagonal"}
        tuning = tune(key, tuning, state, uneven, acceptance, jnp.array(step), **given)
    return before, tuning


def test_the_last_step_of_a_warm_up_settles_on_the_average():
    _, tuning = tuned_once(SETTLES)
    assert tuning.averaging.log_step == tuning.averaging.log_average
    assert tuned_once(STEP_SIZE_ONLY)[1].averaging.log_step != tuning.averaging.log_step


def test_a_window_ends_with_a_new_metric_and_forgets_its_draws():
    before, tuning = tuned_once(WINDOW_ENDS)
    assert before.positions.count == 5 and (before.inverse_mass == 1).all()
    assert tuning.positions.count == 0 and (tuning.inverse_mass != 1).all()
    assert tuning.averaging.steps == 0  # and the search for a step size starts anew


def test_outside_the_windows_no_draw_is_collected():
    before, tuning = tuned_once(STEP_SIZE_ONLY)
    assert before.positions.count == tuning.positions.count == 5


def test_after_the_warm_up_nothing_is_learnt():
    """A run of 60 draws and one of 2 end with the same step size and metric, to the bit."""
    compiled = jax.jit(
        lambda key, draws: run_chain(key, jnp.ones(3), uneven, warm_up=40, draws=draws),
        static_argnums=1,
    )
    long, short = (compiled(jax.random.key(0), draws) for draws in (60, 2))
    assert long.step_size == short.step_size
    np.testing.assert_array_equal(long.inverse_mass, short.inverse_mass)


def test_a_metric_is_one_of_three(unchecked):
    state = init(jnp.ones(3), uneven)
    with pytest.raises(ValueError, match="one of diagonal, dense, fisher, got 'full'"):
        start_tuning(jax.random.key(0), state, uneven, 1.0, "full")


def test_fisher_needs_gradients(unchecked):
    from implementations.bayesian.metropolis import init as start

    with pytest.raises(ValueError, match="needs gradients"):
        start_tuning(jax.random.key(0), start(jnp.ones(3), uneven), uneven, 1.0, "fisher")
