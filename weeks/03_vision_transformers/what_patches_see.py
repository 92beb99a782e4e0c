"""What does a vision transformer look at, and does it know where its patches are?

A model with a class token and learned positions learns OpenMoji's categories. For a few test
pictures: which patches the class token reads, through all layers (attention rollout) and head by
head in the last one. Then its positions: how much the vector of each place looks like those of all
other places. Nobody told it that pictures have rows and columns.

Expected: rollout is a distribution. Neighbouring places should look more alike than distant ones,
as Dosovitskiy et al. found in models trained on 300 million pictures; how far 1,502 carry is
measured. So is whether rollout rests on the drawing more than on the paper around it.

Paper   Abnar & Zuidema 2020, arXiv:2005.00928; Dosovitskiy et al. 2020, arXiv:2010.11929, figure 7
Run     uv run python weeks/03_vision_transformers/what_patches_see.py
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, cosine_similarity, interpolate

from implementations.attention.positions_2d import grid_coordinates
from implementations.attention.rollout import attention_distance, attention_rollout
from implementations.lab.findings import Finding, at_least, within
from implementations.lab.script import run
from implementations.models.picture_classifier import (
    ClassifierConfig,
    accuracy,
    pictures,
    train_or_load,
)
from implementations.models.vision_transformer import VisionTransformer
from implementations.sources.picture_file import read_picture


@dataclass(frozen=True)
class Config:
    """Maps of one trained model over real pictures."""

    data: str = "openmoji"
    """openmoji or mnist_5k"""
    shown: int = 6
    """test pictures, as many categories"""
    picture: Path | None = None
    """a picture of your own, shown first"""
    steps: int = 1000
    """training steps of the model, 32 pictures each"""
    device: str = "cpu"


def similarity(model: VisionTransformer) -> Float[Tensor, "patch other"]:
    """Cosines between the learned positions of all patches."""
    table = model.positions[0, 1:]
    return cosine_similarity(table[:, None], table[None], dim=-1)


def chosen(pixels: Tensor, labels: Tensor, count: int) -> Tensor:
    """The first picture of each class, as many as there shall be."""
    rows = [int((labels == label).nonzero()[0]) for label in labels.unique()[:count]]
    return pixels[rows]


def draw_maps(pixels: Tensor, rollout: Tensor, heads: Tensor, label: str) -> None:
    """A row for each picture: the picture, rollout over it, the last layer's heads."""
    columns = 2 + heads.shape[1]
    figure, grid = plt.subplots(
        len(pixels), columns, figsize=(1.5 * columns, 1.55 * len(pixels)), squeeze=False
    )
    figure.set_label(label)
    for row, picture in enumerate(pixels):
        paper = (1 - picture).permute(1, 2, 0).expand(-1, -1, 3).numpy()
        grid[row, 0].imshow(paper)
        for axes, patches in zip(grid[row, 1:], (rollout[row], *heads[row]), strict=True):
            side = round(len(patches) ** 0.5)
            square = patches.view(1, 1, side, side)
            axes.imshow(paper.mean(-1), cmap="gray", alpha=0.35)
            axes.imshow(
                interpolate(square, picture.shape[1:])[0, 0].numpy(), cmap="magma", alpha=0.75
            )
    for axes, title in zip(
        grid[0], ("picture", "rollout", *(f"head {i}" for i in range(columns - 2))), strict=True
    ):
        axes.set_title(title)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    figure.tight_layout()


def draw_positions(alike: Float[Tensor, "patch other"]) -> None:
    """For every place a small map: how alike its position is to each other one."""
    side = round(len(alike) ** 0.5)
    figure, grid = plt.subplots(side, side, figsize=(7.6, 7))
    figure.set_label("positions")
    for axes, row in zip(grid.flat, alike, strict=True):
        image = axes.imshow(row.view(side, side).numpy(), vmin=-1, vmax=1, cmap="coolwarm")
        axes.set(xticks=[], yticks=[])
    figure.colorbar(image, ax=grid, shrink=0.7, label="cosine")
    figure.suptitle("Learned positions: each small map is one place against all")


def main(config: Config) -> list[Finding]:
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    size = 32 if config.data == "openmoji" else 28
    settings = ClassifierConfig(
        data=config.data,
        size=size,
        patch=4,
        position="learned",
        pooling="class",
        steps=config.steps,
    )
    model = train_or_load(settings, config.device).model.cpu()
    _, test = pictures(settings)
    pixels = chosen(test.pixels, test.labels, config.shown)
    if config.picture:
        own = 1 - read_picture(config.picture, size).float()[None] / 255
        own = own if pixels.shape[1] == 3 else own.mean(1, keepdim=True)
        pixels = torch.cat([own, pixels])
    maps = model.attention_maps(pixels)
    rollout = attention_rollout(maps)[:, 0]
    last = maps[-1, :, :, 0, 1:]
    draw_maps(pixels, rollout[:, 1:], last, config.data)
    alike = similarity(model).detach()
    draw_positions(alike)

    many = test.pixels[:200]
    read = attention_rollout(model.attention_maps(many))[:, 0]
    ink = avg_pool2d(many.amax(1, keepdim=True), settings.patch).flatten(1) > 0.05
    on_ink = (read[:, 1:] * ink).sum(1) / read[:, 1:].sum(1)
    coordinates = grid_coordinates((size // settings.patch,) * 2)
    apart = torch.cdist(coordinates, coordinates)
    near, far = alike[(apart > 0) & (apart < 1.1)].mean(), alike[apart >= 4].mean()
    reach = attention_distance(maps, coordinates)
    source = "Dosovitskiy et al. 2020, figure 7"
    return [
        Finding("test pictures named by this model", accuracy(settings, model, test)),
        Finding(
            "rollout sums to",
            rollout.sum(-1).mean().item(),
            expected=within(0.9999, 1.0001),
            source="a product of stochastic matrices",
        ),
        Finding("the class token's own share of it", rollout[:, 0].mean().item()),
        Finding("share of patches with ink", ink.float().mean().item()),
        Finding("share of rollout on patches with ink", on_ink.mean().item()),
        Finding(
            "rollout rests on ink more than it would by chance, by",
            (on_ink.mean() - ink.float().mean()).item(),
            goal=at_least(0.0),
        ),
        Finding("positions: cosine of neighbouring places", near.item()),
        Finding("positions: cosine of places 4 patches apart or more", far.item()),
        Finding(
            "neighbours are more alike by", (near - far).item(), goal=at_least(0.1), source=source
        ),
        Finding("first layer: heads look this far on average", reach[0].mean().item(), "patches"),
        Finding("last layer: heads look this far on average", reach[-1].mean().item(), "patches"),
        Finding("looking everywhere alike would be", apart.mean().item(), "patches"),
    ]


if __name__ == "__main__":
    run(main, Config(), quick=Config(data="mnist_5k", shown=3, steps=6))
