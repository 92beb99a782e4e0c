"""The targets of targets.py as NumPyro models, so that two libraries sample the very same density.

    potential_energy(model)(free numbers) = -log_density(flat) + constant

A model draws its unknowns site by site, and NumPyro collects the log-density and the changes of
variables. Sites bear the names and shapes of the target's parameters, so flat vectors agree.

Paper   Phan, Pradhan & Jankowiak 2019, arXiv:1912.11554
Run     uv run python implementations/bayesian/targets_numpyro.py
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import sample
from numpyro.distributions import (
    Bernoulli,
    Distribution,
    HalfCauchy,
    HalfNormal,
    MultivariateNormal,
    Normal,
)
from numpyro.infer.util import potential_energy

from implementations.bayesian.targets import (
    SCHOOL_ERRORS,
    SCHOOLS,
    TARGETS,
    car_columns,
    normal_covariance,
    returns,
    standardised,
)
from implementations.sources.tables import cars as car_table
from implementations.sources.tables import tumours as tumour_table

Model = Callable[[], None]


def several(count: int, mean=0.0, deviation=1.0) -> Distribution:
    """One site of `count` independent normal numbers."""
    return Normal(mean, deviation).expand([count]).to_event(1)


def standard_normal() -> None:
    sample("x", several(10))


def correlated_normal() -> None:
    sample("x", MultivariateNormal(jnp.zeros(20), jnp.asarray(normal_covariance(20))))


def funnel() -> None:
    v = sample("v", Normal(0, 3))
    sample("x", several(9, 0, jnp.exp(v / 2)))


def funnel_non_centred() -> None:
    sample("raw_v", Normal())
    sample("raw_x", several(9))


def banana() -> None:
    x = sample("x", Normal(0, 10))
    sample("y", Normal(0.03 * (x**2 - 100), 1))


def eight_schools_centred() -> None:
    mean, spread = sample("mean", Normal(0, 5)), sample("spread", HalfCauchy(5))
    effect = sample("effect", several(8, mean, spread))
    sample("points", Normal(effect, SCHOOL_ERRORS), obs=SCHOOLS)


def eight_schools_non_centred() -> None:
    mean, spread = sample("mean", Normal(0, 5)), sample("spread", HalfCauchy(5))
    raw = sample("raw", several(8))
    sample("points", Normal(mean + spread * raw, SCHOOL_ERRORS), obs=SCHOOLS)


def tumours() -> None:
    table, benign = tumour_table()
    measured = standardised(table)
    logit = sample("intercept", Normal()) + measured @ sample("slope", several(30))
    sample("benign", Bernoulli(logits=logit), obs=benign)


def cars() -> None:
    (columns, miles), table = car_columns(), car_table()
    mean, spread = sample("mean", Normal(3, 1)), sample("spread", HalfNormal())
    noise, slope = sample("noise", HalfNormal()), sample("slope", several(2))
    economy = sample("economy", several(len(table.names), mean, spread))
    sample("miles", Normal(economy[table.make] + columns @ slope, noise), obs=miles)


def volatility() -> None:
    seen = returns(150)
    level, step = sample("level", Normal()), sample("step", HalfNormal(0.2))
    shock = sample("shock", several(len(seen)))
    sample("seen", Normal(0, jnp.exp(level + step * jnp.cumsum(shock))), obs=seen)


MODELS: dict[str, Model] = {
    model.__name__: model
    for model in (
        standard_normal,
        correlated_normal,
        funnel,
        funnel_non_centred,
        banana,
        eight_schools_centred,
        eight_schools_non_centred,
        tumours,
        cars,
        volatility,
    )
}


def main() -> None:
    with jax.enable_x64(True):
        for name, model in MODELS.items():
            target = TARGETS[name]()
            points = jnp.asarray(np.random.default_rng(0).normal(size=(2, target.dimension)))
            ours = [target.log_density(point) for point in points]
            theirs = [-potential_energy(model, (), {}, target.free(point)) for point in points]
            gap = (ours[1] - ours[0]) - (theirs[1] - theirs[0])
            print(f"{name:26} differences of log-density differ by {abs(gap):.1e}")


if __name__ == "__main__":
    main()
