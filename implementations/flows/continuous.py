"""Continuous flows (FFJORD): the numbers move along a field of velocities, for one unit of time.

    dx/dt = f(x, t)        d log |det| / dt = tr(df/dx)

No mask and no triangle: a trace is enough, however the field mixes its inputs. It is exact at the
price of d products with the transposed Jacobian, or estimated without bias at the price of a few:

    tr(A) = sum_i e_i·A e_i = E[probe·A probe]        probe = ±1 at random (Hutchinson)

The probe is drawn once for a whole solve: redrawn inside it, the right side would be no function of
time, and the solver's error would not fall as it should. The solver is Runge and Kutta's, with
steps of equal length: halving them divides the error by 16. The inverse is the same run back from
t = 1, exact up to that error. Gradients go back through the solver's own steps, not through an
adjoint equation: they are those of the numbers computed, and memory grows with the steps.

Paper   Chen et al. 2018, arXiv:1806.07366, theorem 1; Grathwohl et al. 2018, arXiv:1810.01367;
        Hutchinson 1990, doi:10.1080/03610919008812866
Shapes  x [batch, dim]
Run     uv run python implementations/flows/continuous.py
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implementations.flows.bijection import Bijection, Mapped

State = tuple[Tensor, ...]
Field = Callable[[float, Float[Tensor, "batch dim"]], Float[Tensor, "batch dim"]]


class Velocity(nn.Module):
    """A small network of position and time, smooth so that the solver is as good as it can be."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim + 1, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, dim),
        )

    def forward(self, time: float, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        clock = torch.full_like(x[:, :1], time)
        return self.layers(torch.cat((x, clock), 1))


class Continuous(Bijection):
    """The map from where a row is at time 0 to where the field has led it at time 1.

    Args:
        field: velocities, a function of time and rows.
        steps: of the solver, over the unit of time.
        probes: how many random probes estimate the trace; None for the exact trace.

    Raises:
        ValueError: no steps, or no probes.
    """

    def __init__(self, field: Field, *, steps: int, probes: int | None = None):
        super().__init__()
        if steps < 1 or (probes is not None and probes < 1):
            raise ValueError(f"steps and probes are at least 1, got {steps} and {probes}")
        self.field, self.steps, self.probes = field, steps, probes

    def forward(self, x: Float[Tensor, "batch dim"]) -> Mapped:
        return self.along(x, 0.0, 1.0)

    def inverse(self, y: Float[Tensor, "batch dim"]) -> Mapped:
        return self.along(y, 1.0, 0.0)

    def along(self, x: Float[Tensor, "batch dim"], start: float, end: float) -> Mapped:
        """Follow the field from one time to another, adding up its divergence on the way."""
        directions = all_directions(x) if self.probes is None else random_signs(x, self.probes)
        scale = 1.0 if self.probes is None else 1 / self.probes

        def change(time: float, state: State) -> State:
            velocity, pull = torch.func.vjp(lambda x: self.field(time, x), state[0])
            trace = sum((pull(probe)[0] * probe).sum(1) for probe in directions)
            return velocity, scale * trace

        return Mapped(*runge_kutta(change, (x, x.new_zeros(len(x))), start, end, self.steps))


def all_directions(x: Float[Tensor, "batch dim"]) -> list[Float[Tensor, "batch dim"]]:
    """The unit vectors: probed by all of them, a trace is exact."""
    unit = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return [row.expand_as(x) for row in unit]


def random_signs(x: Float[Tensor, "batch dim"], count: int) -> list[Float[Tensor, "batch dim"]]:
    """±1 at random, each row its own: of all probes, those whose estimate varies least."""
    return [2.0 * torch.randint_like(x, 2) - 1 for _ in range(count)]


def runge_kutta(
    change: Callable[[float, State], State], state: State, start: float, end: float, steps: int
) -> State:
    """The classical method of order 4 (Kutta 1901), in steps of equal length, forward or back."""
    length = (end - start) / steps
    for step in range(steps):
        time = start + step * length
        first = change(time, state)
        second = change(time + length / 2, moved(state, first, length / 2))
        third = change(time + length / 2, moved(state, second, length / 2))
        fourth = change(time + length, moved(state, third, length))
        for weight, slope in ((1, first), (2, second), (2, third), (1, fourth)):
            state = moved(state, slope, weight * length / 6)
    return state


def moved(state: State, slope: State, length: float) -> State:
    return tuple(value + length * rate for value, rate in zip(state, slope, strict=True))


def main() -> None:
    torch.manual_seed(0)
    field = Velocity(2, 16).double()
    for parameter in field.parameters():
        nn.init.normal_(parameter, std=0.4)
    x = torch.randn(1, 2, dtype=torch.float64)
    exact = Continuous(field, steps=400)(x).log_det
    print("steps   error of log |det|   there and back")
    for steps in (5, 10, 20, 40):
        flow = Continuous(field, steps=steps)
        y, log_det = flow(x)
        back = (flow.inverse(y).value - x).abs().max()
        print(f"{steps:5}   {(log_det - exact).abs().item():18.1e}   {back:.1e}")
    estimates = Continuous(field, steps=10, probes=1)(x.expand(4000, 2)).log_det
    error = estimates.std() / 4000**0.5
    print(f"exact {exact.item():.4f}, mean of 4,000 probes {estimates.mean():.4f} +- {error:.4f}")


if __name__ == "__main__":
    main()
