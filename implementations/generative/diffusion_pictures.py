"""The pictures that diffusion models learn here, in three parts that share none.

    train        what is learnt
    validation   every tenth of the set's training pictures: they say when to stop
    test         never seen in training; scripts measure on them

Shapes  pixels [picture, channel, row, column], from -1 to 1
Run     uv run python implementations/generative/diffusion_pictures.py
"""

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from implementations.generative.denoiser import to_signed
from implementations.models.picture_classifier import drawn
from implementations.sources.images import Images, digits, kanji

VALIDATION = 10  # one training picture of so many is held out


class Pictures(NamedTuple):
    """Pictures from -1 to 1, and the number of what each shows."""

    pixels: Float[Tensor, "picture channel row column"]
    labels: Int[Tensor, " picture"]


class Data(NamedTuple):
    """Three parts of a set, and how many levels and labels there are."""

    train: Pictures
    validation: Pictures
    test: Pictures
    levels: int
    classes: int


@cache
def pictures(data: str, size: int) -> Data:
    """The parts of a set: every tenth of the training pictures is for validation.

    Raises:
        ValueError: the set is unknown or has no such size.
    """
    if data in ("mnist_5k", "openmoji"):
        levels, classes = 256, 10
        parts = [Pictures(2 * part.pixels - 1, part.labels) for part in drawn(data, size)]
    elif data == "digits" and size == 8:
        levels, classes = 17, 10
        parts = [signed(part) for part in digits().split()]
    elif data == "kanji":
        levels, classes = 256, 0
        parts = [signed(part) for part in kanji(size).split()]
    else:
        raise ValueError(
            f"sets are mnist_5k, digits of size 8, kanji, openmoji: got {data}, {size}"
        )
    train, test = parts
    held_out = torch.arange(len(train.labels)) % VALIDATION == VALIDATION - 1
    parts = [Pictures(train.pixels[rows], train.labels[rows]) for rows in (~held_out, held_out)]
    return Data(*parts, test, levels, classes)


def signed(part: Images) -> Pictures:
    return Pictures(to_signed(part.pixels, part.levels), part.labels)


def main() -> None:
    for name, size in (("digits", 8), ("mnist_5k", 14), ("kanji", 16)):
        data = pictures(name, size)
        counts = " + ".join(f"{len(part.labels):,}" for part in data[:3])
        print(f"{name:9}{size:2} x {size:2}  {counts} pictures, {data.levels} levels")


if __name__ == "__main__":
    main()
