"""Small models with a prior that can be drawn from, for calibration.py; one can be made wrong.

    line        y ~ N(intercept + slope x, noise)         three numbers, the noise unknown
    mean        y ~ N(mean, 1)                            conjugate: the posterior is known
    coin        y ~ Bernoulli(sigmoid(x · slope))         a likelihood that is not normal
    schools     y ~ N(mean + spread · raw, 1)             hierarchical, non-centred

`precision` multiplies the precision that the log-likelihood of a normal model believes in, while
data are drawn with the true one: an error to be found.

Paper   Talts et al. 2018, arXiv:1804.06788, section 5
Run     uv run python implementations/bayesian/calibration_models.py
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from implementations.bayesian.calibration import Model
from implementations.bayesian.targets import normal
from implementations.bayesian.transforms import POSITIVE

PLACES = np.linspace(-1.5, 1.5, 30)
"""where the line and the coin are observed"""


def half_normal(free: Float[Array, ""]) -> Float[Array, ""]:
    """Log-density of the free number of a half-normal scale."""
    return normal(POSITIVE.constrain(free)) + POSITIVE.log_det(free)


def draw_half_normal(key) -> Float[Array, ""]:
    return POSITIVE.unconstrain(jnp.abs(jax.random.normal(key)))


def line(precision: float = 1.0) -> Model:
    """Position: intercept, slope, log noise; normal priors with deviations 1, 1 and 0.3.

    One step size must do for all data: a noise near zero would ask for one of its own.
    """
    deviations = np.array([1.0, 1.0, 0.3])

    def draw_parameters(key):
        return jax.random.normal(key, (3,)) * deviations

    def draw_data(key, position):
        error = jnp.exp(position[2]) * jax.random.normal(key, PLACES.shape)
        return position[0] + position[1] * jnp.asarray(PLACES, position.dtype) + error

    def log_joint(position, y):
        expected = position[0] + position[1] * jnp.asarray(PLACES, position.dtype)
        noise = jnp.exp(position[2]) / precision**0.5
        prior = normal(position, 0.0, jnp.asarray(deviations, position.dtype))
        return prior + normal(y, expected, noise)

    return Model(draw_parameters, draw_data, log_joint)


def mean(precision: float = 1.0) -> Model:
    """Position: two means, each seen 20 times; standard normal priors."""
    return Model(
        lambda key: jax.random.normal(key, (2,)),
        lambda key, position: position + jax.random.normal(key, (20, 2)),
        lambda position, y: normal(position) + normal(y, position, precision**-0.5),
    )


def coin() -> Model:
    """Position: slopes of 1, x and x²; standard normal priors."""

    def logits(position):
        columns = np.stack([np.ones_like(PLACES), PLACES, PLACES**2 - 0.8], axis=1)
        return jnp.asarray(columns, position.dtype) @ position

    def draw_data(key, position):
        return jax.random.bernoulli(key, jax.nn.sigmoid(logits(position)))

    def log_joint(position, heads):
        sign = jnp.where(heads, 1.0, -1.0).astype(position.dtype)
        return normal(position) + jnp.sum(jax.nn.log_sigmoid(sign * logits(position)))

    return Model(lambda key: jax.random.normal(key, (3,)), draw_data, log_joint)


def schools(precision: float = 1.0) -> Model:
    """Position: mean, log spread, and five raw effects; errors of one."""

    def effects(position):
        return position[0] + POSITIVE.constrain(position[1]) * position[2:]

    def draw_parameters(key):
        spread_key, raw_key = jax.random.split(key)
        numbers = jax.random.normal(raw_key, (7,))
        return numbers.at[1].set(draw_half_normal(spread_key))

    def draw_data(key, position):
        return effects(position) + jax.random.normal(key, (5,))

    def log_joint(position, y):
        likelihood = normal(y, effects(position), precision**-0.5)
        return normal(position[0]) + half_normal(position[1]) + normal(position[2:]) + likelihood

    return Model(draw_parameters, draw_data, log_joint)


MODELS: dict[str, Callable[..., Model]] = {
    "line": line,
    "mean": mean,
    "coin": coin,
    "schools": schools,
}


def main() -> None:
    truth_key, data_key = jax.random.split(jax.random.key(0))
    for name, build in MODELS.items():
        model = build()
        truth = model.draw_parameters(truth_key)
        data = model.draw_data(data_key, truth)
        print(f"{name:8} truth {np.round(truth, 2)}  log joint {model.log_joint(truth, data):.2f}")


if __name__ == "__main__":
    main()
