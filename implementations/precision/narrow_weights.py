"""Weights in 16 bits that still learn: where does the part of an update go that does not fit?

    an update below half a spacing of its weight is rounded away, each time: |Δ| < 2^-9 |w| in bf16

    nearest      it is lost                                            2 bytes a weight
    master       a float32 copy is updated, the weight is its rounding  2 + 4
    kahan        what was lost waits in a second narrow number         2 + 2
    stochastic   rounded up with the probability of what is lost:      2
                 right on average, and noise otherwise

A keeper is two functions around any optimizer's step: `before` gives the float32 weights that it
updates, `after` puts the updated ones back into the narrow weight and its memory.

Paper   master weights: Micikevicius et al. 2017, arXiv:1710.03740; Kahan and stochastic rounding
        for bf16: Zamirai et al. 2020, arXiv:2010.06192
Run     uv run python implementations/precision/narrow_weights.py
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implementations.precision.formats import BF16, rounded, stochastic
from implementations.precision.loss_scaling import Parameters, Update
from implementations.precision.summation import kahan_add

Memory = Tensor | None
"""what is kept beside one narrow weight"""


class Keeper(NamedTuple):
    """How a narrow weight takes an update."""

    memory: Callable[[Tensor], Memory]
    before: Callable[[Tensor, Memory], Tensor]
    after: Callable[[Tensor, Memory, Tensor, torch.Generator | None], tuple[Tensor, Memory]]


def kept_nearest(weight: Tensor, memory: Memory, updated: Tensor, generator=None):
    return updated.to(weight.dtype), None


def kept_master(weight: Tensor, memory: Memory, updated: Tensor, generator=None):
    return updated.to(weight.dtype), updated


def kept_kahan(weight: Tensor, memory: Memory, updated: Tensor, generator=None):
    return kahan_add(weight, memory, (updated - weight.float()).to(weight.dtype))


def kept_stochastic(weight: Tensor, memory: Memory, updated: Tensor, generator=None):
    return rounded(updated, BF16, rounding=stochastic(generator)).to(weight.dtype), None


def widened(weight: Tensor, memory: Memory) -> Tensor:
    return weight.float()


KEEPERS = {
    "nearest": Keeper(lambda weight: None, widened, kept_nearest),
    "master": Keeper(lambda weight: weight.float(), lambda weight, memory: memory, kept_master),
    "kahan": Keeper(torch.zeros_like, widened, kept_kahan),
    "stochastic": Keeper(lambda weight: None, widened, kept_stochastic),
}


class NarrowState(NamedTuple):
    """What the next step needs."""

    memories: list[Memory]
    optimizer: Any


def init(
    parameters: Sequence[Tensor], keeper: Keeper, optimizer: Callable[[Parameters], Any]
) -> NarrowState:
    """A memory for each weight, and the optimizer's own first state for float32 weights.

    Raises:
        ValueError: a weight is not bfloat16.
    """
    if wrong := {p.dtype for p in parameters} - {torch.bfloat16}:
        raise ValueError(f"narrow weights are bfloat16, got {', '.join(map(str, wrong))}")
    memories = [keeper.memory(p.detach()) for p in parameters]
    return NarrowState(memories, optimizer([p.detach().float() for p in parameters]))


def step(
    parameters: Parameters,
    gradients: Parameters,
    state: NarrowState,
    keeper: Keeper,
    update: Update,
    generator: torch.Generator | None = None,
) -> tuple[list[Tensor], NarrowState]:
    """One step of the optimizer `update` in float32, kept in bfloat16.

    Args:
        generator: what stochastic rounding draws from; torch's own unless given.
    """
    narrow = [p.detach() for p in parameters]
    wide = [keeper.before(p, m) for p, m in zip(narrow, state.memories, strict=True)]
    updated, optimizer = update(wide, [g.float() for g in gradients], state.optimizer)
    kept = [
        keeper.after(p, m, u, generator)
        for p, m, u in zip(narrow, state.memories, updated, strict=True)
    ]
    return [weight for weight, _ in kept], NarrowState([m for _, m in kept], optimizer)


def main() -> None:
    from implementations.optimizers.adamw import init as adamw_init
    from implementations.optimizers.adamw import step as adamw_step

    torch.manual_seed(0)
    print("a thousand AdamW steps of 1e-4 towards 1.1, from a bf16 weight of 1:")
    for name, keeper in KEEPERS.items():
        weight = [torch.ones(100).bfloat16()]
        state = init(weight, keeper, adamw_init)

        def update(parameters, gradients, state):
            return adamw_step(parameters, gradients, state, learning_rate=1e-4, weight_decay=0.0)

        for _ in range(1000):
            weight, state = step(weight, [weight[0] - 1.1], state, keeper, update)
        print(f"    {name:11}{weight[0].float().mean():.4f}")


if __name__ == "__main__":
    main()
