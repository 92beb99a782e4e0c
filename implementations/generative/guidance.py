"""Guidance: follow a label further than the data do, without a classifier.

    guided D = D(x) + scale (D(x | label) - D(x))       scale 0: no label;  1: the label;  > 1: more

In scores that is grad log p(x) + scale grad log p(label | x): samples of p(x) p(label | x)^scale,
at each noise level for itself. One network learns both: its label is left out of a tenth of the
pictures. Ho & Salimans write (1 + w) D(x | label) - w D(x): their w is scale - 1, and mixing up the
two is off by one.

More guidance buys fidelity with diversity. It is not the noised version of any one distribution.

Paper   Ho & Salimans 2022, arXiv:2207.12598
Shapes  x [batch, ...]    labels [batch]; the number of classes stands for "no label"
Run     uv run python implementations/generative/guidance.py
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from implementations.generative.samplers import Denoise

Conditional = Callable[[Tensor, float, float, Int[Tensor, " batch"]], Tensor]
"""denoise(x, alpha, sigma, labels) -> the guess of x_0"""


def guide(
    conditional: Float[Tensor, "batch ..."], unconditional: Float[Tensor, "batch ..."], scale: float
) -> Float[Tensor, "batch ..."]:
    """From the unlabelled guess towards the labelled one, and beyond it if scale > 1."""
    return unconditional + scale * (conditional - unconditional)


def guided(
    denoise: Conditional, labels: Int[Tensor, " batch"], scale: float, classes: int
) -> Denoise:
    """A guess of the data that asks one network twice: with the labels and without.

    Args:
        classes: how many labels the network knows; that number itself means "no label".

    Raises:
        ValueError: the network knows no labels, or a label is not one of them or no whole number.
    """
    if classes < 1:
        raise ValueError("guidance needs a model that was trained with labels: this one has none")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels are whole numbers, got {labels.dtype}")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels are 0 to {classes - 1}, got {labels.min()} to {labels.max()}")
    nothing = torch.full_like(labels, classes)

    def both(x: Tensor, alpha: float, sigma: float) -> Tensor:
        if scale == 1:
            return denoise(x, alpha, sigma, labels)
        # Both halves in one call: half the launches.
        answers = denoise(torch.cat((x, x)), alpha, sigma, torch.cat((labels, nothing)))
        return guide(*answers.chunk(2), scale)

    return both


def leave_out(
    labels: Int[Tensor, " batch"], chance: Float[Tensor, " batch"], rate: float, classes: int
) -> Int[Tensor, " batch"]:
    """Labels for training: where the uniform number `chance` is below the rate, none."""
    return torch.where(chance < rate, classes, labels)


def main() -> None:
    from implementations.generative.gaussian_mixture import ring
    from implementations.generative.samplers import SAMPLERS, sample
    from implementations.generative.schedules import SCHEDULES

    mixture = ring(deviation=0.4)
    components = len(mixture.weights)

    def denoise(x: Tensor, alpha: float, sigma: float, labels: Tensor) -> Tensor:
        every = [mixture.given(k).denoised(x, alpha, sigma) for k in range(components)]
        every.append(mixture.denoised(x, alpha, sigma))
        return torch.stack(every)[labels, torch.arange(len(x))]

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 2, dtype=torch.float64, generator=generator)
    labels = torch.arange(2000) % components
    levels = SCHEDULES["straight"].grid(100)
    print("scale   named by the mixture   spread within a label")
    for scale in (0.0, 1.0, 2.0, 4.0):
        made = sample(guided(denoise, labels, scale, components), noise, levels, SAMPLERS["ddim"])
        named = (mixture.responsibilities(made).argmax(1) == labels).double().mean()
        spread = torch.stack([made[labels == k].std(0).norm() for k in range(components)]).mean()
        print(f"{scale:5}   {named:20.3f}   {spread:.3f}")


if __name__ == "__main__":
    main()
