"""Several chains in one program: the same numbers wherever they run, and the right ones."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from implementations.bayesian import hmc
from implementations.bayesian.chains import run_chain, run_chains
from implementations.bayesian.diagnostics import ess_bulk

MEAN, SCALES = np.array([3.0, -1.0]), np.array([0.5, 4.0])


def shifted(position):
    return -0.5 * ((position - MEAN) / SCALES) @ ((position - MEAN) / SCALES)


@pytest.fixture(scope="module")
def draws():
    """Four chains on two devices."""
    return run_chains(jax.random.key(0), jnp.zeros((4, 2)), shifted, warm_up=500, draws=1000)


def test_means_and_variances_are_the_targets(draws):
    """Within 4 standard errors by the effective sample size: a false alarm in 1 of 4,000 seeds."""
    standard = (np.asarray(draws.position, float) - MEAN) / SCALES
    for values, mean, variance in ((standard, 0, 1), (standard**2, 1, 2)):
        for entry in range(2):
            error = np.sqrt(variance / ess_bulk(values[..., entry]))
            assert abs(values[..., entry].mean() - mean) < 4 * error


def test_a_chain_is_the_same_alone_and_on_a_device_with_others(draws):
    """Chain 3, the second on its device, to float32's rounding over 1500 draws that never grows:
    the step size is equal to 1e-5 and so is the first draw."""
    key = jax.random.split(jax.random.key(0), 4)[3]
    alone = jax.jit(partial(run_chain, log_density=shifted, warm_up=500, draws=1000))(
        key, jnp.zeros(2)
    )
    np.testing.assert_allclose(draws.step_size[3], alone.step_size, rtol=1e-5)
    np.testing.assert_allclose(draws.position[3, 0], alone.position[0], rtol=1e-5)


def test_chains_differ_and_tune_themselves(draws):
    assert len(set(np.asarray(draws.step_size).tolist())) == 4
    assert len(np.unique(np.asarray(draws.position[:, 0, 0]))) == 4
    assert draws.position.sharding.num_devices == 2


def test_a_second_run_compiles_nothing(draws):
    before = run_chains._cache_size()
    again = run_chains(jax.random.key(0), jnp.zeros((4, 2)), shifted, warm_up=500, draws=1000)
    assert run_chains._cache_size() == before
    np.testing.assert_array_equal(again.position, draws.position)


def test_another_sampler_odd_chains_and_float64():
    """Three chains cannot be shared by two devices, so one runs them all."""
    with jax.enable_x64(True):
        result = run_chains(
            jax.random.key(1),
            jnp.zeros((3, 2)),
            lambda position: -0.5 * position @ position,
            init=hmc.init,
            step=partial(hmc.step, steps=5),
            warm_up=100,
            draws=50,
            metric="dense",
        )
        assert result.position.shape == (3, 50, 2) and result.position.dtype == jnp.float64
        assert result.inverse_mass.shape == (3, 2, 2) and result.info.accepted.any()


FLIGHTS = {"init": hmc.init, "step": partial(hmc.step, steps=3)}


def test_no_draw_of_the_warm_up_is_handed_over():
    """The chains start 250 and 2000 deviations away, and draws are not."""
    far = jnp.full((2, 2), 1000.0)
    result = run_chains(jax.random.key(3), far, shifted, warm_up=300, draws=50, **FLIGHTS)
    assert result.position.shape == (2, 50, 2)
    assert (abs((result.position - MEAN) / SCALES) < 10).all()


def test_a_higher_target_means_shorter_steps_and_more_acceptance():
    found = {
        target: run_chains(
            jax.random.key(4), jnp.zeros((2, 2)), shifted, warm_up=300, target=target, **FLIGHTS
        )
        for target in (0.6, 0.95)
    }
    rate = {target: float(result.info.acceptance.mean()) for target, result in found.items()}
    assert rate[0.6] < 0.85 < 0.9 < rate[0.95]
    assert (found[0.6].step_size.min() > found[0.95].step_size.max()).all()


def test_without_a_warm_up_the_step_size_is_the_first_one_found():
    short = {"init": hmc.init, "step": hmc.step, "warm_up": 0, "draws": 3}
    result = run_chains(jax.random.key(2), jnp.zeros((2, 2)), shifted, **short)
    assert (result.inverse_mass == 1).all()
    assert (np.log2(result.step_size) % 1 == 0).all()  # doubled or halved from 1
