"""What a diffusion model is, on what it is trained, and how: one config says all.

    DiffusionConfig -> data, U-Net or transformer, its question, its schedule, its training
    for_device      -> the config that the weekly scripts share
    untrained       -> the model that a config describes

Paper   Ho et al. 2020, arXiv:2006.11239; Peebles & Xie 2022, arXiv:2212.09748 (the transformer)
Run     uv run python implementations/generative/diffusion_config.py
"""

from dataclasses import dataclass
from typing import Literal

import torch

from implementations.attention.vendor import attention_sdpa
from implementations.generative.denoiser import Denoiser
from implementations.generative.diffusion_pictures import pictures
from implementations.models.diffusion_transformer import DiffusionTransformer, TransformerConfig
from implementations.models.unet import UNet, UNetConfig


@dataclass(frozen=True)
class DiffusionConfig:
    """What to train, on what, and how."""

    data: Literal["mnist_5k", "digits", "kanji", "openmoji"] = "mnist_5k"
    size: int = 28
    """pixels of a picture's side; digits have 8"""
    model: Literal["unet", "transformer"] = "unet"
    widths: tuple[int, ...] = (64, 128, 128)
    """channels at each height of the U-Net"""
    parts: int = 2
    """of the U-Net, at each height"""
    groups: int = 32
    head: int = 32
    """channels of an attention head"""
    patch: int = 4
    """of the transformer"""
    width: int = 192
    layers: int = 6
    dropout: float = 0.1
    labelled: bool = True
    """whether the network reads labels; they are left out of a tenth of the pictures"""
    kind: Literal["data", "noise", "v", "flow"] = "v"
    """what the network answers"""
    schedule: Literal["linear", "cosine", "straight", "even"] = "cosine"
    times: Literal["uniform", "logit_normal"] = "uniform"
    dequantized: bool = False
    """learn a density of pixels with uniform noise between the levels, and not of the levels"""
    steps: int = 6000
    batch: int = 128
    learning_rate: float = 1e-3
    decay: float = 0.999
    """of the average of the weights"""
    looks: int = 40
    """at the held-out loss"""
    patience: int = 10
    """looks without progress after which training stops"""
    seed: int = 0


def for_device(device: str, *, size: int = 0, steps: int = 0, **changes) -> DiffusionConfig:
    """The model that the weekly scripts share: of real size on a GPU, a small one on a CPU.

    Args:
        size: pixels of a side, 0 for the device's own; `steps` of training likewise.
        changes: of the other settings.
    """
    changes |= {"size": size} if size else {}
    changes |= {"steps": steps} if steps else {}
    small = {"size": 14, "widths": (16, 32), "parts": 1, "groups": 8, "head": 16, "dropout": 0.0}
    small |= {"steps": 1200, "batch": 32, "decay": 0.995, "learning_rate": 2e-3, "looks": 20}
    small |= {"width": 64, "layers": 2, "patch": 2}
    return DiffusionConfig(**(small if device == "cpu" else {}) | changes)


def untrained(config: DiffusionConfig) -> Denoiser:
    """The model as it is before training.

    Raises:
        ValueError: labels are asked for where there are none, or sizes do not fit.
    """
    data = pictures(config.data, config.size)
    if config.labelled and not data.classes:
        raise ValueError(f"{config.data} has no labels to learn from: set labelled to False")
    torch.manual_seed(config.seed)
    channels, classes = data.train.pixels.shape[1], data.classes if config.labelled else 0
    shared = {"channels": channels, "dropout": config.dropout, "classes": classes}
    if config.model == "transformer":
        network = DiffusionTransformer(
            TransformerConfig(
                image=config.size,
                patch=config.patch,
                width=config.width,
                layers=config.layers,
                heads=config.width // config.head,
                hidden=4 * config.width,
                **shared,
            ),
            attention_sdpa,
        )
    else:
        attends = (False,) * (len(config.widths) - 1) + (True,)
        sizes = {"widths": config.widths, "parts": config.parts, "attends": attends}
        network = UNet(
            UNetConfig(**sizes, groups=config.groups, head=config.head, **shared), attention_sdpa
        )
    return Denoiser(network, config.kind)


def placed(config: DiffusionConfig, device: torch.device) -> Denoiser:
    """Untrained, on its device; on a GPU with the channels last, as its convolutions want them."""
    memory = torch.channels_last if device.type == "cuda" else torch.preserve_format
    return untrained(config).to(device, memory_format=memory)


def main() -> None:
    for device in ("cpu", "cuda"):
        for model in ("unet", "transformer"):
            config = for_device(device, model=model)
            parameters = sum(p.numel() for p in untrained(config).parameters())
            print(f"{device:5}{model:12}{config.size} x {config.size}  {parameters:9,} parameters")


if __name__ == "__main__":
    main()
