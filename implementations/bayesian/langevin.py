"""MALA: drift uphill along the gradient, add noise, and correct for the drift by Metropolis.

    q' = q + step size² / 2 · M⁻¹ ∇log π(q) + step size · L noise,        L Lᵀ = M⁻¹
    accept with probability min(1, π(q') k(q' -> q) / (π(q) k(q -> q')))

The drift makes the way there and the way back unequally likely, so their densities k enter the
ratio. The way back needs another noise, -(noise + step size / 2 · Lᵀ (∇log π(q) + ∇log π(q'))),
and the ratio of the k is that of two standard normal densities. The same numbers are one leapfrog
of Hamiltonian Monte Carlo: the noises are the momenta at its two ends.

    State   what the next step needs          init(position, log_density) -> State
    Info    for looking                       step(key, state, log_density, ...) -> (State, Info)

Paper   Roberts & Tweedie 1996, doi:10.2307/3318418
        step size ~ dim^(-1/6) and acceptance 0.574: Roberts & Rosenthal 1998,
        doi:10.1111/1467-9868.00123
Shapes  position, gradient, noise [dim]    inverse_mass [dim] or [dim, dim]
Run     uv run python implementations/bayesian/langevin.py
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from implementations.bayesian.hmc import State, init
from implementations.bayesian.integrators import (
    LogDensity,
    Metric,
    StepSize,
    scale_of,
    times,
    transposed_times,
)
from implementations.bayesian.metropolis import Info, choose

__all__ = ["Info", "State", "init", "move", "step"]


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
    """Roberts & Tweedie, section 1.4, for a given noise and a given uniform."""
    scale = scale_of(inverse_mass)
    half = step_size / 2
    forward = noise + half * transposed_times(scale, state.gradient)
    proposal = init(state.position + step_size * times(scale, forward), log_density)
    backward = forward + half * transposed_times(scale, proposal.gradient)  # its sign is squared
    log_ratio = proposal.log_density - state.log_density
    log_ratio += 0.5 * noise @ noise - 0.5 * backward @ backward
    return choose(uniform, log_ratio, proposal, state)


def main() -> None:
    print("standard normal numbers, 20,000 steps of 1.65 / dim^(1/6)")
    for dim in (2, 8, 32):

        def log_density(position):
            return -0.5 * position @ position

        def draw(state, key, dim=dim):
            state, info = step(key, state, log_density, 1.65 / dim ** (1 / 6), jnp.ones(dim))
            return state, (state.position[0], info.acceptance)

        keys = jax.random.split(jax.random.key(0), 20_000)
        _, (first, rate) = jax.lax.scan(draw, init(jnp.zeros(dim), log_density), keys)
        print(f"  dim {dim:3}  acceptance {rate.mean():.3f}, ", end="")
        print(f"mean {first.mean():+.2f}, deviation {first.std():.2f}")


if __name__ == "__main__":
    main()
