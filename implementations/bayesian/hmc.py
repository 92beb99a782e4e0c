"""Hamiltonian Monte Carlo: throw the particle, let it fly, keep where it lands if energy allows.

    p ~ N(0, I)      (q', p') = a number of leapfrog steps from (q, p)      p' <- -p'
    accept q' with probability min(1, exp(H(q, p) - H(q', p')))

Turning the momentum round makes the flight its own inverse, which detailed balance needs. It need
not be computed: H has only |p|² in it, and the next step throws the momentum away.

    State   what the next step needs          init(position, log_density) -> State
    Info    for looking                       step(key, state, log_density, ...) -> (State, Info)

Paper   Duane et al. 1987, doi:10.1016/0370-2693(87)91197-X; Neal 2011, arXiv:1206.1901
Shapes  position, gradient [dim]    inverse_mass [dim] or [dim, dim]
Naive   hmc_numpy.py: the same in NumPy, for reading
Run     uv run python implementations/bayesian/hmc.py
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from implementations.bayesian.integrators import (
    LEAPFROG,
    LogDensity,
    Metric,
    Phase,
    Scheme,
    StepSize,
    energy,
    integrate,
    scale_of,
)

DIVERGENCE = 1000.0
"""an energy error that no useful step makes: exp(-1000) is zero in every dtype (Stan's number)"""


class State(NamedTuple):
    """Where the chain is, with what was computed there."""

    position: Float[Array, " dim"]
    log_density: Float[Array, ""]
    gradient: Float[Array, " dim"]


class Info(NamedTuple):
    """What one step did."""

    acceptance: Float[Array, ""]
    """the probability with which the proposal was accepted"""
    accepted: Bool[Array, ""]
    energy: Float[Array, ""]
    """H of the state that was kept, with the momentum that it had"""
    divergent: Bool[Array, ""]
    """the energy error was over 1000, or not a number"""


def init(position: Float[Array, " dim"], log_density: LogDensity) -> State:
    """The state of a chain that stands at `position`."""
    return State(position, *jax.value_and_grad(log_density)(position))


def step(
    key: PRNGKeyArray,
    state: State,
    log_density: LogDensity,
    step_size: StepSize,
    inverse_mass: Metric,
    steps: Int[Array, ""] | int = 10,
    scheme: Scheme = LEAPFROG,
) -> tuple[State, Info]:
    """One flight of `steps` steps; `fly` with randomness from `key`."""
    momentum_key, uniform_key = jax.random.split(key)
    shape, dtype = state.position.shape, state.position.dtype
    momentum = jax.random.normal(momentum_key, shape, dtype)
    uniform = jax.random.uniform(uniform_key, (), dtype)
    return fly(momentum, uniform, state, log_density, step_size, inverse_mass, steps, scheme)


def fly(
    momentum: Float[Array, " dim"],
    uniform: Float[Array, ""],
    state: State,
    log_density: LogDensity,
    step_size: StepSize,
    inverse_mass: Metric,
    steps: Int[Array, ""] | int = 10,
    scheme: Scheme = LEAPFROG,
) -> tuple[State, Info]:
    """Neal 2011, figure 2, for a given momentum (in units of the metric) and a given uniform."""
    scale = scale_of(inverse_mass)
    start = Phase(state.position, momentum, state.log_density, state.gradient)

    def advance(_, phase: Phase) -> Phase:
        return integrate(phase, log_density, step_size, scale, scheme)

    end = jax.lax.fori_loop(0, steps, advance, start)
    change = energy(end) - energy(start)
    # Neither NaN nor an infinite density is a place to go to.
    change = jnp.where(jnp.isfinite(change), change, jnp.inf)
    acceptance = jnp.minimum(1.0, jnp.exp(-change))
    accepted = uniform < acceptance
    proposal = State(end.position, end.log_density, end.gradient)
    kept = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), proposal, state)
    final_energy = jnp.where(accepted, energy(end), energy(start))
    return kept, Info(acceptance, accepted, final_energy, change > DIVERGENCE)


def main() -> None:
    def log_density(position):
        return -0.5 * (position / jnp.array([1.0, 10.0])) @ (position / jnp.array([1.0, 10.0]))

    print("a normal with standard deviations 1 and 10, 2000 flights of 3 steps")
    for name, inverse_mass in {"unit": jnp.ones(2), "its variances": jnp.array([1, 100.0])}.items():

        def draw(state, key, inverse_mass=inverse_mass):
            state, info = step(key, state, log_density, 0.9, inverse_mass, steps=3)
            return state, (state.position, info.acceptance)

        keys = jax.random.split(jax.random.key(0), 2000)
        _, (positions, rate) = jax.lax.scan(draw, init(jnp.zeros(2), log_density), keys)
        spread = positions.std(0)
        print(f"  inverse mass {name:14} found {spread[0]:.2f} and {spread[1]:.2f}, ", end="")
        print(f"acceptance {rate.mean():.2f}")


if __name__ == "__main__":
    main()
