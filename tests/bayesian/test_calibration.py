"""Every sampler draws from the posterior; a likelihood that is wrong by 5% is found out.

False alarms: `calibrated` shares a rate of 1e-4 among the p-values of one call, and seeds are
fixed. With -m full there are 20,000 replications on every model with every sampler.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from implementations.bayesian import hmc, langevin, metropolis, nuts
from implementations.bayesian.calibration import (
    Model,
    calibrated,
    geweke_values,
    joint_p_values,
    rank_p_values,
    sbc_ranks,
)
from implementations.bayesian.calibration_models import MODELS, coin, line, mean, schools

RATE = 1e-4
SETTINGS = {  # step, and what it takes besides the density
    "nuts": (nuts, {"step_size": 0.15}),
    "hmc": (hmc, {"step_size": 0.15, "steps": 7}),
    "langevin": (langevin, {"step_size": 0.25}),
    "metropolis": (metropolis, {"step_size": 0.3}),
}


def mover(name: str):
    """A sampler as a move from position to position, with a unit metric."""
    sampler, settings = SETTINGS[name]

    def move(key, position, log_density):
        state = sampler.init(position, log_density)
        metric = jnp.ones(position.shape)
        return sampler.step(key, state, log_density, inverse_mass=metric, **settings)[0].position

    return move


def exact_mean(key, position, log_density):
    """An exact draw from the posterior of `mean`: normal, by its Hessian and one Newton step."""
    hessian, gradient = jax.hessian(log_density)(position), jax.grad(log_density)(position)
    factor = jnp.linalg.cholesky(jnp.linalg.inv(-hessian))
    centre = position - jnp.linalg.solve(hessian, gradient)
    return centre + factor @ jax.random.normal(key, position.shape)


def rank_verdict(model, move, replications, draws=15, seed=0, thin=1):
    ranks = sbc_ranks(
        jax.random.key(seed), model, move, draws=draws, thin=thin, replications=replications
    )
    return calibrated(rank_p_values(ranks, draws), RATE)


def geweke_verdict(model, move, replications, rounds=10):
    """Twice as many fresh draws cost nothing, and sharpen the comparison."""
    values = geweke_values(jax.random.key(1), model, move, rounds=rounds, replications=replications)
    fresh = geweke_values(jax.random.key(2), model, move, rounds=0, replications=2 * replications)
    return calibrated(joint_p_values(values, fresh), RATE)


@pytest.mark.parametrize(
    "sampler, model",
    [("nuts", "schools"), ("hmc", "line"), ("langevin", "coin"), ("metropolis", "mean")],
)
def test_ranks_are_uniform(sampler, model):
    """Each model once and each sampler once, 2,000 replications."""
    assert rank_verdict(MODELS[model](), mover(sampler), 2_000)


@pytest.mark.full
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sampler", SETTINGS)
def test_ranks_are_uniform_over_20000(sampler, model):
    assert rank_verdict(MODELS[model](), mover(sampler), 20_000, draws=31)


def test_joint_distribution_stays():
    assert geweke_verdict(line(), mover("hmc"), 2_000)


@pytest.mark.full
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sampler", SETTINGS)
def test_joint_distribution_stays_over_20000(sampler, model):
    assert geweke_verdict(MODELS[model](), mover(sampler), 20_000, rounds=20)


@pytest.mark.parametrize("verdict", [rank_verdict, geweke_verdict], ids=["ranks", "Geweke"])
def test_five_percent_of_precision_are_caught(verdict):
    """The noise is estimated: 30 points tell it to 12%, and 5% of precision are 2.5% of noise.

    Its posterior shifts by 0.17 of its deviations, for exact draws a KS distance of 0.07, which
    2,000 ranks see with p = 1e-8; a chain that remembers sees a little less.
    """
    assert not verdict(line(precision=1.05), mover("hmc"), 2_000)


@pytest.mark.full
def test_five_percent_of_a_known_precision_are_caught_by_width():
    """With the noise known only the width is wrong, by 2.4%: the folded ranks' KS distance is about
    0.0115 an entry, and 0.018 for the log-density of two entries. 60,000 exact draws find it.
    """
    ranks = sbc_ranks(
        jax.random.key(3), mean(precision=1.05), exact_mean, draws=63, replications=60_000
    )
    plain, folded = rank_p_values(ranks, 63)
    assert min(folded[:2].min(), plain[2]) < 1e-6
    assert plain[:2].min() > 1e-4


def test_exact_draws_are_calibrated():
    """The test itself, without a chain: draws from the conjugate posterior, of which we know."""
    assert rank_verdict(mean(), exact_mean, 5_000)


@pytest.mark.parametrize("step_size", [0.05, 5.0])
def test_a_chain_that_hardly_moves_is_no_false_alarm(step_size):
    """Tiny steps, or many refusals: uniformity needs no mixing, and ties are broken fairly."""

    def lazy(key, position, log_density):
        state = metropolis.init(position, log_density)
        metric = jnp.ones(position.shape)
        return metropolis.step(key, state, log_density, step_size, metric)[0].position

    assert rank_verdict(coin(), lazy, 5_000)


def test_width_is_seen_by_folded_ranks():
    """Exact draws, 9% too narrow: the ranks pile up at both ends, which folding lays together."""
    ranks = sbc_ranks(jax.random.key(4), mean(1.2), exact_mean, draws=15, replications=5_000)
    plain, folded = rank_p_values(ranks, 15)
    assert folded[:2].max() < 1e-4 < plain[:2].min()


def test_a_sampler_that_ignores_the_data_is_seen_by_the_density():
    """Prior draws have uniform ranks for every parameter; the log-density alone objects."""
    model = coin()

    def prior_only(key, position, log_density):
        return jax.random.normal(key, position.shape)

    ranks = sbc_ranks(jax.random.key(5), model, prior_only, draws=15, replications=2_000)
    values, fresh = (
        geweke_values(jax.random.key(seed), model, prior_only, rounds=seed, replications=2_000)
        for seed in (1, 0)
    )
    for p_values in (rank_p_values(ranks, 15), joint_p_values(values, fresh)):
        assert p_values[:, :3].min() > 1e-4
        assert p_values[:, 3].min() < 1e-10


def test_a_missing_determinant_is_caught():
    """exp(free) is drawn half-normal, and log_joint forgets that free is what the sampler moves."""
    good = schools()
    bad = Model(
        good.draw_parameters,
        good.draw_data,
        lambda position, y: good.log_joint(position, y) - position[1],
    )
    assert not rank_verdict(bad, mover("hmc"), 2_000)


def test_ranks_by_hand():
    """A truth of 0 among draws that go up by one, either way: ranks are 0, whatever its place."""
    model = Model(
        lambda key: jnp.zeros(1), lambda key, position: 0.0, lambda position, data: position.sum()
    )
    up = lambda key, position, log_density: position + 1  # noqa: E731
    stay = lambda key, position, log_density: position  # noqa: E731
    ranks = sbc_ranks(jax.random.key(6), model, up, draws=7, replications=100, batch=50)
    assert ranks.shape == (100, 2)
    assert (ranks == 0).all()
    tied = sbc_ranks(jax.random.key(7), model, stay, draws=7, replications=4_000)
    # 8 equally likely ranks: 500 each, deviation 21; six of them for 16 counts is 3e-8.
    assert abs(np.apply_along_axis(np.bincount, 0, tied, None, 8) - 500).max() < 6 * 21


def test_geweke_without_rounds_is_the_joint():
    """Zero rounds: parameters from the prior, by scipy's KS of the two means of `mean`."""
    from scipy.stats import kstest

    values = geweke_values(jax.random.key(8), mean(), exact_mean, rounds=0, replications=2_000)
    assert min(kstest(column, "norm").pvalue for column in values[:, :2].T) > 1e-4


def test_bonferroni_by_hand():
    """Two of four p-values at 1e-3 / 4, on either side."""
    good = np.array([[0.5, 0.00026], [0.3, 0.9]])
    assert calibrated(good, 1e-3)
    assert not calibrated(good - 0.00002, 1e-3)


@pytest.mark.parametrize("name", ["draws", "thin", "replications", "batch"])
def test_numbers_must_be_positive(name):
    with pytest.raises(ValueError, match=f"calibration needs {name} >= 1, got 0"):
        sbc_ranks(jax.random.key(0), mean(), exact_mean, **{name: 0})
