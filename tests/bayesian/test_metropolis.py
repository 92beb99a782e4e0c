"""Random-walk Metropolis leaves its target alone: by brute force, by formula, by many chains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest

from implementations.bayesian.metropolis import choose, init, move, step


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_detailed_balance_on_a_lattice():
    """π_i T_ij = π_j T_ji for every pair, at rtol 1e-10, and π T = π.

    Twelve points with random densities, one of them zero; the noise is -1 or +1, each with
    probability 1/2. The matrix T is made of the acceptances that `move` reports.
    """
    heights = np.append(np.random.default_rng(0).normal(0, 2, size=11), -np.inf)
    table = jnp.asarray(heights)

    def log_density(position):
        place = position[0].round().astype(int)
        return jnp.where((place >= 0) & (place < 12), table[place], -jnp.inf)

    @jax.jit
    def acceptance(here, noise):
        state = init(here[None], log_density)
        return move(noise[None], 0.5, state, log_density, 1.0, jnp.ones(1))[1].acceptance

    transition = np.zeros((12, 12))
    for here in range(11):  # a chain never stands where the density is zero
        for there in {here - 1, here + 1} & set(range(12)):
            transition[here, there] = 0.5 * acceptance(jnp.float64(here), jnp.float64(there - here))
        transition[here, here] = 1 - transition[here].sum()
    density = np.exp(heights)
    flow = density[:, None] * transition
    np.testing.assert_allclose(flow, flow.T, rtol=1e-10)
    np.testing.assert_allclose(density @ transition, density, rtol=1e-10)
    assert transition[10, 11] == 0
    assert transition.diagonal()[:11].max() > 0.5  # some moves are refused: the test has teeth


def test_equals_numpy_by_hand():
    """A dense metric, a correlated density, 50 random noises and uniforms, at rtol 1e-10."""
    rng = np.random.default_rng(1)
    precision, metric = np.array([[2.0, 0.6], [0.6, 1.0]]), np.array([[1.0, -0.3], [-0.3, 0.5]])
    factor = np.linalg.cholesky(metric)
    log_density = lambda x: -0.5 * x @ jnp.asarray(precision) @ x  # noqa: E731
    starts, noises, uniforms = (
        rng.normal(size=(50, 2)),
        rng.normal(size=(50, 2)),
        rng.uniform(size=50),
    )

    @jax.jit
    @jax.vmap
    def ours(start, noise, uniform):
        state = init(start, log_density)
        return move(noise, uniform, state, log_density, 0.7, jnp.asarray(metric))

    kept, info = ours(*map(jnp.asarray, (starts, noises, uniforms)))
    theres = starts + 0.7 * noises @ factor.T
    energies = (0.5 * np.einsum("ni,ij,nj->n", x, precision, x) for x in (starts, theres))
    ratios = np.exp(np.subtract(*energies))
    taken = uniforms < ratios
    positions = np.where(taken[:, None], theres, starts)
    assert 0 < taken.sum() < 50
    np.testing.assert_allclose(info.acceptance, np.minimum(ratios, 1), rtol=1e-10)
    np.testing.assert_array_equal(info.accepted, taken)
    np.testing.assert_allclose(kept.position, positions, rtol=1e-10)
    np.testing.assert_allclose(kept.log_density, jax.vmap(log_density)(positions), rtol=1e-10)


def many(dimension: int, count: int, rounds: int, step_size: float):
    """`count` chains that start at exact draws, and what they are after some rounds."""

    def log_density(position):
        return -0.5 * position @ position

    @jax.jit
    @jax.vmap
    def chain(key):
        start_key, key = jax.random.split(key)
        state = init(jax.random.normal(start_key, (dimension,), jnp.float64), log_density)

        def advance(state, key):
            return step(key, state, log_density, step_size, jnp.ones(dimension))

        return jax.lax.scan(advance, state, jax.random.split(key, rounds))

    return chain(jax.random.split(jax.random.key(2), count))


@pytest.mark.parametrize("step_size", [0.5, 2.4, 10.0])
def test_acceptance_on_a_normal_is_known(step_size):
    """In one dimension the mean acceptance is 2/π arctan(2 / step).

    40,000 independent chains; five standard errors are exceeded with probability 6e-7.
    """
    _, info = many(1, 40_000, 1, step_size)
    error = info.acceptance.std() / 200
    assert abs(info.acceptance.mean() - 2 / np.pi * np.arctan(2 / step_size)) < 5 * error
    taken = info.accepted.mean()
    assert abs(taken - info.acceptance.mean()) < 5 * 0.5 / 200


def test_many_chains_stay_normal():
    """20 steps from exact draws are exact draws: KS of 40,000, false alarms 1e-4 in each of two."""
    state, _ = many(2, 40_000, 20, 1.0)
    for column in state.position.T:
        assert kstest(np.asarray(column), "norm").pvalue > 1e-4


def test_noise_and_uniform_are_independent():
    """Had both one key, large noises would go with large uniforms; |correlation| < 5 / sqrt(n)."""
    flat = lambda x: 0 * x.sum()  # noqa: E731
    half = lambda x: jnp.where(jnp.abs(x[0]) > 0, -jnp.log(2.0), 0.0)  # noqa: E731

    def one(key, density):
        state = init(jnp.zeros(1), density)
        moved, info = step(key, state, density, 1.0, jnp.ones(1))
        return moved.position[0], info.accepted

    @jax.jit
    @jax.vmap
    def both(key):  # always taken; taken if the uniform is below 1/2
        return one(key, flat)[0], one(key, half)[1]

    noise, accepted = both(jax.random.split(jax.random.key(3), 10_000))
    assert 0.45 < accepted.mean() < 0.55
    assert abs(np.corrcoef(noise, accepted)[0, 1]) < 5 / 100


@pytest.mark.parametrize("ratio, taken", [(jnp.nan, False), (-jnp.inf, False), (jnp.inf, True)])
def test_what_is_not_a_number_is_never_taken(ratio, taken):
    """Also with uniform 0, for which `0 <= NaN` and `log 0 < ...` have been wrong elsewhere."""
    old, new = init(jnp.zeros(1), jnp.sum), init(jnp.ones(1), jnp.sum)
    kept, info = choose(jnp.float64(0.0), jnp.float64(ratio), new, old)
    assert bool(info.accepted) is taken
    assert float(kept.position[0]) == taken
    assert 0 <= float(info.acceptance) <= 1


def test_certain_moves_are_always_taken():
    """The largest uniform is below 1, so a ratio of 1 is never refused."""
    old, new = init(jnp.zeros(1), jnp.sum), init(jnp.ones(1), jnp.sum)
    kept, _ = choose(jnp.nextafter(jnp.float64(1), jnp.float64(0)), jnp.float64(0.0), new, old)
    assert float(kept.position[0]) == 1
