"""A NumPyro model through its own potential: the same density, and a posterior known exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.util import potential_energy

from implementations.bayesian.diagnostics import ess_bulk
from implementations.bayesian.numpyro_model import from_numpyro
from implementations.bayesian.sampling import sample


def coin(heads, tosses=10):
    fairness = numpyro.sample("fairness", dist.Beta(2, 2))
    numpyro.deterministic("odds", fairness / (1 - fairness))
    numpyro.sample("heads", dist.Binomial(tosses, fairness), obs=heads)


def test_log_density_is_minus_numpyros_potential():
    with jax.enable_x64(True):
        model = from_numpyro(jax.random.key(0), coin, 7, tosses=9)
        for value in (-2.0, 0.1, 3.0):
            free = {"fairness": jnp.array(value)}
            theirs = potential_energy(coin, (7,), {"tosses": 9}, free)
            np.testing.assert_allclose(model.log_density(free), -theirs, rtol=1e-12)


def test_the_way_back_is_constrained_and_includes_what_follows():
    model = from_numpyro(jax.random.key(0), coin, 7)
    assert model.initial.keys() == {"fairness"}
    back = model.constrained({"fairness": jnp.array(0.0)})
    assert back["fairness"] == 0.5 and back["odds"] == 1


def test_posterior_of_a_coin_is_a_beta():
    """9 of 10 heads: Beta(11, 3). Mean and mean square within 4 standard errors by the effective
    sample size: a false alarm in 1 of 8,000 seeds."""
    model = from_numpyro(jax.random.key(0), coin, 9)
    data = sample(jax.random.key(1), model.log_density, model.initial, chains=2, draws=1000)
    free = {"fairness": data.posterior["fairness"].values}
    fairness = np.asarray(jax.vmap(jax.vmap(model.constrained))(free)["fairness"], float)
    for values, exact in ((fairness, 11 / 14), (fairness**2, 11 * 12 / (14 * 15))):
        error = values.std() / np.sqrt(ess_bulk(values))
        assert abs(values.mean() - exact) < 4 * error


def test_a_model_without_a_continuous_parameter_is_refused():
    def nothing():
        numpyro.sample("x", dist.Normal(0, 1), obs=1.0)

    with pytest.raises(ValueError, match="no continuous parameter"):
        from_numpyro(jax.random.key(0), nothing)
