"""AdamW: each parameter steps by its own gradient's mean over its root mean square, and decays.

    first  = β₁ first + (1 - β₁) gradient            second = β₂ second + (1 - β₂) gradient²
    parameter = (1 - η λ) parameter - η · (first / (1 - β₁ᵗ)) / (sqrt(second / (1 - β₂ᵗ)) + ε)

Both averages start at zero; dividing by 1 - βᵗ takes that start out of them. The decay λ pulls on
the weights as they were before the step, and not through the gradient, where the root undoes it.

Paper   Loshchilov & Hutter 2017, arXiv:1711.05101; Adam: Kingma & Ba 2014, arXiv:1412.6980
Fast    adamw_triton.py: all parameters in one launch, in place
Run     uv run python implementations/optimizers/adamw.py
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AdamWState(NamedTuple):
    """What the next step needs: how many there were, and two averages for each parameter."""

    steps: int
    first: list[Tensor]
    second: list[Tensor]


def init(parameters: Sequence[Tensor]) -> AdamWState:
    """No steps, and averages of zero, in float32 or wider."""

    def zeros() -> list[Tensor]:
        return [torch.zeros_like(p, dtype=wide_dtype(p), requires_grad=False) for p in parameters]

    return AdamWState(0, zeros(), zeros())


def step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    state: AdamWState,
    *,
    learning_rate: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    weight_decay: float = 0.01,
) -> tuple[list[Tensor], AdamWState]:
    """The parameters and the state after one step; what was given stays as it was.

    Raises:
        ValueError: what `check` refuses.
    """
    check(parameters, gradients, state, learning_rate, betas, epsilon, weight_decay)
    steps, updated, averages = state.steps + 1, [], []
    for parameter, gradient, first, second in zip(parameters, gradients, *state[1:], strict=True):
        slope, weight = gradient.to(first.dtype), parameter.detach().to(first.dtype)
        first = betas[0] * first + (1 - betas[0]) * slope
        second = betas[1] * second + (1 - betas[1]) * slope**2
        mean, square = first / (1 - betas[0] ** steps), second / (1 - betas[1] ** steps)
        decayed = (1 - learning_rate * weight_decay) * weight
        moved = decayed - learning_rate * mean / (square.sqrt() + epsilon)
        updated.append(moved.to(parameter.dtype))
        averages.append((first, second))
    return updated, AdamWState(steps, *map(list, zip(*averages, strict=True)))


def check(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    state: AdamWState,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> None:
    """Raise ValueError unless everything is there once a parameter and in its range."""
    counts = {len(parameters), len(gradients), len(state.first), len(state.second)}
    if len(counts) != 1 or not len(parameters):
        raise ValueError(
            f"{len(parameters)} parameters need as many gradients and averages, at least one, got "
            f"{len(gradients)} and {len(state.first)}, {len(state.second)}"
        )
    for i, (parameter, *others) in enumerate(zip(parameters, gradients, *state[1:], strict=True)):
        for name, other in zip(("gradient", "first", "second"), others, strict=True):
            if other.shape != parameter.shape:
                raise ValueError(
                    f"the {name} of parameter {i} has the shape {tuple(other.shape)}, "
                    f"the parameter {tuple(parameter.shape)}"
                )
    for name, value in (
        ("learning rate", learning_rate),
        ("epsilon", epsilon),
        ("decay", weight_decay),
    ):
        if not value >= 0:
            raise ValueError(f"the {name} is not negative, got {value}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"averages need 0 <= beta < 1, got {betas}")


def wide_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def main() -> None:
    print("f(x, y) = x² + 100 y², from (1, 1), 200 steps, learning rate 0.02")
    point = [torch.tensor([1.0, 1.0], dtype=torch.float64)]
    descent, state, slopes = point[0].clone(), init(point), torch.tensor([2.0, 200.0]).double()
    for _ in range(200):
        point, state = step(point, [slopes * point[0]], state, learning_rate=0.02, weight_decay=0.0)
        descent = descent - 0.005 * slopes * descent
    print(f"  AdamW             {[round(value, 4) for value in point[0].tolist()]}")
    print(f"  gradient descent  {[round(value, 4) for value in descent.tolist()]}")


if __name__ == "__main__":
    main()
