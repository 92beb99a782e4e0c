"""The No-U-Turn Sampler: double the trajectory until it turns back, then keep one of its points.

    tree      2^depth points in a row; a new half is added in front or behind, on a fair coin
    weight    a point weighs exp(-H): the draw is multinomial over the trajectory
    turning   p_left · ρ <= 0 or p_right · ρ <= 0, ρ = sum of p - (p_left + p_right) / 2

A doubled half is thrown away if any of its own binary subtrees turns, else the chain could not have
come from there. Recursion would visit those subtrees; here leaves are made one after another, and a
leaf with an odd number closes every subtree that ends with it. What the check needs of a subtree's
first leaf is kept in a row of a small table: the number of ones in (leaf >> 1) names the row, and
the trailing ones of an odd leaf count the subtrees that it closes.

Momentum is in units of the metric, where velocity and momentum are one (see integrators.py).

Paper   Hoffman & Gelman 2014, arXiv:1111.4246; Betancourt 2017, arXiv:1701.02434, appendix A
        iterative: Phan, Pradhan & Jankowiak 2019, arXiv:1912.11554, section 3
Shapes  position, gradient [dim]    inverse_mass [dim] or [dim, dim]
Run     uv run python implementations/bayesian/nuts.py
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from implementations.bayesian.hmc import DIVERGENCE, State, init
from implementations.bayesian.integrators import (
    LogDensity,
    Metric,
    Phase,
    StepSize,
    energy,
    integrate,
    scale_of,
)

__all__ = ["Info", "State", "init", "step"]


class Info(NamedTuple):
    """What one step did."""

    acceptance: Float[Array, ""]
    """mean over the trajectory of min(1, exp(H(start) - H)): what the step size is tuned on"""
    energy: Float[Array, ""]
    """H of the point that was kept"""
    divergent: Bool[Array, ""]
    """some point's energy error was over 1000, or not a number"""
    depth: Int[Array, ""]
    """how often the trajectory was doubled"""
    steps: Int[Array, ""]
    """leapfrog steps, each one gradient"""


class Choice(NamedTuple):
    """A point drawn from a stretch of trajectory, and the weight of the stretch."""

    state: State
    log_weight: Float[Array, ""]
    """of the chosen point, against the start's"""
    log_total: Float[Array, ""]
    """of all points"""


class Subtree(NamedTuple):
    """A new half of the trajectory, as far as it has grown."""

    leaf: Int[Array, ""]
    last: Phase
    choice: Choice
    uniform: Float[Array, ""]
    momentum_sum: Float[Array, " dim"]
    first_momenta: Float[Array, "depth dim"]
    """of each open subtree, the momentum of its first leaf"""
    sums_before: Float[Array, "depth dim"]
    """of each open subtree, the sum of the momenta before it"""
    turning: Bool[Array, ""]
    divergent: Bool[Array, ""]
    acceptance_sum: Float[Array, ""]


class Tree(NamedTuple):
    """The whole trajectory."""

    depth: Int[Array, ""]
    steps: Int[Array, ""]
    position: Float[Array, "end dim"]
    """of the first and the last point"""
    momentum: Float[Array, "end dim"]
    gradient: Float[Array, "end dim"]
    momentum_sum: Float[Array, " dim"]
    choice: Choice
    turning: Bool[Array, ""]
    divergent: Bool[Array, ""]
    acceptance_sum: Float[Array, ""]


def step(
    key: PRNGKeyArray,
    state: State,
    log_density: LogDensity,
    step_size: StepSize,
    inverse_mass: Metric,
    max_depth: int = 10,
) -> tuple[State, Info]:
    """One trajectory of at most 2^max_depth - 1 steps; `explore` with randomness from `key`.

    All randomness of a draw comes from one call: on a CPU a call costs as much as a few steps.

    Raises:
        ValueError: the tree may not even have one leaf.
    """
    if max_depth < 1:
        raise ValueError(f"a tree needs a depth of one at least, got {max_depth}")
    (dim,), dtype = state.position.shape, state.position.dtype
    edge = jnp.nextafter(jnp.array(-1, dtype), jnp.array(0, dtype))  # at -1 erf_inv is infinite
    uniform = jax.random.uniform(key, (dim + 3 * max_depth,), dtype, edge, 1.0)
    momentum = jnp.sqrt(2.0).astype(dtype) * jax.lax.erf_inv(uniform[:dim])
    coins = ((uniform[dim:] + 1) / 2).reshape(max_depth, 3)
    return explore(momentum, coins, state, log_density, step_size, inverse_mass)


def explore(
    momentum: Float[Array, " dim"],
    coins: Float[Array, "depth 3"],
    state: State,
    log_density: LogDensity,
    step_size: StepSize,
    inverse_mass: Metric,
) -> tuple[State, Info]:
    """Double the trajectory until it turns, diverges or has used up all coins.

    Args:
        momentum: standard normal.
        coins: uniforms in (0, 1], a row a doubling: its direction, its leaf, whether to go there.
    """
    scale = scale_of(inverse_mass)
    start = Phase(state.position, momentum, state.log_density, state.gradient)
    start_energy = energy(start)
    zero, false, none = jnp.zeros_like(start_energy), jnp.array(False), jnp.array(0)
    position, momenta, gradient = (
        jnp.stack((x, x)) for x in (start.position, momentum, start.gradient)
    )
    choice = Choice(state, zero, zero)
    ends = (position, momenta, gradient)
    tree = Tree(none, none, *ends, momentum, choice, false, false, zero)

    def growing(tree: Tree) -> Bool[Array, ""]:
        return (tree.depth < len(coins)) & ~tree.turning & ~tree.divergent

    def double(tree: Tree) -> Tree:
        side, which, move = coins[tree.depth]
        end = (side < 0.5).astype(int)
        signed = jnp.where(side < 0.5, step_size, -step_size)
        last = Phase(tree.position[end], tree.momentum[end], zero, tree.gradient[end])

        def advance(phase: Phase) -> Phase:
            return integrate(phase, log_density, signed, scale)

        new = grow(last, tree.depth, which, len(coins), start_energy, advance)
        return merge(tree, new, end, move)

    tree = jax.lax.while_loop(growing, double, tree)
    acceptance = tree.acceptance_sum / tree.steps
    kept_energy = start_energy - tree.choice.log_weight
    return tree.choice.state, Info(acceptance, kept_energy, tree.divergent, tree.depth, tree.steps)


def grow(
    last: Phase,
    depth: Int[Array, ""],
    uniform: Float[Array, ""],
    max_depth: int,
    start_energy: Float[Array, ""],
    advance: Callable[[Phase], Phase],
) -> Subtree:
    """2^depth new leaves beyond `last`, or fewer where a subtree turns or a step diverges."""
    zero, false = jnp.zeros_like(start_energy), jnp.array(False)
    nothing = Choice(State(last.position, zero, last.gradient), zero, zero - jnp.inf)
    table = jnp.zeros((max_depth, len(last.position)), last.position.dtype)
    no_sum = jnp.zeros_like(last.momentum)
    empty = Subtree(jnp.array(0), last, nothing, uniform, no_sum, table, table, false, false, zero)

    def growing(tree: Subtree) -> Bool[Array, ""]:
        return (tree.leaf < 2**depth) & ~tree.turning & ~tree.divergent

    def add_leaf(tree: Subtree) -> Subtree:
        phase = advance(tree.last)
        log_weight = start_energy - energy(phase)
        # Neither NaN nor an infinite density is a place to go to: both end the tree as divergences.
        log_weight = jnp.where(jnp.isfinite(log_weight), log_weight, -jnp.inf)
        choice, uniform = choose_leaf(tree.choice, phase, log_weight, tree.uniform)
        momentum_sum = tree.momentum_sum + phase.momentum
        row = jax.lax.population_count(tree.leaf >> 1)
        # Odd leaves open no subtree: what they write goes to the last row, which nobody reads.
        written = jnp.where(tree.leaf % 2 == 0, row, max_depth - 1)
        first_momenta = put(tree.first_momenta, phase.momentum, written)
        sums_before = put(tree.sums_before, tree.momentum_sum, written)
        return Subtree(
            tree.leaf + 1,
            phase,
            choice,
            uniform,
            momentum_sum,
            first_momenta,
            sums_before,
            closes_a_turn(tree.leaf, row, phase, momentum_sum, first_momenta, sums_before),
            log_weight < -DIVERGENCE,
            tree.acceptance_sum + jnp.minimum(1.0, jnp.exp(log_weight)),
        )

    return jax.lax.while_loop(growing, add_leaf, empty)


def closes_a_turn(
    leaf: Int[Array, ""],
    row: Int[Array, ""],
    phase: Phase,
    momentum_sum: Float[Array, " dim"],
    first_momenta: Float[Array, "depth dim"],
    sums_before: Float[Array, "depth dim"],
) -> Bool[Array, ""]:
    """Whether one of the subtrees that end with this leaf turns; the smallest is asked first."""
    closed = jax.lax.population_count(leaf & ~(leaf + 1))  # trailing ones

    def asking(carry: tuple) -> Bool[Array, ""]:
        row_asked, turning = carry
        return (row_asked > row - closed) & ~turning

    def ask(carry: tuple) -> tuple:
        row_asked, _ = carry
        total = momentum_sum - sums_before[row_asked]
        return row_asked - 1, turns(first_momenta[row_asked], phase.momentum, total)

    return jax.lax.while_loop(asking, ask, (row, jnp.array(False)))[1]


def put(
    table: Float[Array, "row dim"], values: Float[Array, " dim"], row: Int[Array, ""]
) -> Float[Array, "row dim"]:
    """The table with one row replaced: in place when compiled, which `table.at[row].set` is not."""
    return jax.lax.dynamic_update_index_in_dim(table, values, row, 0)


def choose_leaf(
    choice: Choice, phase: Phase, log_weight: Float[Array, ""], uniform: Float[Array, ""]
) -> tuple[Choice, Float[Array, ""]]:
    """Move to the new leaf with probability weight / total weight: multinomial in the end.

    A uniform that has decided once is uniform again on the side on which it fell, so that one is
    enough for all leaves; of its bits as many are used up as the choice among the leaves is worth.
    """
    log_total = jnp.logaddexp(choice.log_total, log_weight)
    share = jnp.exp(log_weight - log_total)
    moved = uniform <= share  # a uniform of 1 must take the first leaf, whose share is 1
    uniform = jnp.where(moved, uniform / share, (uniform - share) / (1 - share))
    new = State(phase.position, phase.log_density, phase.gradient)
    state = jax.tree.map(lambda a, b: jnp.where(moved, a, b), new, choice.state)
    return Choice(state, jnp.where(moved, log_weight, choice.log_weight), log_total), uniform


def turns(
    left: Float[Array, " dim"], right: Float[Array, " dim"], total: Float[Array, " dim"]
) -> Bool[Array, ""]:
    """Whether a stretch of trajectory has begun to come back, at either end."""
    inner = total - (left + right) / 2
    return (left @ inner <= 0) | (right @ inner <= 0)


def merge(tree: Tree, new: Subtree, end: Int[Array, ""], uniform: Float[Array, ""]) -> Tree:
    """Add the new half, and move into it with probability min(1, its weight / the old weight)."""
    whole = ~new.turning & ~new.divergent
    moved = whole & (jnp.log(uniform) < new.choice.log_total - tree.choice.log_total)
    log_total = jnp.logaddexp(tree.choice.log_total, new.choice.log_total)
    choice = jax.tree.map(lambda a, b: jnp.where(moved, a, b), new.choice, tree.choice)
    momentum = put(tree.momentum, new.last.momentum, end)
    momentum_sum = tree.momentum_sum + new.momentum_sum
    return Tree(
        tree.depth + 1,
        tree.steps + new.leaf,
        put(tree.position, new.last.position, end),
        momentum,
        put(tree.gradient, new.last.gradient, end),
        momentum_sum,
        choice._replace(log_total=log_total),
        ~whole | turns(momentum[0], momentum[1], momentum_sum),
        new.divergent,
        tree.acceptance_sum + new.acceptance_sum,
    )


def main() -> None:
    scales = jnp.linspace(1.0, 20.0, 20)

    def log_density(position):
        return -0.5 * (position / scales) @ (position / scales)

    def draw(state, key):
        state, info = step(key, state, log_density, 0.9, jnp.ones(20))
        return state, (state.position, info)

    start = init(jnp.zeros(20), log_density)
    _, (positions, info) = jax.lax.scan(draw, start, jax.random.split(jax.random.key(0), 1000))
    ratio = positions.std(0) / scales
    print("a normal with standard deviations 1, 2, ..., 20; unit metric, step size 0.9")
    print(f"  deviations found, over the true ones: {ratio.min():.2f} to {ratio.max():.2f}")
    depths, counts = jnp.unique(info.depth, return_counts=True)
    shown = ", ".join(f"{depth}: {count}" for depth, count in zip(depths, counts, strict=True))
    print(f"  trajectories by depth  {shown}")
    print(f"  acceptance {info.acceptance.mean():.2f}, {info.steps.mean():.0f} steps a draw")


if __name__ == "__main__":
    main()
