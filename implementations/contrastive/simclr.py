"""SimCLR: two views of one picture belong together, and that is all the teacher there is.

    views      = augment(x), augment(x)            drawn apart
    features h = encoder(view)                     kept
    z          = W2 relu(W1 h)                     thrown away after training
    loss       = NT-Xent(z, z')

What the augmentations change, z must forget; the head lets h remember some of it.

Paper   Chen et al. 2020, arXiv:2002.05709, section 2.1; the head: section 4.2
Shapes  pixels [picture, channel, row, column]    features [picture, width]
Run     uv run python implementations/contrastive/simclr.py
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implementations.contrastive.info_nce import nt_xent

PairLoss = Callable[[Tensor, Tensor], Tensor]  # of both views' embeddings


class SimCLR(nn.Module):
    """An encoder and the head that only training sees.

    Args:
        encoder: maps pictures to features [picture, width].
        width: size of the features.
        dim: size of what the loss compares.
    """

    def __init__(self, encoder: nn.Module, width: int, dim: int = 64):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))

    def features(
        self, pixels: Float[Tensor, "picture channel row column"]
    ) -> Float[Tensor, "picture width"]:
        """What is kept: the encoder's output, before the head."""
        return self.encoder(pixels)

    def forward(
        self, pixels: Float[Tensor, "picture channel row column"]
    ) -> Float[Tensor, "picture dim"]:
        """What the loss compares; not of length one yet."""
        return self.head(self.encoder(pixels))


def view_loss(
    model: SimCLR, batch: tuple[Tensor, ...], loss: PairLoss = nt_xent
) -> tuple[Float[Tensor, ""], int]:
    """A loss of two views in the form that training/ wants: a sum, and over how many pictures.

    Both views go through the encoder in one pass. A contrastive batch cannot be cut into
    micro-batches: it would have fewer negatives.
    """
    first, second = batch
    return loss(*model(torch.cat([first, second])).chunk(2)) * len(first), len(first)


def main() -> None:
    from implementations.contrastive.augmentation import Augmentation, two_views
    from implementations.contrastive.probes import nearest_neighbours
    from implementations.sources.images import digits
    from implementations.training.fit import fit
    from implementations.training.rows import RandomRows

    torch.manual_seed(0)
    train, test = ((part.pixels / 16, part.labels) for part in digits().split())
    shaken = Augmentation(
        area=(0.5, 1.2), turn=15, shift=0.1, flip=False, saturation=0.0, background=0.0
    )
    rows = RandomRows(train[0], batch=128)

    def views(step: int) -> tuple[Tensor, ...]:
        return tuple(two_views(rows(step), shaken, seed=0, step=step))

    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    model = SimCLR(encoder, width=64)
    for name in ("before", "after"):
        with torch.no_grad():
            known, asked = model.features(train[0][::29]), model.features(test[0])
        score = nearest_neighbours(known, train[1][::29], asked, test[1], neighbours=1)
        print(f"digits by the nearest of 50 with a label, {name} training without any: {score:.3f}")
        if name == "before":
            fit(model, views, view_loss, steps=400, learning_rate=2e-3)


if __name__ == "__main__":
    main()
