"""Random-walk Metropolis: try a random step, take it always uphill and sometimes downhill.

    q' = q + step size · L noise        accept with probability min(1, π(q') / π(q))

The proposal is as likely from q' to q as from q to q', so the ratio of densities alone makes the
chain reversible: the flow from q to q' is min(π(q), π(q')) times a symmetric factor. It needs no
gradient, and pays for that with steps of size 1 / sqrt(dim).

    State   what the next step needs          init(position, log_density) -> State
    Info    for looking                       step(key, state, log_density, ...) -> (State, Info)

Paper   Metropolis et al. 1953, doi:10.1063/1.1699114
        2.38 / sqrt(dim) and acceptance 0.234: Roberts, Gelman & Gilks 1997,
        doi:10.1214/aoap/1034625254
Shapes  position, noise [dim]    inverse_mass [dim] or [dim, dim]: L Lᵀ, the shape of the step
Run     uv run python implementations/bayesian/metropolis.py
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from implementations.bayesian.integrators import LogDensity, Metric, StepSize, scale_of, times

Chain = TypeVar("Chain", bound=tuple)  # the State of whichever sampler


class State(NamedTuple):
    """Where the chain is."""

    position: Float[Array, " dim"]
    log_density: Float[Array, ""]


class Info(NamedTuple):
    """What one step did."""

    acceptance: Float[Array, ""]
    """the probability with which the proposal was accepted"""
    accepted: Bool[Array, ""]


def init(position: Float[Array, " dim"], log_density: LogDensity) -> State:
    """The state of a chain that stands at `position`."""
    return State(position, log_density(position))


def step(
    key: PRNGKeyArray,
    state: State,
    log_density: LogDensity,
    step_size: StepSize,
    inverse_mass: Metric,
) -> tuple[State, Info]:
    """One proposal, taken or not; `move` with randomness from `key`."""
    noise_key, uniform_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, state.position.shape, state.position.dtype)
    uniform = jax.random.uniform(uniform_key, (), state.position.dtype)
    return move(noise, uniform, state, log_density, step_size, inverse_mass)


def move(
    noise: Float[Array, " dim"],
    uniform: Float[Array, ""] | float,
    state: State,
    log_density: LogDensity,
    step_size: StepSize,
    inverse_mass: Metric,
) -> tuple[State, Info]:
    """Metropolis et al., section II, for a given noise and a given uniform."""
    position = state.position + step_size * times(scale_of(inverse_mass), noise)
    proposal = init(position, log_density)
    change = proposal.log_density - state.log_density
    return choose(uniform, change, proposal, state)


def choose(
    uniform: Float[Array, ""] | float,
    log_ratio: Float[Array, ""],
    proposal: Chain,
    state: Chain,
) -> tuple[Chain, Info]:
    """The proposal with probability min(1, exp(log_ratio)), else the state; NaN is never taken."""
    log_ratio = jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio)
    acceptance = jnp.exp(jnp.minimum(log_ratio, 0.0))  # exp of a large number would overflow
    accepted = uniform < acceptance
    kept = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), proposal, state)
    return kept, Info(acceptance, accepted)


def main() -> None:
    print("standard normal numbers, 20,000 steps of 2.38 / sqrt(dim)")
    for dim in (2, 8, 32):

        def log_density(position):
            return -0.5 * position @ position

        def draw(state, key, dim=dim):
            state, info = step(key, state, log_density, 2.38 / dim**0.5, jnp.ones(dim))
            return state, (state.position[0], info.acceptance)

        keys = jax.random.split(jax.random.key(0), 20_000)
        _, (first, rate) = jax.lax.scan(draw, init(jnp.zeros(dim), log_density), keys)
        print(f"  dim {dim:3}  acceptance {rate.mean():.3f}, ", end="")
        print(f"mean {first.mean():+.2f}, deviation {first.std():.2f}")


if __name__ == "__main__":
    main()
