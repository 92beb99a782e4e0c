"""CLIP: a picture and its caption are two views of one thing, seen through two towers.

    image = unit(tower_image(pixels) P_image)      text = unit(tower_text(tokens) P_text)
    loss  = [ InfoNCE(image -> text) + InfoNCE(text -> image) ] / 2      temperature learned

Afterwards a sentence is a classifier: the pictures nearest to "a photo of a dog" are dogs. The text
tower is our decoder, whose last token has read the whole text, or any frozen model of sentences
whose vectors are given as they are (`nn.Identity`), of which only the projection is then learned.

Paper   Radford et al. 2021, arXiv:2103.00020, figure 3 and section 2.3
Shapes  pixels [image, channel, row, column]    tokens [text, token], -100 where a text has ended
        image, text [pair, dim] of length one
Run     uv run python implementations/contrastive/clip.py
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from implementations.contrastive.info_nce import Temperature, info_nce, unit
from implementations.models.decoder import Decoder, DecoderConfig
from implementations.training.accumulation import IGNORED

SHARPEST = 100.0  # the paper's bound on 1 / temperature


def clip_loss(
    image: Float[Tensor, "pair dim"],
    text: Float[Tensor, "pair dim"],
    temperature: Temperature = 0.07,
) -> Float[Tensor, ""]:
    """Pictures look for their texts, texts for their pictures: the mean of both, in nats.

    Errors are those of `info_nce`.
    """
    return (info_nce(image, text, temperature) + info_nce(text, image, temperature)) / 2


class TextTower(nn.Module):
    """A causal decoder; what it makes of a text's last token, which alone has seen all of it."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.decoder = Decoder(config)

    def forward(self, tokens: Int[Tensor, "text token"]) -> Float[Tensor, "text width"]:
        """The last hidden state before the padding, which no token before it can see.

        Raises:
            ValueError: a text without a token, or longer than the decoder's positions.
        """
        lengths = (tokens != IGNORED).sum(1)
        if (lengths == 0).any():
            raise ValueError(f"text {int(lengths.argmin())} has no token: it says nothing")
        hidden = self.decoder.hidden(tokens.masked_fill(tokens == IGNORED, 0))
        return hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1]


class CLIP(nn.Module):
    """Two towers, two projections into one space, and a temperature.

    Args:
        image_tower: maps pictures to [image, image_width].
        text_tower: maps texts, in whatever form, to [text, text_width].
        dim: size of the shared space.
        temperature: where it starts; learned from there.

    Raises:
        ValueError: a temperature below the smallest that is allowed, 0.01.
    """

    def __init__(
        self,
        image_tower: nn.Module,
        text_tower: nn.Module,
        image_width: int,
        text_width: int,
        dim: int = 64,
        temperature: float = 0.07,
    ):
        super().__init__()
        if not temperature >= 1 / SHARPEST:
            raise ValueError(f"temperatures are at least {1 / SHARPEST}, got {temperature}")
        self.image_tower, self.text_tower = image_tower, text_tower
        self.image_projection = nn.Linear(image_width, dim, bias=False)
        self.text_projection = nn.Linear(text_width, dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def embed_images(
        self, pixels: Float[Tensor, "image channel row column"]
    ) -> Float[Tensor, "image dim"]:
        """Pictures as vectors of length one."""
        return unit(self.image_projection(self.image_tower(pixels)))

    def embed_texts(self, text: Tensor) -> Float[Tensor, "text dim"]:
        """Texts, as the text tower reads them, as vectors of length one."""
        return unit(self.text_projection(self.text_tower(text)))

    def temperature(self) -> Float[Tensor, ""]:
        """What cosines are divided by, never below 1 / SHARPEST.

        The parameter itself is put back to its bound: a clamp on the way would have no gradient,
        and a scale that had once gone too far could never return.
        """
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(SHARPEST))
        return (-self.log_scale).exp()

    def forward(
        self, pixels: Float[Tensor, "pair channel row column"], text: Tensor
    ) -> Float[Tensor, ""]:
        """The loss of pictures and their texts."""
        return clip_loss(self.embed_images(pixels), self.embed_texts(text), self.temperature())


def pair_loss(model: CLIP, batch: tuple[Tensor, ...]) -> tuple[Float[Tensor, ""], int]:
    """The loss in the form that training/ wants: a sum, and over how many pairs.

    A contrastive batch cannot be cut into micro-batches: it would have fewer negatives.
    """
    pixels, text = batch
    return model(pixels, text) * len(pixels), len(pixels)


def main() -> None:
    torch.manual_seed(0)
    colours = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}
    pictures = torch.tensor(list(colours.values()))[:, :, None, None].expand(-1, -1, 4, 4)
    letters = [list(name.encode()) + [IGNORED] * (5 - len(name)) for name in colours]
    texts = torch.tensor(letters)
    sizes = {"vocabulary": 128, "width": 16, "layers": 1, "heads": 2, "hidden": 32, "positions": 8}
    towers = nn.Flatten(), TextTower(DecoderConfig(**sizes))
    model = CLIP(*towers, image_width=48, text_width=16, dim=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(101):
        loss = model(pictures, texts)
        if step % 25 == 0:
            print(f"  step {step:3}  loss {loss:.3f}  temperature {model.temperature():.4f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        cosines = model.embed_texts(texts) @ model.embed_images(pictures).T
    for name, row in zip(colours, cosines.tolist(), strict=True):
        print(f"  {name:6} is like " + ", ".join(f"{c:.2f}" for c in row))


if __name__ == "__main__":
    main()
