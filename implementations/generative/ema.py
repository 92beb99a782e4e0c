"""The average of a network's weights over its training: smoother than the last of them.

    average <- decay average + (1 - decay) weights           after each step of the optimizer
    decay_n = min(decay, (1 + n) / (10 + n))                 in update n: a short memory at first

Without the warm-up the random weights of the beginning are remembered for 1 / (1 - decay) steps:
with decay 0.9999 a run of 10,000 steps would end with a third of them. An update before the
optimizer's step averages the weights of one step ago.

Averages are kept in float32 or wider, whatever the weights are: in bfloat16 a move of a thousandth
is rounded away, and an average with decay 0.999 stands still a long way off.

Paper   Polyak & Juditsky 1992, doi:10.1137/0330046; the warm-up: TensorFlow's
        ExponentialMovingAverage(num_updates)
Run     uv run python implementations/generative/ema.py
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def decay_at(update: int, decay: float) -> float:
    """The decay of update n, counted from 0.

    Raises:
        ValueError: the decay is not between 0 and 1.
    """
    check_decay(decay)
    return min(decay, (1 + update) / (10 + update))


def check_decay(decay: float) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"a decay is at least 0 and less than 1, got {decay}")


@torch.no_grad()
def follow_weights(
    average: Iterable[Tensor], weights: Iterable[Tensor], decay: float | Tensor
) -> None:
    """Move the averages, in place, a little towards the weights, all of them in three launches.

    Args:
        decay: as a tensor where a CUDA graph would freeze a number; its value is not checked then.

    Raises:
        ValueError: an average is narrower than float32 or not of its weights' shape, or the decay
            is not between 0 and 1.
    """
    average, weights = list(average), list(weights)
    if not isinstance(decay, Tensor):
        check_decay(decay)
    for kept, weight in zip(average, weights, strict=True):
        if torch.finfo(kept.dtype).bits < 32:
            raise ValueError(f"averages are kept in float32 at least, got {kept.dtype}")
        if kept.shape != weight.shape:
            shapes = f"{tuple(kept.shape)} for {tuple(weight.shape)}"
            raise ValueError(f"an average has the shape of its weights, got {shapes}")
    apart = torch._foreach_sub(weights, average)
    torch._foreach_mul_(apart, 1 - decay)
    torch._foreach_add_(average, apart)


def main() -> None:
    torch.manual_seed(0)
    truth, weight = torch.tensor([1.0]), torch.tensor([-5.0])
    averages = {"with warm-up": weight.clone(), "without": weight.clone()}
    for update in range(500):
        weight = weight + 0.1 * (truth - weight + torch.randn(1))
        follow_weights([averages["with warm-up"]], [weight], decay_at(update, 0.999))
        follow_weights([averages["without"]], [weight], 0.999)
        if update in (9, 99, 499):
            row = "  ".join(f"{name} {value.item():6.3f}" for name, value in averages.items())
            print(f"after {update + 1:3} updates   weight {weight.item():6.3f}  {row}")


if __name__ == "__main__":
    main()
