"""Targets: densities that samplers are tried on, from the friendliest to the most treacherous.

A target is a log-density on one flat vector of free numbers. It is written over its named,
constrained parameters; transforms.py takes the free numbers there and adds what the change of
variables costs.

    log_density(flat) = log p(parameters, data) + log |det d parameters / d flat|

| target | dimension | what is hard about it |
|---|---|---|
| standard_normal | 10 | nothing |
| correlated_normal | 20 | scales from 0.1 to 10, neighbours correlated by 0.9 |
| funnel | 10 | Neal's: the scale of nine numbers is the tenth |
| funnel_non_centred | 10 | nothing any more |
| banana | 2 | Haario's: bent, so that no metric fits everywhere |
| eight_schools_centred | 10 | Rubin's: a funnel that data does not fill |
| eight_schools_non_centred | 10 | little |
| tumours | 31 | logistic regression on 30 measurements that repeat one another |
| cars | 33 | fuel economy, partially pooled over 28 makes with 1 to 48 cars each |
| volatility | 152 | Google's volatility on 150 days to the crash of 2008: a random walk |

Paper   Neal 2003, doi:10.1214/aos/1056562461 (funnel); Haario et al. 1999 (banana); Rubin 1981
        (eight schools); Kim, Shephard & Chib 1998 (stochastic volatility)
Shapes  flat [dim]: the parameters by alphabet, as jax.flatten_util.ravel_pytree lays out a dict
Run     uv run python implementations/bayesian/targets.py
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import cauchy, norm
from jaxtyping import Array, Float

from implementations.bayesian.integrators import LogDensity
from implementations.bayesian.transforms import POSITIVE, REAL, Transform
from implementations.sources.tables import cars as car_table
from implementations.sources.tables import google
from implementations.sources.tables import tumours as tumour_table

Values = dict[str, Float[Array, "..."]]


class Parameter(NamedTuple):
    """A named unknown: the shape it has, and what keeps it where it may be."""

    shape: tuple[int, ...] = ()
    transform: Transform = REAL


class Moments(NamedTuple):
    """What is known exactly of one quantity, entry by entry."""

    mean: float | Float[np.ndarray, "..."]
    deviation: float | Float[np.ndarray, "..."]


class Target(NamedTuple):
    """A density to sample from."""

    name: str
    log_density: LogDensity
    """of the flat vector of free numbers; perhaps not normalised"""
    dimension: int
    free: Callable[[Float[Array, " dim"]], Values]
    """the flat vector cut into the free numbers of each parameter, by name"""
    unflatten: Callable[[Float[Array, " dim"]], Values]
    """the named, constrained parameters, and what follows from them"""
    moments: Mapping[str, Moments] = {}
    """of some of what `unflatten` names, where a formula is known"""


def build(
    name: str,
    parameters: Mapping[str, Parameter],
    log_joint: Callable[..., Float[Array, ""]],
    derived: Callable[..., Values] | None = None,
    moments: Mapping[str, Moments] | None = None,
) -> Target:
    """A target from its parameters and the log of their joint density with the data.

    Args:
        parameters: shape and transform of each, by name.
        log_joint: a function of the constrained parameters, by name.
        derived: what else follows from them, by name: a non-centred model's own parameters.
        moments: what is known exactly.
    """

    shapes = {n: parameters[n].transform.free_shape(parameters[n].shape) for n in parameters}

    def free(flat: Float[Array, " dim"]) -> Values:
        pieces, start = {}, 0
        for n in sorted(parameters):
            size = math.prod(shapes[n])
            pieces[n] = flat[start : start + size].reshape(shapes[n])
            start += size
        return pieces

    def constrained(flat: Float[Array, " dim"]) -> Values:
        return {n: parameters[n].transform.constrain(x) for n, x in free(flat).items()}

    def log_density(flat: Float[Array, " dim"]) -> Float[Array, ""]:
        stretch = sum(parameters[n].transform.log_det(x) for n, x in free(flat).items())
        return (log_joint(**constrained(flat)) + stretch).astype(flat.dtype)

    def unflatten(flat: Float[Array, " dim"]) -> Values:
        values = constrained(flat)
        return values | (derived(**values) if derived else {})

    dimension = sum(math.prod(shape) for shape in shapes.values())
    return Target(name, log_density, dimension, free, unflatten, moments or {})


def normal(value, mean=0.0, deviation=1.0) -> Float[Array, ""]:
    """Sum of the log-densities of independent normal numbers."""
    return jnp.sum(norm.logpdf(value, mean, deviation))


def standard_normal(dimension: int = 10) -> Target:
    """Independent standard normal numbers `x`."""
    return build(
        "standard_normal",
        {"x": Parameter((dimension,))},
        lambda x: normal(x),
        moments={"x": Moments(np.zeros(dimension), np.ones(dimension))},
    )


def normal_scales(dimension: int) -> Float[np.ndarray, " dim"]:
    """Standard deviations of the correlated normal, 0.1 to 10."""
    return np.geomspace(0.1, 10.0, dimension)


def normal_covariance(dimension: int) -> Float[np.ndarray, "dim dim"]:
    """Those scales, entries i and j correlated by 0.9^|i - j|."""
    place, scales = np.arange(dimension), normal_scales(dimension)
    return scales[:, None] * scales * 0.9 ** abs(place[:, None] - place)


def correlated_normal(dimension: int = 20) -> Target:
    """A normal vector `x` with mean zero and the covariance above."""
    precision = np.linalg.inv(normal_covariance(dimension))
    return build(
        "correlated_normal",
        {"x": Parameter((dimension,))},
        lambda x: -0.5 * x @ jnp.asarray(precision, x.dtype) @ x,
        moments={"x": Moments(np.zeros(dimension), normal_scales(dimension))},
    )


def funnel_moments(width: int) -> dict[str, Moments]:
    """Var(x) = E[exp(v)] = exp(9 / 2), of which most lies where v is rarely."""
    spread = np.full(width, math.exp(9 / 4))
    return {"v": Moments(0.0, 3.0), "x": Moments(np.zeros(width), spread)}


def funnel(dimension: int = 10) -> Target:
    """Neal's funnel: `v` is normal with deviation 3, each of `x` with deviation exp(v / 2)."""
    return build(
        "funnel",
        {"v": Parameter(), "x": Parameter((dimension - 1,))},
        lambda v, x: normal(v, 0.0, 3.0) + normal(x, 0.0, jnp.exp(v / 2)),
        moments=funnel_moments(dimension - 1),
    )


def funnel_non_centred(dimension: int = 10) -> Target:
    """The same `v` and `x` as functions of standard normal numbers."""
    return build(
        "funnel_non_centred",
        {"raw_v": Parameter(), "raw_x": Parameter((dimension - 1,))},
        lambda raw_v, raw_x: normal(raw_v) + normal(raw_x),
        lambda raw_v, raw_x: {"v": 3 * raw_v, "x": raw_x * jnp.exp(1.5 * raw_v)},
        funnel_moments(dimension - 1),
    )


def banana(bend: float = 0.03) -> Target:
    """A normal `x` with deviation 10; `y` is normal around the parabola bend (x² - 100)."""
    return build(
        "banana",
        {"x": Parameter(), "y": Parameter()},
        lambda x, y: normal(x, 0.0, 10.0) + normal(y, bend * (x**2 - 100.0)),
        # Var(x²) = 2 Var(x)² for a normal x
        moments={"x": Moments(0.0, 10.0), "y": Moments(0.0, math.sqrt(1 + 2e4 * bend**2))},
    )


SCHOOLS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
"""points that coaching added in each school (Rubin 1981, table 1)"""
SCHOOL_ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
"""their standard errors"""


def school_prior(mean: Float[Array, ""], spread: Float[Array, ""]) -> Float[Array, ""]:
    """Normal(0, 5) for the schools' mean, half-Cauchy(5) for their spread."""
    return normal(mean, 0.0, 5.0) + cauchy.logpdf(spread, 0.0, 5.0)


def eight_schools_centred() -> Target:
    """The schools' true effects `effect` around `mean`, sampled as they are."""
    return build(
        "eight_schools_centred",
        {"effect": Parameter((8,)), "mean": Parameter(), "spread": Parameter((), POSITIVE)},
        lambda effect, mean, spread: (
            school_prior(mean, spread)
            + normal(effect, mean, spread)
            + normal(SCHOOLS, effect, SCHOOL_ERRORS)
        ),
    )


def eight_schools_non_centred() -> Target:
    """The same posterior: effect = mean + spread · raw, and `raw` is sampled."""
    effect = lambda mean, spread, raw: mean + spread * raw  # noqa: E731
    return build(
        "eight_schools_non_centred",
        {"mean": Parameter(), "raw": Parameter((8,)), "spread": Parameter((), POSITIVE)},
        lambda mean, spread, raw: (
            school_prior(mean, spread)
            + normal(raw)
            + normal(SCHOOLS, effect(mean, spread, raw), SCHOOL_ERRORS)
        ),
        lambda mean, spread, raw: {"effect": effect(mean, spread, raw)},
    )


def standardised(column: Float[np.ndarray, "row *column"]) -> Float[np.ndarray, "row *column"]:
    """Columns with mean 0 and deviation 1."""
    return (column - column.mean(0)) / column.std(0)


def tumours() -> Target:
    """Is a tumour benign? Logistic regression with standard normal priors."""
    table, benign = tumour_table()
    measured, sign = standardised(table), 2.0 * benign - 1

    def log_joint(intercept: Float[Array, ""], slope: Float[Array, " feature"]) -> Float[Array, ""]:
        logit = intercept + jnp.asarray(measured, slope.dtype) @ slope
        likelihood = jax.nn.log_sigmoid(jnp.asarray(sign, slope.dtype) * logit)
        return normal(intercept) + normal(slope) + jnp.sum(likelihood)

    parameters = {"intercept": Parameter(), "slope": Parameter((measured.shape[1],))}
    return build("tumours", parameters, log_joint)


def car_columns() -> tuple[Float[np.ndarray, "car column"], Float[np.ndarray, " car"]]:
    """Weight (log) and year of each car, standardised; and its log miles a gallon."""
    table = car_table()
    columns = np.stack([np.log(table.weight), table.year], axis=1)
    return standardised(columns), np.log(table.miles)


def cars() -> Target:
    """Fuel economy by weight and year, each make with an `economy` of its own around `mean`."""
    columns, miles = car_columns()
    make, names = car_table().make, car_table().names

    def log_joint(mean, spread, economy, slope, noise) -> Float[Array, ""]:
        expected = economy[make] + jnp.asarray(columns, slope.dtype) @ slope
        prior = normal(mean, 3.0, 1.0) + normal(slope) + normal(spread) + normal(noise)
        return prior + normal(economy, mean, spread) + normal(miles, expected, noise)

    parameters = {
        "mean": Parameter(),
        "spread": Parameter((), POSITIVE),
        "economy": Parameter((len(names),)),
        "slope": Parameter((2,)),
        "noise": Parameter((), POSITIVE),
    }
    return build("cars", parameters, log_joint)


def returns(days: int) -> Float[np.ndarray, " day"]:
    """Google's daily returns in percent, on the last days of its series."""
    return 100 * np.diff(np.log(google()))[-days:]


def volatility(days: int = 150) -> Target:
    """Stochastic volatility: the log deviation of a day's return walks at random.

    log deviation of day t = level + step · (shock_1 + ... + shock_t)
    """
    seen = returns(days)
    path = lambda level, step, shock: level + step * jnp.cumsum(shock)  # noqa: E731

    def log_joint(level, step, shock) -> Float[Array, ""]:
        prior = normal(level) + normal(step, 0.0, 0.2) + normal(shock)
        return prior + normal(seen, 0.0, jnp.exp(path(level, step, shock)))

    return build(
        "volatility",
        {"level": Parameter(), "step": Parameter((), POSITIVE), "shock": Parameter((days,))},
        log_joint,
        lambda level, step, shock: {"log_deviation": path(level, step, shock)},
    )


TARGETS: dict[str, Callable[[], Target]] = {
    build_target.__name__: build_target
    for build_target in (
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
    for build_target in TARGETS.values():
        target = build_target()
        origin = jnp.zeros(target.dimension)
        shapes = {name: value.shape for name, value in target.unflatten(origin).items()}
        print(f"{target.name:26} {target.log_density(origin):12.2f} at the origin  {shapes}")


if __name__ == "__main__":
    main()
