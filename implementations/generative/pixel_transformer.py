"""A picture as a text: pixels in reading order, each drawn given those before it.

    tokens = label, pixel_1, pixel_2, ...          a pixel is one of `shades` levels of grey
    log P(picture | label) = sum_i log P(pixel_i | label, pixels before)

A decoder of models/decoder.py does the rest. Its likelihood is exact and costs one pass; a sample
costs a pass a pixel, one after another, however many processors there are.

Paper   van den Oord et al. 2016, arXiv:1601.06759; Chen et al. 2020, "Generative pretraining from
        pixels"
Shapes  pixels [batch, 1, row, column], from -1 to 1    tokens [batch, 1 + pixel]
Run     uv run python implementations/generative/pixel_transformer.py
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from implementations.attention.vendor import attention_sdpa
from implementations.models.decoder import Decoder, DecoderConfig

Pictures = Float[Tensor, "batch 1 row column"]
Tokens = Int[Tensor, "batch token"]


def decoder_of(size: int, shades: int, classes: int, width: int, layers: int) -> Decoder:
    """A decoder whose words are grey levels, and then labels."""
    config = DecoderConfig(
        vocabulary=shades + classes,
        width=width,
        layers=layers,
        heads=width // 32,
        hidden=8 * width // 3 // 8 * 8,
        positions=size * size,
    )
    return Decoder(config, attention_sdpa)


def tokens_of(pixels: Pictures, labels: Int[Tensor, " batch"], shades: int) -> Tokens:
    """Label first, then the nearest of `shades` greys for each pixel."""
    greys = ((pixels + 1) / 2 * (shades - 1)).round().long().flatten(1)
    return torch.cat((labels[:, None] + shades, greys), 1)


def pictures_of(greys: Tokens, size: int, shades: int) -> Pictures:
    """Greys as pixels from -1 to 1."""
    return (greys.float() * (2 / (shades - 1)) - 1).unflatten(1, (1, size, size))


def pixel_loss(decoder: Decoder, tokens: Tokens) -> tuple[Float[Tensor, ""], int]:
    """Negative log-likelihood of all pixels given their labels, in nats, and how many they are."""
    scores = decoder(tokens[:, :-1]).float()
    wanted = tokens[:, 1:]
    total = cross_entropy(scores.flatten(0, 1), wanted.flatten(), reduction="sum")
    return total, wanted.numel()


@torch.no_grad()
def write(
    decoder: Decoder, labels: Int[Tensor, " batch"], shades: int, generator: torch.Generator
) -> Tokens:
    """The greys of new pictures, one pixel at a time, with a cache of what was read."""
    decoder.eval()
    count = decoder.config.positions
    cache = decoder.empty_cache(len(labels), count)
    token, greys = labels[:, None] + shades, []
    for _ in range(count):
        scores = decoder(token, cache)[:, -1, :shades].float()
        token = torch.multinomial(scores.softmax(-1), 1, generator=generator)
        greys.append(token)
    return torch.cat(greys, 1)


def main() -> None:
    torch.manual_seed(0)
    decoder = decoder_of(4, 4, 2, 32, 1)
    labels = torch.arange(64) % 2
    pixels = torch.where(labels.bool()[:, None, None, None], 1.0, -1.0).expand(64, 1, 4, 4)
    tokens = tokens_of(pixels, labels, 4)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    for step in range(60):
        total, count = pixel_loss(decoder, tokens)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        if step in (0, 59):
            print(f"step {step:2}  {total.item() / count:.4f} nats a pixel")
    greys = write(decoder, labels[:2], 4, torch.Generator().manual_seed(0))
    for label, row in zip(labels[:2].tolist(), greys.tolist(), strict=True):
        print(f"label {label} writes {''.join(map(str, row))}")


if __name__ == "__main__":
    main()
