"""A trained classifier of pictures for whoever needs one: trained once, then read from the cache.

    train_or_load(config) = the model that config describes, from a folder named by config and code

Four thousand digits or fifteen hundred emoji are few: a vision transformer that sees them as they
are learns them by heart. So every batch is moved, turned and scaled a little, each time anew, and
a run that was stopped sees what it would have seen.

Paper   Touvron et al. 2020, arXiv:2012.12877 (augmentation instead of 300 million pictures)
Shapes  pixels [picture, channel, row, column], 0 where the paper is
Run     uv run python implementations/models/picture_classifier.py
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from implementations.attention.vendor import attention_sdpa
from implementations.contrastive.augmentation import Augmentation, augment
from implementations.lab.files import run_folder
from implementations.layers.patch_embedding import join_patches, split_patches
from implementations.models.convolutional_network import ConvolutionalNetwork
from implementations.models.vision_transformer import VisionTransformer, ViTConfig
from implementations.sources.images import mnist_5k
from implementations.sources.openmoji import openmoji
from implementations.training.loop import train
from implementations.training.rows import RandomRows
from implementations.training.settings import TrainingConfig

STILL = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "background": 0.0}
MOVES = {
    # A mirrored 2 is no 2; a mirrored apple is an apple, and mirrored letters are few.
    "mnist_5k": Augmentation(
        area=(0.75, 1.3), stretch=1.2, turn=14, shift=0.06, flip=False, **STILL
    ),
    "openmoji": Augmentation(area=(0.6, 1.3), stretch=1.2, turn=10, shift=0.04, **STILL),
}
CLASSES = 10  # digits, and OpenMoji's categories


@dataclass(frozen=True)
class ClassifierConfig:
    """What to train, on what, and how."""

    data: Literal["mnist_5k", "openmoji"] = "mnist_5k"
    size: int = 28
    """pixels of a picture's side"""
    model: Literal["vision_transformer", "convolutional"] = "vision_transformer"
    patch: int = 7
    width: int = 64
    layers: int = 4
    heads: int = 4
    hidden: int = 128
    position: Literal["learned", "sinusoidal", "rotary", "none"] = "sinusoidal"
    pooling: Literal["class", "mean"] = "mean"
    registers: int = 0
    shuffled: bool = False
    """all pictures' patches in one other order, the same for all"""
    augmented: bool = True
    steps: int = 8000
    batch: int = 32
    learning_rate: float = 1.5e-3
    seed: int = 0


class Labelled(NamedTuple):
    """Pictures on black paper, and the number of what each shows."""

    pixels: Float[Tensor, "picture channel row column"]
    labels: Int[Tensor, " picture"]


def pictures(config: ClassifierConfig) -> tuple[Labelled, Labelled]:
    """Training and test pictures of the size asked for.

    Raises:
        ValueError: the set is unknown, or the size below 8 or above 256.
    """
    if config.data not in MOVES or not 8 <= config.size <= 256:
        raise ValueError(
            f"sets are {', '.join(MOVES)}, sizes 8 to 256, got {config.data!r} at {config.size}"
        )
    return drawn(config.data, config.size)


@cache
def drawn(data: str, size: int) -> tuple[Labelled, Labelled]:
    """Kept, because a script asks for the same pictures with every model."""
    if data == "openmoji":
        parts = openmoji(size).split()
        return tuple(Labelled(1 - part.pixels.float() / 255, part.category) for part in parts)
    resize = partial(interpolate, size=size, mode="bilinear", antialias=True, align_corners=False)
    parts = mnist_5k().split()
    return tuple(Labelled(resize(part.pixels.float() / 255), part.labels) for part in parts)


def untrained(config: ClassifierConfig) -> nn.Module:
    """The model as it is before training."""
    torch.manual_seed(config.seed)
    channels = 1 if config.data == "mnist_5k" else 3
    if config.model == "convolutional":
        return ConvolutionalNetwork(channels, CLASSES)
    names = ("patch", "width", "layers", "heads", "hidden", "position", "pooling", "registers")
    sizes = {name: getattr(config, name) for name in names}
    shape = ViTConfig(image=config.size, channels=channels, classes=CLASSES, **sizes)
    return VisionTransformer(shape, attention_sdpa)


def prepared(
    config: ClassifierConfig, pixels: Float[Tensor, "batch channel row column"]
) -> Float[Tensor, "batch channel row column"]:
    """What the model reads: the pictures, or their patches in the one order of this shuffle."""
    if not config.shuffled:
        return pixels
    patches = split_patches(pixels, config.patch)
    order = torch.randperm(patches.shape[1], generator=torch.Generator().manual_seed(0))
    return join_patches(patches[:, order], config.patch, pixels.shape[-2] // config.patch)


def loss(
    model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]
) -> tuple[Float[Tensor, ""], int]:
    """Cross-entropy with a tenth of each label spread over all classes (Szegedy et al. 2015)."""
    pixels, labels = batch
    total = cross_entropy(model(pixels), labels, label_smoothing=0.1, reduction="sum")
    return total, len(labels)


class Trained(NamedTuple):
    """A classifier, and what it cost."""

    model: nn.Module
    seconds: float
    """that processors worked on its training, in all calls"""


def train_or_load(config: ClassifierConfig, device: str = "cpu") -> Trained:
    """The trained model, in eval mode and on that device; from the cache if it was trained there.

    Raises:
        ValueError: a setting is wrong; Diverged, one too, if training ends in NaN.
    """
    model, (known, _) = untrained(config).to(device), pictures(config)
    rows = RandomRows(known.pixels, known.labels, batch=config.batch, seed=config.seed)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        pixels, labels = rows(step)
        if config.augmented:
            pixels = augment(pixels, MOVES[config.data], seed=config.seed, step=step)
        return prepared(config, pixels), labels

    settings = TrainingConfig(
        steps=config.steps,
        learning_rate=config.learning_rate,
        warmup=config.steps // 10,
        final=0.01,
        weight_decay=0.05,
        betas=(0.9, 0.99),
        checkpoint_every=max(1, config.steps // 6),
        log_every=max(1, config.steps // 200),
        keep=1,
    )
    folder = run_folder(f"classifier-{config.data}", asdict(config) | {"device": device})
    done = train(model, batch, settings, folder, loss=loss, wait=True)
    return Trained(model.eval(), done.processor_seconds)


@torch.no_grad()
def accuracy(config: ClassifierConfig, model: nn.Module, part: Labelled) -> float:
    """Share of a part's pictures that the model names."""
    device = next(model.parameters()).device
    right = [
        model(prepared(config, pixels).to(device)).argmax(1).cpu() == labels
        for pixels, labels in zip(part.pixels.split(250), part.labels.split(250), strict=True)
    ]
    return torch.cat(right).double().mean().item()


def main() -> None:
    config = ClassifierConfig(layers=2, width=32, hidden=64, steps=300)
    trained = train_or_load(config)
    _, test = pictures(config)
    print(f"MNIST-5k in 16 patches of 7 x 7, {config.steps} steps of {config.batch} digits")
    print(f"  {accuracy(config, trained.model, test):.1%} of the test digits are named")
    print(f"  trained in {trained.seconds:.0f} s of a processor's time")


if __name__ == "__main__":
    main()
