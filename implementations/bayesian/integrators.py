"""Integrators: follow Hamilton's equations in steps that can be retraced and keep volume.

    H(q, p) = -log π(q) + |p|² / 2          dq/dt = L p          dp/dt = Lᵀ ∇log π(q)

    a scheme is a table of kicks and drifts, taken in turn, beginning and ending with a kick:
    kick    p <- p + k · step · Lᵀ ∇log π(q)        drift   q <- q + d · step · L p

L Lᵀ is the inverse mass. Momentum is measured in units in which it is standard normal, so that L is
all that is left of the metric. Every kick and every drift moves one half of the coordinates by a
function of the other half: its Jacobian has determinant one, and its opposite undoes it. A table
that reads the same from both ends is therefore reversible, and its energy error is even in the
step: order 2 for leapfrog, order 4 for Yoshida's three leapfrogs, the middle one backwards.

Paper   leapfrog: Verlet 1967, doi:10.1103/PhysRev.159.98
        order 4: Forest & Ruth 1990; Yoshida 1990, doi:10.1016/0375-9601(90)90092-3
Shapes  position, momentum, gradient [dim]    scale [dim] or [dim, dim]: L
Run     uv run python implementations/bayesian/integrators.py
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LogDensity = Callable[[Float[Array, " dim"]], Float[Array, ""]]
Metric = Float[Array, " dim"] | Float[Array, "dim dim"]
StepSize = Float[Array, ""] | float


class Phase(NamedTuple):
    """A point of phase space, with what the next kick and the energy need."""

    position: Float[Array, " dim"]
    momentum: Float[Array, " dim"]
    log_density: Float[Array, ""]
    gradient: Float[Array, " dim"]


class Scheme(NamedTuple):
    """Shares of a step: kicks[0], then drifts[i] and kicks[i + 1] in turn. Both sum to one."""

    kicks: tuple[float, ...]
    drifts: tuple[float, ...]


def composed(shares: tuple[float, ...]) -> Scheme:
    """Leapfrogs of these shares of a step, one after another; neighbouring half kicks are one."""
    inner = tuple((left + right) / 2 for left, right in pairwise(shares))
    return Scheme((shares[0] / 2, *inner, shares[-1] / 2), shares)


OUTER = 1 / (2 - 2 ** (1 / 3))  # 2 w³ + (1 - 2 w)³ = 0: the errors of third order cancel
LEAPFROG = composed((1.0,))
YOSHIDA = composed((OUTER, 1 - 2 * OUTER, OUTER))


def integrate(
    phase: Phase,
    log_density: LogDensity,
    step_size: StepSize,
    scale: Metric,
    scheme: Scheme = LEAPFROG,
) -> Phase:
    """One step of the scheme; a negative step size goes backwards.

    Args:
        phase: where to start, its gradient included: a step evaluates one gradient a drift.
        log_density: log π, up to a constant.
        step_size: time that passes, in units in which momentum is standard normal.
        scale: L, from `scale_of`.
        scheme: LEAPFROG, YOSHIDA or a table of your own.
    """
    position, momentum, value, gradient = phase
    momentum = momentum + scheme.kicks[0] * step_size * transposed_times(scale, gradient)
    for drift, kick in zip(scheme.drifts, scheme.kicks[1:], strict=True):
        position = position + drift * step_size * times(scale, momentum)
        value, gradient = jax.value_and_grad(log_density)(position)
        momentum = momentum + kick * step_size * transposed_times(scale, gradient)
    return Phase(position, momentum, value, gradient)


def energy(phase: Phase) -> Float[Array, ""]:
    """H = -log π + |p|² / 2."""
    return 0.5 * phase.momentum @ phase.momentum - phase.log_density


def scale_of(inverse_mass: Metric) -> Metric:
    """L with L Lᵀ = inverse mass: square roots of a diagonal, the Cholesky factor of a matrix."""
    return jnp.sqrt(inverse_mass) if inverse_mass.ndim == 1 else jnp.linalg.cholesky(inverse_mass)


def times(scale: Metric, vector: Float[Array, " dim"]) -> Float[Array, " dim"]:
    """L v."""
    return scale * vector if scale.ndim == 1 else scale @ vector


def transposed_times(scale: Metric, vector: Float[Array, " dim"]) -> Float[Array, " dim"]:
    """Lᵀ v."""
    return scale * vector if scale.ndim == 1 else vector @ scale


def main() -> None:
    def log_density(position):
        return -(position**4).sum() / 4

    position, momentum = jnp.array([1.0]), jnp.array([0.5])
    print("a quartic well: largest energy error over one unit of time")
    print("   step      leapfrog    order 4")
    with jax.enable_x64(True):
        for steps in (5, 10, 20, 40):
            errors = []
            for scheme in (LEAPFROG, YOSHIDA):
                gradient = jax.grad(log_density)(position.astype(float))
                start = Phase(*map(jnp.float64, (position, momentum, -0.25, gradient)))
                phase, worst = start, 0.0
                for _ in range(steps):
                    phase = integrate(phase, log_density, 1 / steps, jnp.ones(1), scheme)
                    worst = max(worst, abs(float(energy(phase) - energy(start))))
                errors.append(worst)
            print(f"   {1 / steps:5.3f}     {errors[0]:.1e}     {errors[1]:.1e}")


if __name__ == "__main__":
    main()
