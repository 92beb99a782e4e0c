"""CLIP and SimCLR on OpenMoji for whoever needs one: trained small the first time, then read from
the cache.

    train_or_load(config) = the model that config describes, from a folder named by config and code

CLIP learns from pictures and their names, SimCLR from pictures alone. Batches, views and the
language of a name are functions of the step, so a run that was stopped goes on.

Paper   Radford et al. 2021, arXiv:2103.00020; Chen et al. 2020, arXiv:2002.05709
Shapes  pixels [picture, 3, row, column] in [0, 1]
Run     uv run python implementations/contrastive/trained.py
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from implementations.attention.vendor import attention_sdpa
from implementations.contrastive.augmentation import Augmentation, augment, two_views
from implementations.contrastive.clip import CLIP, TextTower, pair_loss
from implementations.contrastive.distinct import DistinctRows
from implementations.contrastive.info_nce import nt_xent
from implementations.contrastive.named_pictures import (
    LONGEST,
    MERGES,
    Reader,
    as_floats,
    minilm_reader,
    scratch_reader,
    split_pictures,
)
from implementations.contrastive.simclr import SimCLR, view_loss
from implementations.lab.files import run_folder
from implementations.models.decoder import DecoderConfig
from implementations.models.vision_transformer import VisionTransformer, ViTConfig
from implementations.training.batches import raw_numbers
from implementations.training.loop import train
from implementations.training.settings import TrainingConfig

STREAM = 5 << 64  # of Philox's keys, for the languages
MINILM_WIDTH = 384
# A picture keeps its name when it is moved a little; its colour is often what it is named for.
GENTLE = Augmentation(
    area=(0.6, 1.1), turn=10, shift=0.05, brightness=0.1, contrast=0.1, saturation=0.1
)
STRONG = Augmentation(area=(0.3, 1.0), turn=15, brightness=0.4, contrast=0.4, saturation=0.8)


@dataclass(frozen=True)
class Tower:
    """The vision transformer that sees the pictures, and how it is trained."""

    image: int = 32
    """rows and columns of a picture"""
    patch: int = 8
    width: int = 64
    layers: int = 4
    dim: int = 64
    """of the space in which the loss compares"""
    steps: int = 400
    batch: int = 128
    learning_rate: float = 2e-3
    seed: int = 0
    pictures: int | None = None
    """how many there are, test pictures included; all unless given"""

    def vision(self) -> VisionTransformer:
        """The image tower, with seeded weights.

        Raises:
            ValueError: sizes that do not fit together.
        """
        sizes = {"image": self.image, "patch": self.patch, "width": self.width}
        sizes |= {"layers": self.layers, "heads": 4, "hidden": 2 * self.width}
        torch.manual_seed(self.seed)
        return VisionTransformer(ViTConfig(**sizes, pooling="mean"), attention_sdpa)


@dataclass(frozen=True)
class CLIPConfig(Tower):
    """Pictures and names, in which languages, and who reads them."""

    text: Literal["minilm", "scratch"] = "minilm"
    """a frozen model of sentences, or a decoder of two blocks trained with the pictures"""
    languages: tuple[str, ...] = ("en",)


@dataclass(frozen=True)
class SimCLRConfig(Tower):
    """Pictures alone, and how they are told apart."""

    temperature: float = 0.2


def reader(config: CLIPConfig) -> Reader:
    """What turns names into what the config's text tower reads.

    Raises:
        ValueError: there is no tower of that name.
    """
    if config.text == "minilm":
        return minilm_reader()
    if config.text != "scratch":
        raise ValueError(f"the text towers are minilm and scratch, got {config.text!r}")
    shown, _ = split_pictures(config.image, config.pictures)
    return scratch_reader([name for word in config.languages for name in shown.names[word]])


def untrained(config: Tower) -> CLIP | SimCLR:
    """The model as it is before training. Errors are those of `Tower.vision` and `reader`."""
    vision = config.vision()
    if isinstance(config, SimCLRConfig):
        return SimCLR(vision, config.width, config.dim)
    if config.text == "minilm":
        return CLIP(vision, nn.Identity(), config.width, MINILM_WIDTH, config.dim)
    sizes = {"vocabulary": 256 + MERGES, "positions": LONGEST, "width": config.width}
    text = TextTower(DecoderConfig(**sizes, layers=2, heads=4, hidden=2 * config.width))
    return CLIP(vision, text, config.width, config.width, config.dim)


def batches(config: Tower, read: Reader | None) -> Callable[[int], tuple[Tensor, Tensor]]:
    """The batch of a step: pictures and texts for CLIP, two views for SimCLR."""
    shown, _ = split_pictures(config.image, config.pictures)
    pixels, rows = (
        as_floats(shown),
        DistinctRows(shown.family, batch=config.batch, seed=config.seed),
    )

    def views(step: int) -> tuple[Tensor, Tensor]:
        return tuple(two_views(pixels[rows(step)], STRONG, seed=config.seed, step=step))

    if isinstance(config, SimCLRConfig):
        return views
    texts = torch.stack([read(shown.names[word]) for word in config.languages])

    def pairs(step: int) -> tuple[Tensor, Tensor]:
        chosen = rows(step)
        numbers = raw_numbers(STREAM + config.seed, step, len(chosen)) % len(texts)
        spoken = torch.from_numpy(numbers.astype("int64"))
        seen = augment(pixels[chosen], GENTLE, seed=config.seed, step=step)
        return seen, texts[spoken, chosen]

    return pairs


def train_or_load(config: Tower, read: Reader | None = None, device: str = "cpu") -> CLIP | SimCLR:
    """The trained model, in eval mode; a run that was finished before is read from the cache.

    Args:
        read: the config's reader, where the caller has made it already.

    Raises:
        ValueError: a setting is wrong; Diverged, one too, if training ends in NaN.
    """
    model = untrained(config).to(device)
    kind = type(config).__name__.removesuffix("Config").lower()
    folder = run_folder(kind, asdict(config) | {"device": device})
    if kind == "clip":
        loss, read = pair_loss, read or reader(config)
    else:
        loss = partial(view_loss, loss=partial(nt_xent, temperature=config.temperature))
    settings = TrainingConfig(
        steps=config.steps,
        learning_rate=config.learning_rate,
        warmup=config.steps // 10,
        final=0.0,
        betas=(0.9, 0.98),
        checkpoint_every=max(1, config.steps // 2),
        log_every=max(1, config.steps // 100),
        keep=1,
    )
    train(model, batches(config, read), settings, folder, loss=loss, wait=True)
    return model.eval()


def main() -> None:
    from implementations.contrastive.retrieval import recalls_both_ways

    config = CLIPConfig(steps=100, pictures=500, batch=64)
    read = reader(config)
    model = train_or_load(config, read)
    for name, part in zip(("training", "test"), split_pictures(count=500), strict=True):
        with torch.no_grad():
            texts = model.embed_texts(read(part.names["en"]))
            scores = model.embed_images(as_floats(part)) @ texts.T
        found = recalls_both_ways(scores, at=(1, 10))
        print(
            f"{len(scores)} {name} pictures: " + ", ".join(f"{k} {v:.2f}" for k, v in found.items())
        )


if __name__ == "__main__":
    main()
