"""Flows for images: whole numbers -> dequantized -> logit -> rows or scales -> noise.

    Glow            several scales of ActNorm, mixing and coupling
    any other       images as rows, to which every flow of vectors applies

What the weekly scripts share: how such a flow is put together, set from data, and asked for its
price in bits.

Shapes  pixels [image, channel, row, column] in whole levels
Run     uv run python implementations/flows/pixels.py
"""

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from implementations.flows.bijection import Bijection, Compose, Flatten, Flow
from implementations.flows.dequantization import (
    Dequantized,
    Logit,
    VariationalNoise,
    bits_per_dimension,
)
from implementations.flows.glow import ActNorm, Convolutions
from implementations.flows.multi_scale import MultiScale

MARGIN = 0.01  # of the logit: as narrow as keeps single precision finite at black and white
Shape = tuple[int, int, int]
Pixels = Integer[Tensor, "image channel row column"]


def flow_of_rows(shape: Shape, levels: int, bijection: Bijection) -> Dequantized:
    """A bijection of vectors, for images read row by row, each pixel normalised by itself."""
    size = shape[0] * shape[1] * shape[2]
    steps = Compose(Logit(MARGIN), Flatten(shape), ActNorm(size), bijection)
    return Dequantized(Flow(steps, (size,)), levels)


def glow(
    shape: Shape, levels: int, *, scales: int, steps: int, hidden: int, learnt_noise: bool = False
) -> Dequantized:
    """Glow for images, with uniform dequantization, or with noise that is learnt.

    Raises:
        ValueError: rows or columns cannot be halved `scales` times, or there is one level.
    """
    size = shape[0] * shape[1] * shape[2]
    flow = Flow(Compose(Logit(MARGIN), MultiScale(shape, scales, steps, hidden)), (size,))
    if not learnt_noise:
        return Dequantized(flow, levels)
    network = Convolutions(shape[0], shape[0], 2, hidden)
    return Dequantized(flow, levels, VariationalNoise(network, levels))


def set_from_data(model: Dequantized, pixels: Pixels) -> None:
    """Give every ActNorm its first scale, from these images."""
    model.flow.bijection.initialise((pixels + torch.rand(pixels.shape)) / model.levels)


def negative_log_probability(model: Dequantized, pixels: Pixels) -> tuple[Float[Tensor, ""], int]:
    """The loss of a batch as the training loop wants it: the sum in nats, and how many images."""
    return -model.log_prob(pixels).sum(), len(pixels)


@torch.no_grad()
def price(
    model: Dequantized, pixels: Pixels, draws: int, seed: int = 0, at_once: int = 200
) -> Float[Tensor, " image"]:
    """Bits per dimension of each image, an upper bound that more draws of the noise tighten.

    The noise is a function of the seed, so that models are asked alike; the generator that training
    uses is left as it was.
    """
    devices = [pixels.device] if pixels.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        parts = [model.log_prob(part, draws) for part in pixels.split(at_once)]
    return bits_per_dimension(torch.cat(parts), pixels[0].numel())


def main() -> None:
    from implementations.sources.images import digits

    torch.manual_seed(0)
    learn, test = (part.pixels.long() for part in digits().split())
    model = glow((1, 8, 8), 17, scales=2, steps=2, hidden=16)
    print("digits of 8x8 and 17 levels by a Glow that has learnt nothing, bits per dimension:")
    print(f"  at first                  {price(model, test, 1).mean():.3f}")
    set_from_data(model, learn)
    print(f"  ActNorm set from data     {price(model, test, 1).mean():.3f}")
    print(f"  the same, with 20 draws   {price(model, test, 20).mean():.3f}")


if __name__ == "__main__":
    main()
