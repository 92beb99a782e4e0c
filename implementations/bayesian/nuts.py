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
    """
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
        coins: uniforms, a row for each doubling: its direction, its leaf, and whether to move to it.
    """
    scale = scale_of(inverse_mass)
    start = Phase(state.position, momentum, state.log_density, state.gradient)
    start_energy = energy(start)
    zero, false = jnp.zeros_like(start_energy), jnp.array(False)
    both = lambda x: jnp.stack((x, x))  # noqa: E731
    tree = Tree(
        jnp.array(0),
        jnp.array(0),
        both(state.position),
        both(momentum),
        both(state.gradient),
        momentum,
        Choice(state, zero, zero),
        false,
        false,
        zero,
    )

    def growing(tree: Tree) -> Bool[Array, ""]:
        return (tree.depth < len(coins)) & ~tree.turning & ~tree.divergent

    def double(tree: Tree) -> Tree:
        side, which, move = coins[tree.depth]
        end = (side < 0.5).astype(int)
        signed = jnp.where(side < 0.5, step_size, -step_size)
        last = Phase(tree.position[end], tree.momentum[end], zero, tree.gradient[end])
        new = grow(
            last,
            tree.depth,
            which,
            len(coins),
            start_energy,
            lambda phase: integrate(phase, log_density, signed, scale),
        )
        return merge(tree, new, end, move)

    tree = jax.lax.while_loop(growing, double, tree)
    info = Info(
        tree.acceptance_sum / tree.steps,
        start_energy - tree.choice.log_weight,
        tree.divergent,
        tree.depth,
        tree.steps,
    )
    return tree.choice.state, info


def grow(last, depth, uniform, max_depth, start_energy, advance) -> Subtree:
    """2^depth new leaves, or fewer where a subtree turns or a step diverges."""
    zero, false = jnp.zeros_like(start_energy), jnp.array(False)
    state = State(last.position, zero, last.gradient)
    table = jnp.zeros((max_depth, len(last.position)), last.position.dtype)
    empty = Subtree(
        jnp.array(0),
        last,
        Choice(state, zero, zero - jnp.inf),
        uniform,
        jnp.zeros_like(last.momentum),
        table,
        table,
        false,
        false,
        zero,
    )

    def growing(tree: Subtree) -> Bool[Array, ""]:
        return (tree.leaf < 2**depth) & ~tree.turning & ~tree.divergent

    def add_leaf(tree: Subtree) -> Subtree:
        phase = advance(tree.last)
        log_weight = start_energy - energy(phase)
        log_weight = jnp.where(jnp.isnan(log_weight), -jnp.inf, log_weight)
        choice, uniform = choose_leaf(tree.choice, phase, log_weight, tree.uniform)
        momentum_sum = tree.momentum_sum + phase.momentum
        row = jax.lax.population_count(tree.leaf >> 1)
        even = tree.leaf % 2 == 0
        first_momenta = tree.first_momenta.at[jnp.where(even, row, max_depth)].set(
            phase.momentum, mode="drop"
        )
        sums_before = tree.sums_before.at[jnp.where(even, row, max_depth)].set(
            tree.momentum_sum, mode="drop"
        )
        closed = jax.lax.population_count(tree.leaf & ~(tree.leaf + 1))
        rows = jnp.arange(max_depth)
        ends_here = (rows <= row) & (rows > row - closed)
        turning = turns(first_momenta, phase.momentum, momentum_sum - sums_before) & ends_here
        return Subtree(
            tree.leaf + 1,
            phase,
            choice,
            uniform,
            momentum_sum,
            first_momenta,
            sums_before,
            turning.any(),
            log_weight < -DIVERGENCE,
            tree.acceptance_sum + jnp.minimum(1.0, jnp.exp(log_weight)),
        )

    return jax.lax.while_loop(growing, add_leaf, empty)


def choose_leaf(choice, phase, log_weight, uniform):
    """Move to the new leaf with probability weight / total.

    A uniform that has decided once is uniform again on the side on which it fell.
    """
    log_total = jnp.logaddexp(choice.log_total, log_weight)
    share = jnp.exp(log_weight - log_total)
    moved = uniform < share
    uniform = jnp.where(moved, uniform / share, (uniform - share) / (1 - share))
    new = State(phase.position, phase.log_density, phase.gradient)
    state = jax.tree.map(lambda a, b: jnp.where(moved, a, b), new, choice.state)
    return Choice(state, jnp.where(moved, log_weight, choice.log_weight), log_total), uniform


def turns(
    left: Float[Array, "*#rows dim"],
    right: Float[Array, "*#rows dim"],
    total: Float[Array, "*rows dim"],
) -> Bool[Array, "*rows"]:
    """Whether a stretch of trajectory has begun to come back, at either end."""
    inner = total - (left + right) / 2
    return ((left * inner).sum(-1) <= 0) | ((right * inner).sum(-1) <= 0)


def merge(tree: Tree, new: Subtree, end: Int[Array, ""], uniform: Float[Array, ""]) -> Tree:
    """Add the new half, and move into it with probability min(1, its weight / the old weight)."""
    whole = ~new.turning & ~new.divergent
    moved = whole & (jnp.log(uniform) < new.choice.log_total - tree.choice.log_total)
    log_total = jnp.logaddexp(tree.choice.log_total, new.choice.log_total)
    choice = jax.tree.map(lambda a, b: jnp.where(moved, a, b), new.choice, tree.choice)
    momentum = tree.momentum.at[end].set(new.last.momentum)
    momentum_sum = tree.momentum_sum + new.momentum_sum
    return Tree(
        tree.depth + 1,
        tree.steps + new.leaf,
        tree.position.at[end].set(new.last.position),
        momentum,
        tree.gradient.at[end].set(new.last.gradient),
        momentum_sum,
        choice._replace(log_total=log_total),
        ~whole | turns(momentum[0], momentum[1], momentum_sum),
        new.divergent,
        tree.acceptance_sum + new.acceptance_sum,
    )


def main() -> None:
    pass


if __name__ == "__main__":
    main()
