"""The tree without recursion against the tree with recursion, against NumPyro, and in law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from implementations.bayesian.hmc import DIVERGENCE
from implementations.bayesian.integrators import Phase
from implementations.bayesian.nuts import Choice, State, choose_leaf, explore, init, step


def normal(position):
    return -0.5 * position @ position


def stretched(position):
    scales = jnp.array([1.0, 5.0, 0.3])
    return -0.5 * (position / scales) @ (position / scales)


def bent(position):
    a, b, c = position
    return -(a**4) / 4 - (b - a**2) ** 2 / 2 - jnp.cosh(c - b)


def narrow(position):
    """A funnel, in which some steps diverge."""
    return (
        -(position[0] ** 2) / 18
        - position[1:] @ position[1:] / 2 * jnp.exp(-position[0])
        - position[0] * (len(position) - 1) / 2
    )


# The reference: recursive, in NumPy, one list of leaves, nothing shared with the implementation


def recursive_nuts(momentum, coins, position, log_density, gradient, step_size):
    """Betancourt 2017, appendix A.3, as it is written there: subtrees are lists of leaves."""

    def energy(leaf):
        return leaf[1] @ leaf[1] / 2 - log_density(leaf[0])

    start = (position, momentum)
    start_energy = energy(start)
    steps = [0, 0.0]

    def weight(leaf):
        log_weight = start_energy - energy(leaf)
        return -np.inf if np.isnan(log_weight) else log_weight

    def leapfrog(leaf, size):
        half = leaf[1] + size / 2 * gradient(leaf[0])
        new = leaf[0] + size * half
        return new, half + size / 2 * gradient(new)

    def turning(leaves):
        inner = sum(p for _, p in leaves) - (leaves[0][1] + leaves[-1][1]) / 2
        return leaves[0][1] @ inner <= 0 or leaves[-1][1] @ inner <= 0

    def build(leaf, size, depth):
        """2^depth leaves beyond `leaf`, and whether they may be used, or diverge."""
        if depth == 0:
            new = leapfrog(leaf, size)
            steps[0] += 1
            steps[1] += min(1.0, np.exp(min(0.0, weight(new))))
            diverges = weight(new) < -DIVERGENCE
            return [new], not diverges, diverges
        near, good, diverges = build(leaf, size, depth - 1)
        if not good:
            return near, False, diverges
        far, good, diverges = build(near[-1], size, depth - 1)
        return near + far, good and not turning(near + far), diverges

    trajectory, kept, diverges, depth = [start], start, False, 0
    for side, which, move in coins:
        old_total = np.logaddexp.reduce([weight(leaf) for leaf in trajectory])
        forwards = side < 0.5
        leaf = trajectory[-1] if forwards else trajectory[0]
        new, good, diverges = build(leaf, step_size if forwards else -step_size, depth)
        depth += 1
        if not good:
            break
        new_total = np.logaddexp.reduce([weight(leaf) for leaf in new])
        if np.log(move) < new_total - old_total:
            kept = picked(new, [weight(leaf) for leaf in new], which)
        trajectory = trajectory + new if forwards else new[::-1] + trajectory
        if turning(trajectory):
            break
    return kept[0], energy(kept), steps[1] / steps[0], steps[0], depth, diverges


def picked(leaves, log_weights, uniform):
    """Leaf i replaces the one before with probability w_i / (w_1 + ... + w_i)."""
    kept, total = leaves[0], log_weights[0]
    for leaf, log_weight in zip(leaves[1:], log_weights[1:], strict=True):
        total = np.logaddexp(total, log_weight)
        share = np.exp(log_weight - total)
        if uniform <= share:
            kept, uniform = leaf, uniform / share
        else:
            uniform = (uniform - share) / (1 - share)
    return kept


@pytest.mark.parametrize(
    "log_density, sizes",
    [(stretched, (0.03, 0.1, 0.3, 0.55)), (bent, (0.05, 0.3, 1.0)), (narrow, (0.1, 0.5, 2.0))],
)
def test_equals_the_recursive_tree_on_the_same_randomness(log_density, sizes):
    """A chain of 12 draws for each step size in float64: every field, whole numbers exactly.

    1e-8: up to 127 steps of rounding at 1e-16, which a bent density multiplies.
    """
    rng = np.random.default_rng(0)
    depths, divergences = set(), 0
    with jax.enable_x64(True):
        ours = jax.jit(
            lambda m, c, s, size: explore(m, c, s, log_density, size, jnp.ones(3)),
        )
        value, slope = jax.jit(log_density), jax.jit(jax.grad(log_density))
        start = jax.jit(lambda position: init(position, log_density))
        for size in sizes:
            position = np.array([0.5, -0.5, 0.2])
            for _ in range(12):
                momentum, coins = rng.normal(size=3), rng.uniform(size=(7, 3))
                state = start(jnp.asarray(position))
                state, info = ours(jnp.asarray(momentum), jnp.asarray(coins), state, size)
                position, energy, acceptance, steps, depth, diverges = recursive_nuts(
                    momentum,
                    coins,
                    position,
                    lambda q: float(value(q)),
                    lambda q: np.asarray(slope(q)),
                    size,
                )
                np.testing.assert_allclose(state.position, position, rtol=1e-8, atol=1e-10)
                np.testing.assert_allclose(info.energy, energy, rtol=1e-8)
                np.testing.assert_allclose(info.acceptance, acceptance, rtol=1e-8, atol=1e-10)
                assert (info.steps, info.depth, info.divergent) == (steps, depth, diverges)
                np.testing.assert_allclose(state.log_density, value(position), rtol=1e-8)
                np.testing.assert_allclose(state.gradient, slope(position), rtol=1e-6, atol=1e-8)
                depths.add(depth)
                divergences += diverges
    assert len(depths) >= 3
    assert divergences > 0 or log_density is not narrow


def test_a_leaf_is_chosen_by_its_weight_with_one_uniform_for_all():
    """40,000 evenly spaced uniforms fall on 12 leaves as their weights demand, to 1 in 2,000."""
    log_weights = np.random.default_rng(0).normal(size=12)

    def chosen(uniform):
        state = State(jnp.zeros(1), jnp.zeros(()), jnp.zeros(1))
        choice = Choice(state, jnp.zeros(()), jnp.array(-jnp.inf))
        for leaf, log_weight in enumerate(log_weights):
            phase = Phase(jnp.full(1, float(leaf)), jnp.zeros(1), jnp.zeros(()), jnp.zeros(1))
            choice, uniform = choose_leaf(choice, phase, jnp.array(log_weight), uniform)
        return choice.state.position[0], choice.log_total

    with jax.enable_x64(True):
        uniforms = (jnp.arange(40_000) + 0.5) / 40_000
        leaves, totals = jax.jit(jax.vmap(chosen))(uniforms)
    share = np.bincount(np.asarray(leaves, int), minlength=12) / 40_000
    weight = np.exp(log_weights)
    np.testing.assert_allclose(share, weight / weight.sum(), atol=5e-4)
    np.testing.assert_allclose(totals, np.log(weight.sum()), rtol=1e-12)


def test_a_uniform_of_one_takes_the_first_leaf():
    """It comes up once in 2^24 times, and the state before the first leaf is none."""
    empty = State(jnp.zeros(1), jnp.zeros(()), jnp.zeros(1))
    phase = Phase(jnp.ones(1), jnp.zeros(1), jnp.array(-0.5), -jnp.ones(1))
    choice = Choice(empty, jnp.zeros(()), jnp.array(-jnp.inf))
    first, uniform = choose_leaf(choice, phase, jnp.array(-0.3), jnp.ones(()))
    assert first.state.log_density == -0.5 and uniform == 1
    second = phase._replace(log_density=jnp.array(-2.0))
    assert choose_leaf(first, second, jnp.array(0.5), uniform)[0].state.log_density == -0.5


def test_a_tree_has_a_leaf(unchecked):
    with pytest.raises(ValueError, match="depth of one at least, got 0"):
        step(jax.random.key(0), init(jnp.ones(2), normal), normal, 0.1, jnp.ones(2), max_depth=0)


def test_trees_are_as_long_as_numpyros():
    """Steps, acceptance and squared position of 2 x 1500 draws at one step size: both samplers'
    means differ by less than 4 standard errors, a false alarm in 1 of 5,000 seeds.

    Standard errors are of independent draws; a normal's squares are a little less than that.
    """
    from numpyro.infer import MCMC, NUTS

    count, start = 1500, jnp.full(5, 0.5)
    kernel = NUTS(
        potential_fn=lambda position: -normal(position),
        step_size=0.4,
        adapt_step_size=False,
        adapt_mass_matrix=False,
    )
    chain = MCMC(kernel, num_warmup=0, num_samples=count, progress_bar=False)
    chain.run(jax.random.key(0), init_params=start, extra_fields=("num_steps", "accept_prob"))
    fields = chain.get_extra_fields()
    theirs = (fields["num_steps"], fields["accept_prob"], (chain.get_samples() ** 2).mean(1))
    positions, info = chain_of(normal, start, 0.4, count)
    ours = (info.steps, info.acceptance, (positions**2).mean(1))
    for mine, other in zip(ours, theirs, strict=True):
        mine, other = np.asarray(mine, float), np.asarray(other, float)
        error = np.sqrt((mine.var() + other.var()) / count)
        assert abs(mine.mean() - other.mean()) < 4 * error


def chain_of(log_density, start, step_size, count, **options):
    def draw(state, key):
        state, info = step(key, state, log_density, step_size, jnp.ones_like(start), **options)
        return state, (state.position, info)

    keys = jax.random.split(jax.random.key(0), count)
    run = jax.jit(lambda state: jax.lax.scan(draw, state, keys)[1])
    return run(init(start, log_density))


def test_exact_draws_stay_exact():
    """One draw from each of 20,000 exact ones of a normal with deviations 1 and 3, at a step size
    near the edge of stability: the first four moments of both within 4 standard errors, a false
    alarm in 1 of 2,000 seeds."""
    count, scales = 20_000, np.array([1.0, 3.0])
    starts = jnp.asarray(scales) * jax.random.normal(jax.random.key(4), (count, 2))

    def uneven(position):
        return -0.5 * (position / jnp.asarray(scales)) @ (position / jnp.asarray(scales))

    def once(key, start):
        return step(key, init(start, uneven), uneven, 1.7, jnp.ones(2), max_depth=4)[0].position

    keys = jax.random.split(jax.random.key(3), count)
    after = np.asarray(jax.jit(jax.vmap(once))(keys, starts), float) / scales
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        errors = (after**power).mean(0) - mean
        assert (abs(errors) < 4 * np.sqrt(variance / count)).all(), (power, errors)


def test_depth_is_at_most_what_is_asked():
    _, info = chain_of(normal, jnp.zeros(2), 0.01, 5, max_depth=3)
    assert (info.depth == 3).all() and (info.steps == 7).all() and not info.divergent.any()


@pytest.mark.parametrize("beyond", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_no_number_away_from_the_start_is_a_divergence(beyond):
    def walled(position):
        return jnp.where(position[0] > 1, beyond, -0.5 * position @ position)

    positions, info = chain_of(walled, jnp.zeros(1), 0.3, 50)
    assert info.divergent.any() and not info.divergent.all()
    assert jnp.isfinite(positions).all() and (positions <= 1).all()
    assert jnp.isfinite(info.energy).all() and len(jnp.unique(positions)) > 10


def test_a_vmapped_draw_is_the_draw_alone():
    keys = jax.random.split(jax.random.key(0), 3)
    starts = jax.random.normal(jax.random.key(1), (3, 3))
    one = jax.jit(lambda key, start: step(key, init(start, bent), bent, 0.3, jnp.ones(3)))
    together, infos = jax.vmap(one)(keys, starts)
    for i in range(3):
        alone, info = one(keys[i], starts[i])
        np.testing.assert_allclose(together.position[i], alone.position, rtol=1e-5)
        assert infos.steps[i] == info.steps


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_both_dtypes(dtype):
    with jax.enable_x64(True):
        state = init(jnp.ones(3, dtype), bent)
        size, metric = jnp.asarray(0.2, dtype), jnp.eye(3, dtype=dtype)
        new, info = jax.jit(lambda key: step(key, state, bent, size, metric))(jax.random.key(0))
        assert {x.dtype for x in (*new, info.acceptance, info.energy)} == {jnp.dtype(dtype)}
