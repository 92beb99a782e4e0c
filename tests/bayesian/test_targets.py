"""Targets are the densities that they claim to be: NumPyro's models, and their known moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from numpyro.infer.util import potential_energy

from implementations.bayesian.targets import TARGETS, Parameter, build
from implementations.bayesian.targets_numpyro import MODELS
from implementations.bayesian.transforms import POSITIVE, SIMPLEX


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def points(dimension: int, count: int = 3) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(count, dimension)))


@pytest.mark.parametrize("name", TARGETS)
def test_is_numpyros_model(name):
    """Log-densities equal up to one constant, gradients equal, both at rtol 1e-10."""
    target, model = TARGETS[name](), MODELS[name]
    theirs = jax.jit(jax.value_and_grad(lambda x: -potential_energy(model, (), {}, target.free(x))))
    ours = jax.jit(jax.value_and_grad(target.log_density))
    constants = []
    for point in points(target.dimension):
        (value, gradient), (expected, expected_gradient) = ours(point), theirs(point)
        scale = abs(expected_gradient).max()
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-10 * scale)
        constants.append([value, expected])
    ours, theirs = np.array(constants).T
    np.testing.assert_allclose(np.diff(ours), np.diff(theirs), rtol=1e-10)


@pytest.mark.parametrize("name", TARGETS)
def test_flat_vector_is_jaxs_own_layout(name):
    """ravel_pytree of the named free numbers gives the flat vector back."""
    target = TARGETS[name]()
    point = points(target.dimension)[0]
    flat, _ = ravel_pytree(target.free(point))
    np.testing.assert_array_equal(flat, point)


@pytest.mark.parametrize("name", TARGETS)
def test_keeps_the_dtype_of_the_position(name):
    """A float32 chain stays float32 where float64 is allowed."""
    target = TARGETS[name]()
    for dtype in (jnp.float32, jnp.float64):
        position = jax.ShapeDtypeStruct((target.dimension,), dtype)
        assert jax.eval_shape(target.log_density, position).dtype == dtype


def grid_of(first: np.ndarray, second: np.ndarray) -> jax.Array:
    return jnp.stack(jnp.meshgrid(jnp.asarray(first), jnp.asarray(second), indexing="ij"), -1)


def banana_grid() -> tuple[jax.Array, jax.Array]:
    grid = grid_of(np.linspace(-80, 80, 801), np.linspace(-15, 201, 1081))
    return grid, jnp.ones(grid.shape[:2])


def funnel_grid() -> tuple[jax.Array, jax.Array]:
    """v as it is and x in units of its deviation, so that the grid is as fine in the neck."""
    grid = grid_of(np.linspace(-30, 40, 1401), np.linspace(-9, 9, 361))
    unit = jnp.exp(grid[..., 0] / 2)
    return grid.at[..., 1].multiply(unit), unit


def non_centred_grid() -> tuple[jax.Array, jax.Array]:
    grid = grid_of(np.linspace(-10, 14, 481), np.linspace(-9, 9, 361))[..., ::-1]
    return grid[..., ::-1], jnp.ones(grid.shape[:2])


@pytest.mark.parametrize(
    "name, grid",
    [("banana", banana_grid), ("funnel", funnel_grid), ("funnel_non_centred", non_centred_grid)],
)
def test_known_moments_by_quadrature(name, grid):
    """Mean and deviation by summing the density over a grid of its first two numbers.

    The trapezoid rule on smooth functions that vanish at the ends errs by less than 1e-8 here.
    """
    target = TARGETS[name]() if name == "banana" else TARGETS[name](2)
    points, area = grid()
    weights = area * jnp.exp(jax.jit(jax.vmap(jax.vmap(target.log_density)))(points))
    values = jax.jit(jax.vmap(jax.vmap(target.unflatten)))(points)
    for quantity, known in target.moments.items():
        value = values[quantity].reshape(weights.shape)
        mean = (weights * value).sum() / weights.sum()
        deviation = jnp.sqrt((weights * (value - mean) ** 2).sum() / weights.sum())
        np.testing.assert_allclose(mean, np.squeeze(known.mean), atol=1e-8 * deviation)
        np.testing.assert_allclose(deviation, np.squeeze(known.deviation), rtol=1e-8)


@pytest.mark.parametrize("name", ["standard_normal", "correlated_normal"])
def test_known_deviations_are_the_hessians(name):
    """A normal's covariance is the inverse of minus the Hessian, rtol 1e-10."""
    target = TARGETS[name]()
    hessian = jax.jit(jax.hessian(target.log_density))(points(target.dimension)[0])
    variances = np.diag(np.linalg.inv(-hessian))
    np.testing.assert_allclose(np.sqrt(variances), target.moments["x"].deviation, rtol=1e-10)


def test_two_forms_of_eight_schools_are_one_posterior():
    """Densities differ by the determinant of raw -> effect, spread^8, and a constant."""
    centred, free = TARGETS["eight_schools_centred"](), TARGETS["eight_schools_non_centred"]()

    @jax.jit
    @jax.vmap
    def gap(point):
        values = free.unflatten(point)
        log_spread = jnp.log(values["spread"])
        flat = jnp.concatenate([values["effect"], jnp.stack([values["mean"], log_spread])])
        return free.log_density(point) - centred.log_density(flat) - 8 * log_spread

    gaps = gap(points(10))
    np.testing.assert_allclose(gaps, gaps[0], rtol=1e-10, atol=1e-10)


def test_density_of_a_constrained_parameter_keeps_its_mass():
    """By hand: a gamma density, integrated over the free line, is Γ(3) / 3³."""
    target = build(
        "gamma", {"rate": Parameter((), POSITIVE)}, lambda rate: 2 * jnp.log(rate) - 3 * rate
    )
    x = jnp.linspace(-25, 5, 3001)
    mass = jnp.trapezoid(jnp.exp(jax.vmap(target.log_density)(x[:, None])), x)
    np.testing.assert_allclose(mass, 2 / 27, rtol=1e-10)


def test_dimension_counts_free_numbers():
    """A simplex of 4 has 3, and the flat vector is laid out by alphabet."""
    parameters = {"b": Parameter((4,), SIMPLEX), "a": Parameter((2,))}
    target = build("mixed", parameters, lambda a, b: a.sum() + b.sum())
    assert target.dimension == 5
    values = target.unflatten(jnp.array([1.0, 2, 0, 0, 0]))
    assert values["a"].tolist() == [1, 2]
    np.testing.assert_allclose(values["b"], np.full(4, 0.25), rtol=1e-12)
