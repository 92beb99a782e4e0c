"""Loss scaling: multiply the loss so that small gradients fit fp16, divide before they are used.

    backward of  scale · loss  ->  gradients in fp16, scale times too large
    gradients / scale, in fp32 ->  all finite?  clip, update the weights     not: skip the step
    dynamic scale              ->  not finite: · 1/2;  finite `growth_interval` times in a row: · 2

fp16 ends at 6e-8 below and 65,504 above: without a scale the gradients below become zero, and one
that is too large overflows. A dynamic scale climbs until a gradient overflows, and then takes one
step back; a static one is the same with no growth and no way back. bf16 has float32's exponents and
needs neither. The state is a value: a skipped step returns the weights and the optimizer's state as
they were.

Paper   Micikevicius et al. 2017, arXiv:1710.03740
Run     uv run python implementations/precision/loss_scaling.py
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Parameters = Sequence[Tensor]
Update = Callable[[Parameters, Parameters, Any], tuple[list[Tensor], Any]]
"""(parameters, gradients, the optimizer's state) -> (parameters, the optimizer's state)"""


class Rule(NamedTuple):
    """How the scale answers to a step."""

    growth: float = 2.0
    backoff: float = 0.5
    growth_interval: int = 2000
    """finite steps in a row after which the scale grows"""


DYNAMIC = Rule()
STATIC = Rule(growth=1.0, backoff=1.0)


class ScaledState(NamedTuple):
    """What the next step needs."""

    scale: float
    finite_steps: int
    """since the scale changed last"""
    optimizer: Any


class Info(NamedTuple):
    """What a step did, for looking."""

    finite: bool
    """False: the step was skipped"""
    gradients: list[Tensor]
    """divided by the scale, not clipped"""


def init(optimizer: Any, scale: float = 2.0**16) -> ScaledState:
    """The optimizer's own first state beside a scale.

    Raises:
        ValueError: a scale that is not a positive finite float32.
    """
    if not 0 < as_float32(scale) < torch.inf:
        raise ValueError(f"a loss scale is positive and finite in float32, got {scale}")
    return ScaledState(as_float32(scale), 0, optimizer)


def scaled(loss: Float[Tensor, "*shape"], state: ScaledState) -> Float[Tensor, "*shape"]:
    """The loss to call backward on."""
    return loss * state.scale


def step(
    parameters: Parameters,
    scaled_gradients: Parameters,
    state: ScaledState,
    update: Update,
    *,
    rule: Rule = DYNAMIC,
    largest_norm: float = torch.inf,
) -> tuple[list[Tensor], ScaledState, Info]:
    """Unscale, look, clip, update: or leave everything but the scale as it was.

    Args:
        update: the optimizer's step; it is not called if a gradient is infinite or NaN.
        largest_norm: the length to which all gradients together are shortened, after unscaling.

    Raises:
        ValueError: no gradients; or no scale is small enough, and the scale would become zero.
    """
    if len(scaled_gradients) == 0:
        raise ValueError("there are no gradients to unscale")
    gradients = unscaled(scaled_gradients, state.scale)
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
    scale, finite_steps = next_scale(state.scale, state.finite_steps, finite, rule)
    info = Info(finite, gradients)
    if not finite:
        return list(parameters), ScaledState(scale, finite_steps, state.optimizer), info
    parameters, optimizer = update(parameters, clipped(gradients, largest_norm), state.optimizer)
    return parameters, ScaledState(scale, finite_steps, optimizer), info


def unscaled(scaled_gradients: Parameters, scale: float) -> list[Tensor]:
    """The gradients over the scale, in float32 or wider: in fp16 they would vanish after all."""
    inverse = as_float32(1 / scale)
    return [g.to(torch.promote_types(g.dtype, torch.float32)) * inverse for g in scaled_gradients]


def clipped(gradients: Parameters, largest_norm: float) -> list[Tensor]:
    """The gradients, all shortened by one factor if together they are longer than allowed."""
    norm = torch.nn.utils.get_total_norm(gradients)
    factor = (largest_norm / (norm + 1e-6)).clamp(max=1.0)
    return [gradient * factor for gradient in gradients]


def next_scale(scale: float, finite_steps: int, finite: bool, rule: Rule) -> tuple[float, int]:
    """(scale, finite steps) after one more step, as float32 holds the scale."""
    if not finite:
        smaller = as_float32(scale * rule.backoff)
        if smaller == 0:
            raise ValueError(f"a gradient is not finite at a scale of {scale}: the loss itself is")
        return smaller, 0
    if finite_steps + 1 < rule.growth_interval:
        return scale, finite_steps + 1
    larger = as_float32(scale * rule.growth)
    return (larger if larger < torch.inf else scale), 0


def as_float32(number: float) -> float:
    """The float32 next to a number."""
    return torch.tensor(number, dtype=torch.float32).item()


def main() -> None:
    torch.manual_seed(0)
    tiny = torch.randn(10_000) * 1e-7
    for scale in (1.0, 2.0**16):
        lost = ((tiny * scale).half() == 0).float().mean()
        print(f"gradients of about 1e-7 in fp16, scaled by {scale:7.0f}: {lost:.1%} become zero")

    def descend(parameters: Parameters, gradients: Parameters, state: None):
        pairs = zip(parameters, gradients, strict=True)
        return [p - 0.1 * gradient for p, gradient in pairs], state

    weight, state = [torch.ones(4)], init(None)
    rule = DYNAMIC._replace(growth_interval=3)
    print("a loss of |weight|² whose gradients pass through fp16:")
    for number in range(12):
        gradient = (2 * weight[0] * state.scale).half()
        before = state.scale
        weight, state, info = step(weight, [gradient], state, descend, rule=rule)
        print(f"    step {number:2}  scale {before:7.0f}  {'' if info.finite else 'skipped'}")


if __name__ == "__main__":
    main()
