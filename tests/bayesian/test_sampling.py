"""The front door: what goes in is checked, what comes out has names, and bad chains are named."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from arviz import InferenceData

from implementations.bayesian import hmc
from implementations.bayesian.sampling import PROGRESS, sample

KEY = jax.random.key(0)
SHORT = {"chains": 2, "warm_up": 60, "draws": 40}
SHORT |= {"init": hmc.init, "step": partial(hmc.step, steps=3)}  # compiled in half of NUTS's time


def two_named(unknown):
    inner = (unknown["mean"] - unknown["effect"]["raw"]) ** 2
    return -0.5 * (unknown["mean"] ** 2 + inner.sum())


INITIAL = {"mean": 0.5, "effect": {"raw": jnp.zeros(3)}}


@pytest.fixture(scope="module")
def data():
    return sample(KEY, two_named, INITIAL, chains=2, warm_up=300, draws=500, jitter=0.1)


def test_draws_bear_the_parameters_names(data):
    assert isinstance(data, InferenceData)
    assert set(data.posterior.data_vars) == {"mean", "effect.raw"}
    assert data.posterior["effect.raw"].shape == (2, 500, 3)
    assert data.posterior["mean"].dims == ("chain", "draw")


def test_statistics_bear_arvizs_names(data):
    wanted = {"acceptance_rate", "diverging", "energy", "n_steps", "step_size", "tree_depth"}
    assert set(data.sample_stats.data_vars) == wanted
    assert data.sample_stats.diverging.dtype == bool
    assert (data.sample_stats.n_steps >= 1).all() and data.sample_stats.energy.shape == (2, 500)


def test_nested_parameters_keep_their_variances(data):
    """mean ~ N(0, 1), raw ~ N(mean, 1), so 1 and 2; 500 effective draws give 0.06 and 0.13, and
    0.25 and 0.5 are 4 of these: a false alarm in 1 of 4,000 seeds."""
    assert abs(data.posterior["mean"].values.var() - 1) < 0.25
    assert (abs(data.posterior["effect.raw"].values.var((0, 1)) - 2) < 0.5).all()


def test_a_vector_is_called_x_and_progress_counts_every_step(capsys):
    found = sample(KEY, lambda x: -0.5 * x @ x, jnp.ones(2), progress=True, **SHORT)
    assert found.posterior["x"].shape == (2, 40, 2)
    assert "200/200" in capsys.readouterr().err
    assert PROGRESS.bar is None


def fine(unknown):
    return -0.5 * sum((value**2).sum() for value in jax.tree.leaves(unknown))


@pytest.mark.parametrize(
    "log_density, initial, sentence",
    [
        (fine, {"a": 1.0, "count": 3}, "only floats can be sampled, but count is of int"),
        (fine, {"a": 1.0, "on": True}, "only floats can be sampled, but on is of bool"),
        (fine, {}, "nothing to sample"),
        (fine, jnp.zeros(0), "nothing to sample"),
        (fine, {"a": 1.0, "b": jnp.nan}, "the start must be finite, but b is nan"),
        (lambda x: x**2, jnp.ones(3), r"a log-density is one number, got .*\(3,\)"),
        (lambda x: (x.sum(), x), jnp.ones(3), "a log-density is one number"),
        (lambda x: x.sum().astype(int), jnp.ones(3), "a log-density is a float, got int"),
        (lambda x: x.sum() + jnp.nan, jnp.ones(1), "the log-density is nan at the start"),
        (lambda x: jnp.log(x["b"]) - x["a"], {"a": 1.0, "b": -1.0}, "nan at the start"),
        (lambda x: jnp.log(x["b"]) - x["a"], {"a": 1.0, "b": 0.0}, "-inf at the start.* in b"),
        (lambda x: jnp.sqrt(x["b"]) - x["a"], {"a": 1.0, "b": 0.0}, "gradient .* finite in b$"),
    ],
)
def test_what_cannot_be_sampled_is_said_before(log_density, initial, sentence):
    with pytest.raises(ValueError, match=sentence):
        sample(KEY, log_density, initial, **SHORT)


@pytest.mark.parametrize("counts", [{"chains": 0}, {"draws": 0}, {"warm_up": -1}])
def test_there_is_a_chain_and_a_draw(counts):
    with pytest.raises(ValueError, match="needs a chain, a draw"):
        sample(KEY, fine, jnp.ones(1), **(SHORT | counts))


def warned(log_density, initial, **settings) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sample(KEY, log_density, initial, **(SHORT | settings))
    assert all(warning.category is UserWarning for warning in caught)
    return "\n".join(str(warning.message) for warning in caught)


def test_a_parameter_on_which_nothing_depends_is_named():
    """Improper and flat; and one that enters only through a staircase."""
    for improper in (lambda u: -0.5 * u["a"] ** 2, lambda u: -(u["a"] ** 2) - jnp.floor(u["b"])):
        said = warned(improper, {"a": 0.3, "b": 0.0})
        assert "does not change with b" in said and "with a" not in said


def test_an_improper_density_that_rises_for_ever_is_named():
    said = warned(lambda u: -0.5 * u["a"] ** 2 + u["b"], {"a": 0.3, "b": 0.0}, jitter=0.1)
    assert "b: R-hat" in said


def test_a_chain_that_stands_still_is_named():
    """Away from the start there is no density at all."""

    def island(u):
        here = (u["a"] == 0.25) & (u["b"] == 0.5)
        return jnp.where(here, 0.0, -jnp.inf) - 0.5 * (u["a"] ** 2 + u["b"] ** 2)

    said = warned(island, {"a": 0.25, "b": 0.5}, warm_up=5, draws=5)
    assert "a stood still" in said and "b stood still" in said and "diverged" in said


def test_no_number_away_from_the_start_is_a_divergence_and_no_error():
    def walled(u):
        return jnp.where(u["a"] > 0.5, jnp.nan, -0.5 * u["a"] ** 2)

    said = warned(walled, {"a": 0.0})
    assert "diverged after the warm-up" in said and "still" not in said


def test_two_separate_modes_make_chains_disagree():
    """Jitter of 30 puts the chains on both sides, 60 apart."""

    def bimodal(x):
        return jnp.logaddexp(-0.5 * ((x - 30) ** 2).sum(), -0.5 * ((x + 30) ** 2).sum())

    assert "R-hat" in warned(bimodal, jnp.zeros(1), chains=4, jitter=30.0)
