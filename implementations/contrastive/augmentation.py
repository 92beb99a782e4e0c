"""Augmentation: another look at the same picture, which what it shows should survive.

    where   output(x) = picture(R(angle) diag(size, flipped) x + centre)   bilinear, x in [-1, 1]²
    colour  brightness, contrast and saturation: blend with black, with the mean grey, with grey

How a picture is changed depends on (seed, step, its place in the batch) and on nothing else, so a
run that goes on sees what it would have seen. Each picture has draws of its own, so two views of a
batch are that batch twice. It is plain torch because torchvision has no CPU-only build among the
locked packages; two dozen lines are easier to read than a second build to maintain.

Paper   Chen et al. 2020, arXiv:2002.05709, appendix A (random resized crop, flip, colour jitter)
Shapes  pixels [batch, channel, row, column] in [0, 1]
Run     uv run python implementations/contrastive/augmentation.py
"""

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from implementations.training.batches import raw_numbers

DRAWS = 11  # random numbers a picture
STREAM = 1 << 64  # Philox's key has two words: the low one is the seed, as for the rows of a batch
LUMA = (0.299, 0.587, 0.114)  # grey of red, green and blue: ITU-R 601-2


@dataclass(frozen=True)
class Augmentation:
    """How far a picture may be changed; zeros and an area of one leave it as it is."""

    area: tuple[float, float] = (0.3, 1.0)
    """least and largest share of the picture that is cut out; above 1, background surrounds it"""
    stretch: float = 4 / 3
    """largest ratio of the cut's sides"""
    turn: float = 0.0
    """largest angle, in degrees"""
    shift: float = 0.0
    """largest shift, as a share of the side, beyond where the cut may lie anyway"""
    flip: bool = True
    """mirror every second picture, left for right"""
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    """each factor lies within 1 - this and 1 + this"""
    background: float = 1.0
    """what lies outside the picture"""

    def check(self) -> None:
        """Raises ValueError with the rule and the value, for the first setting that breaks one."""
        low, high = self.area
        if not 0 < low <= high:
            raise ValueError(f"areas are positive and in order, got {self.area}")
        if self.stretch < 1:
            raise ValueError(f"a ratio of sides is at least 1, got {self.stretch}")
        for name in ("turn", "shift", "brightness", "contrast", "saturation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is not negative, got {getattr(self, name)}")


def augment(
    pixels: Float[Tensor, "batch channel row column"],
    settings: Augmentation,
    *,
    seed: int,
    step: int,
) -> Float[Tensor, "batch channel row column"]:
    """Each picture moved and recoloured by draws of its own, a function of (seed, step).

    Raises:
        ValueError: a setting is wrong, or pictures without three channels are to be saturated.
    """
    settings.check()
    if settings.saturation and pixels.shape[1] != 3:
        raise ValueError(f"saturation needs red, green and blue, got {pixels.shape[1]} channels")
    raw = raw_numbers(STREAM + seed, step, DRAWS * len(pixels))
    uniform = torch.from_numpy((raw >> np.uint64(11)) * 2.0**-53).to(pixels)
    draws = rearrange(uniform, "(batch draw) -> draw batch", draw=DRAWS)
    return recoloured(moved(pixels, settings, draws[:8]), settings, draws[8:])


def two_views(
    pixels: Float[Tensor, "batch channel row column"],
    settings: Augmentation,
    *,
    seed: int,
    step: int,
) -> Float[Tensor, "view batch channel row column"]:
    """Two looks at every picture, changed independently. Errors are those of `augment`."""
    twice = augment(torch.cat([pixels, pixels]), settings, seed=seed, step=step)
    return rearrange(twice, "(view batch) ... -> view batch ...", view=2)


def moved(
    pixels: Float[Tensor, "batch channel row column"],
    settings: Augmentation,
    draws: Float[Tensor, "8 batch"],
) -> Float[Tensor, "batch channel row column"]:
    """Crop, stretch, mirror, turn and shift in one resampling: the map from output to input."""
    signed = 2 * draws - 1
    low, high = settings.area
    area = low + (high - low) * draws[0]
    ratio = settings.stretch ** signed[1]  # as often r as 1/r
    size = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()])
    centre = signed[2:4] * (1 - size).abs() + signed[4:6] * 2 * settings.shift
    mirror = torch.where((draws[6] < 0.5) & settings.flip, -1.0, 1.0)
    angle = torch.deg2rad(settings.turn * signed[7])
    cos, sin, (width, height) = angle.cos(), angle.sin(), size
    rows = [cos * width * mirror, -sin * height, centre[0]]
    rows += [sin * width * mirror, cos * height, centre[1]]
    theta = rearrange(torch.stack(rows), "(row column) batch -> batch row column", row=2)
    grid = affine_grid(theta, list(pixels.shape), align_corners=False)
    shifted = pixels - settings.background  # what lies outside is zero to grid_sample
    return grid_sample(shifted, grid, align_corners=False) + settings.background


def recoloured(
    pixels: Float[Tensor, "batch channel row column"],
    settings: Augmentation,
    draws: Float[Tensor, "3 batch"],
) -> Float[Tensor, "batch channel row column"]:
    """Brightness, contrast, saturation: pixels blended with another picture, back within [0, 1]."""
    strengths = (settings.brightness, settings.contrast, settings.saturation)
    for change, strength, draw in zip((black, mean_grey, grey), strengths, draws, strict=True):
        if strength:
            factor = (1 + strength * (2 * draw - 1))[:, None, None, None]
            pixels = torch.lerp(change(pixels), pixels, factor).clamp(0, 1)
    return pixels


def black(pixels: Tensor) -> Tensor:
    return torch.zeros_like(pixels)


def grey(pixels: Tensor) -> Tensor:
    """Each pixel without its colour; a picture of one channel has none."""
    if pixels.shape[1] == 1:
        return pixels
    weights = torch.tensor(LUMA).to(pixels)[:, None, None]
    return (weights * pixels).sum(1, keepdim=True).expand_as(pixels)


def mean_grey(pixels: Tensor) -> Tensor:
    """Each picture's mean of grey, everywhere."""
    return grey(pixels).mean((1, 2, 3), keepdim=True).expand_as(pixels)


def main() -> None:
    row = torch.arange(8) / 8
    picture = row.expand(1, 3, 8, 8)
    settings = Augmentation(area=(0.5, 1.0), brightness=0, contrast=0, saturation=0)
    print("one picture, brighter to the right; its middle row in views of it")
    for step in (0, 1, 2, 1):
        view = augment(picture, settings, seed=0, step=step)[0, 0, 4]
        print(f"  step {step}  " + " ".join(f"{level:.2f}" for level in view.tolist()))
    first, second = two_views(picture.expand(1000, 3, 8, 8), settings, seed=0, step=0)
    apart = (first - second).abs().mean().item()
    print(f"two views of 1,000 pictures differ by {apart:.3f} a pixel on average")


if __name__ == "__main__":
    main()
