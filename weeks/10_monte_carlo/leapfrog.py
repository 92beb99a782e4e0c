"""Why leapfrog, when Euler's method is simpler and order 4 is more exact?

The same well is followed for a long time by Euler's method, by leapfrog and by Yoshida's scheme of
order 4. Then the energy error is measured against the step size, and the area that a step makes of
an area.

Expected: on a parabola, Euler multiplies the energy by 1 + step² in every step, whatever it does;
its determinant is the same number. Leapfrog keeps another energy exactly, one that differs from the
true one by terms of step², so that the true one swings and never runs away. Its determinant is 1,
and its error falls with step², Yoshida's with step⁴.

Paper   Neal 2011, arXiv:1206.1901, section 2; Leimkuhler & Reich 2004
Run     uv run python weeks/10_monte_carlo/leapfrog.py
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from implementations.bayesian.integrators import LEAPFROG, YOSHIDA, Phase, energy, integrate
from implementations.lab.findings import Finding, at_most, within
from implementations.lab.script import run


@dataclass(frozen=True)
class Config:
    """Follow one particle in a well."""

    step_size: float = 0.3
    """of the phase portraits"""
    steps: int = 20_000
    """how long the energy is watched"""


def parabola(position):
    return -0.5 * position @ position


def pendulum(position):
    return jnp.cos(position).sum()


def euler(phase: Phase, log_density: Callable, step_size: float) -> Phase:
    """Both halves move by what they were before the step."""
    position = phase.position + step_size * phase.momentum
    momentum = phase.momentum + step_size * phase.gradient
    return Phase(position, momentum, *jax.value_and_grad(log_density)(position))


def scheme(table) -> Callable:
    return lambda phase, log_density, step_size: integrate(
        phase, log_density, step_size, jnp.ones(1), table
    )


METHODS = {"Euler": euler, "leapfrog": scheme(LEAPFROG), "order 4": scheme(YOSHIDA)}


def phase_at(log_density: Callable, position, momentum) -> Phase:
    return Phase(position, momentum, *jax.value_and_grad(log_density)(position))


def follow(step: Callable, log_density: Callable, size: float, steps: int) -> tuple:
    """Positions, momenta and energies of one flight from position 1 at momentum 1."""

    def advance(phase, _):
        phase = step(phase, log_density, size)
        return phase, (phase.position[0], phase.momentum[0], energy(phase))

    start = phase_at(log_density, jnp.ones(1), jnp.ones(1))
    found = jax.jit(lambda start: jax.lax.scan(advance, start, length=steps)[1])(start)
    return tuple(np.concatenate(([first], x)) for first, x in zip((1, 1, energy(start)), found))  # noqa: B905


def determinant(step: Callable, size: float) -> float:
    """How many times as large an area is after a step of the pendulum."""

    def moved(both):
        phase = step(phase_at(pendulum, both[:1], both[1:]), pendulum, size)
        return jnp.concatenate((phase.position, phase.momentum))

    return float(jnp.linalg.det(jax.jacfwd(moved)(jnp.ones(2))))


def draw(config: Config, errors: dict[str, np.ndarray], sizes: np.ndarray) -> None:
    """Phase portraits, energy over time, error over step size."""
    _, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    for place, (name, step) in enumerate(METHODS.items()):
        steps = 22 if name == "Euler" else 200
        position, momentum, _ = follow(step, pendulum, config.step_size, steps)
        axes[0].plot(position, momentum, ".-", markersize=3, lw=0.5, color=f"C{place}", label=name)
        *_, level = follow(step, pendulum, config.step_size, 200)
        axes[1].plot(level - level[0], color=f"C{place}", label=name)
        axes[2].loglog(sizes, errors[name], "o-", color=f"C{place}", label=name)
    axes[0].set(xlabel="angle", ylabel="momentum", title="A pendulum, step size 0.3")
    axes[0].set_aspect("equal", "datalim")
    axes[1].set(xlabel="step", ylabel="energy - energy at the start", ylim=(-0.1, 0.2))
    axes[1].set_title("Euler gains energy, the others swing")
    axes[2].set(xlabel="step size", ylabel="largest energy error in 4 units of time")
    axes[2].set_title("Order 1, 2 and 4")
    axes[2].set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes[2].minorticks_off()
    for one in axes:
        one.grid(alpha=0.3)
        one.legend()


def main(config: Config) -> list[Finding]:
    with jax.enable_x64(True):
        size = config.step_size
        *_, level = follow(euler, parabola, size, 100)
        growth = float((level[-1] / level[0]) ** (1 / 100) - 1)
        findings = [
            Finding(
                "Euler on a parabola: energy gained in a step, over step²",
                growth / size**2,
                expected=within(1 - 1e-9, 1 + 1e-9),
                source="(q + εp)² + (p - εq)² = (1 + ε²)(q² + p²)",
            )
        ]
        position, momentum, level = follow(METHODS["leapfrog"], parabola, size, config.steps)
        shadow = momentum**2 / 2 + position**2 * (1 - size**2 / 4) / 2
        swing = abs(shadow / shadow[0] - 1).max().item()
        claim = f"leapfrog on a parabola: drift of its own energy in {config.steps:,} steps"
        source = "p² + q² (1 - ε²/4) is kept: Neal 2011"
        findings.append(Finding(claim, swing, expected=at_most(1e-10), source=source))
        claim = f"leapfrog on a parabola: largest true energy error in {config.steps:,} steps"
        bound = (size**2 / 8 * position**2).max().item()
        findings.append(
            Finding(
                claim,
                abs(level - level[0]).max().item(),
                expected=at_most(bound),
                source="ε² q²/8 separates the two energies",
            )
        )
        sizes = 4 / np.array([20, 40, 80, 160, 320])
        errors = {}
        for name, step in METHODS.items():
            flights = [follow(step, pendulum, size, round(4 / size)) for size in sizes]
            errors[name] = np.array([abs(level - level[0]).max() for *_, level in flights])
        for name, order in (("Euler", 1), ("leapfrog", 2), ("order 4", 4)):
            measured = float(np.log2(errors[name][-2] / errors[name][-1]))
            claim = f"{name}: order of the energy error"
            rule = within(order - 0.1, order + 0.1)
            findings.append(Finding(claim, measured, expected=rule, source="by construction"))
        for name, step in METHODS.items():
            area = determinant(step, size)
            rule = None if name == "Euler" else within(1 - 1e-12, 1 + 1e-12)
            claim = f"{name}: area after a step of the pendulum, over the area before"
            findings.append(Finding(claim, area, expected=rule, source="shears keep area"))
        draw(config, errors, sizes)
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(steps=1000))
