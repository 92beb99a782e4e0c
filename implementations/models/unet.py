"""The U-Net of diffusion: down to few pixels and up again, with a bridge at every height.

    embedding = silu(W₁ waves(position) + b₁) W₂ + b₂ + table[label]       position: how noisy, 0..1
    part(x)   = shortcut(x) + conv(silu(norm(conv(silu(norm(x))) + W embedding)))
    attend(x) = x + attention(norm(x)), every pixel a token                at the lower heights
    down      : parts, then a convolution of stride 2; each result is kept
    up        : parts of [x, what was kept at this height], then pixels doubled and convolved

Attention is passed in. The layout is that of the library diffusers' UNet2DModel, and with its
weights the outputs are the same (`to_diffusers`).

Paper   Ronneberger et al. 2015, arXiv:1505.04597; Ho et al. 2020, arXiv:2006.11239, appendix B
Shapes  x [batch, channel, row, column]    position [batch]    labels [batch]
Run     uv run python implementations/models/unet.py
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import interpolate, silu

from implementations.attention.multi_head import MultiHeadAttention
from implementations.attention_basic import attention_naive

Picture = Float[Tensor, "batch channel row column"]
SLOWEST = 10_000.0  # of the waves, as in the transformer of 2017
POSITIONS = 1000.0  # a position from 0 to 1 is told as DDPM's steps are, from 0 to 1,000


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a U-Net; the defaults suit digits."""

    channels: int = 1
    """of the pictures"""
    widths: tuple[int, ...] = (64, 128, 128)
    """channels at each height, each half as tall as the one before"""
    parts: int = 2
    """at each height on the way down; one more on the way up"""
    attends: tuple[bool, ...] = (False, False, True)
    """whether pixels look at each other there"""
    head: int = 32
    """channels of one attention head"""
    groups: int = 32
    """of the group norm"""
    dropout: float = 0.0
    classes: int = 0
    """labels; one more stands for none. 0: the network reads no labels"""

    def check(self) -> None:
        """Raises ValueError where the sizes do not fit together."""
        if not self.widths or len(self.widths) != len(self.attends) or self.parts < 1:
            raise ValueError(
                f"each height has a width, a word on attention and a part, got {self.widths}, "
                f"{self.attends}, {self.parts}"
            )
        for width in self.widths:
            if width % self.groups:
                raise ValueError(f"{self.groups} groups cannot share {width} channels evenly")


def waves(position: Float[Tensor, " batch"], width: int) -> Float[Tensor, "batch width"]:
    """Cosines, then sines, of a position from 0 to 1, in float32 or wider."""
    half = width // 2
    wide = position.to(torch.promote_types(position.dtype, torch.float32))
    index = torch.arange(half, device=position.device, dtype=wide.dtype)
    angle = POSITIONS * wide[:, None] * torch.exp(-math.log(SLOWEST) / half * index)
    return torch.cat((angle.cos(), angle.sin()), 1)


class Condition(nn.Module):
    """How noisy the picture is and what it shows, as one vector."""

    def __init__(self, width: int, size: int, classes: int):
        super().__init__()
        self.width, self.classes = width, classes
        self.first, self.second = nn.Linear(width, size), nn.Linear(size, size)
        self.labels = nn.Embedding(classes + 1, size) if classes else None

    def forward(
        self, position: Float[Tensor, " batch"], labels: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch size"]:
        """Without labels, those of a labelled network are "none".

        Raises:
            ValueError: labels for a network that reads none.
        """
        if labels is not None and self.labels is None:
            raise ValueError("this network was made without labels and cannot read any")
        told = waves(position, self.width).to(self.first.weight.dtype)
        embedding = self.second(silu(self.first(told)))
        if self.labels is None:
            return embedding
        if labels is None:
            labels = torch.full_like(position, self.classes, dtype=torch.long)
        return embedding + self.labels(labels)


class Part(nn.Module):
    """Two convolutions, the embedding between them, around them a shortcut; then attention."""

    def __init__(
        self, before: int, after: int, config: UNetConfig, attend: bool, attention: Callable
    ):
        super().__init__()
        size = 4 * config.widths[0]
        self.norm1 = nn.GroupNorm(config.groups, before)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.embedding = nn.Linear(size, after)
        self.norm2 = nn.GroupNorm(config.groups, after)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.shortcut = nn.Conv2d(before, after, 1) if before != after else None
        self.attend = Attend(after, config, attention) if attend else None

    def forward(
        self, x: Picture, embedding: Float[Tensor, "batch size"]
    ) -> Float[Tensor, "batch wanted row column"]:
        hidden = self.conv1(silu(self.norm1(x)))
        hidden = hidden + self.embedding(silu(embedding))[:, :, None, None]
        hidden = self.conv2(self.dropout(silu(self.norm2(hidden))))
        x = (x if self.shortcut is None else self.shortcut(x)) + hidden
        return x if self.attend is None else self.attend(x)


class Attend(nn.Module):
    """Every pixel looks at every other."""

    def __init__(self, width: int, config: UNetConfig, attention: Callable):
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, width)
        self.attention = MultiHeadAttention(width, width // config.head, attention=attention)

    def forward(self, x: Picture) -> Picture:
        tokens = rearrange(self.norm(x), "batch channel row column -> batch (row column) channel")
        seen = self.attention(tokens)
        return x + rearrange(
            seen, "batch (row column) channel -> batch channel row column", row=x.shape[-2]
        )


class Double(nn.Module):
    """Every pixel becomes four, and a convolution smooths them."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Picture) -> Float[Tensor, "batch channel rows columns"]:
        return self.conv(interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """Around any function with the signature of `attention_naive`.

    Raises:
        ValueError: the sizes do not fit together.
    """

    def __init__(self, config: UNetConfig, attention: Callable[..., Tensor] = attention_naive):
        super().__init__()
        config.check()
        self.config, widths, last = config, config.widths, len(config.widths) - 1
        self.condition = Condition(widths[0], 4 * widths[0], config.classes)
        self.enter = nn.Conv2d(config.channels, widths[0], 3, padding=1)
        kept, down, up = [widths[0]], [], []
        width = widths[0]
        for height, wanted in enumerate(widths):
            for _ in range(config.parts):
                down.append(Part(width, wanted, config, config.attends[height], attention))
                width = wanted
                kept.append(width)
            if height < last:
                down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                kept.append(width)
        self.middle = nn.ModuleList(
            Part(width, width, config, attend, attention) for attend in (True, False)
        )
        for height in range(last, -1, -1):
            for _ in range(config.parts + 1):
                before = width + kept.pop()
                width = widths[height]
                up.append(Part(before, width, config, config.attends[height], attention))
            if height:
                up.append(Double(width))
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
        self.norm, self.leave = (
            nn.GroupNorm(config.groups, width),
            nn.Conv2d(width, config.channels, 3, padding=1),
        )
        nn.init.zeros_(self.leave.weight)  # at first the answer is nought, whatever is asked

    def forward(
        self,
        x: Picture,
        position: Float[Tensor, " batch"],
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Picture:
        """The network's answer, as large as the picture.

        Raises:
            ValueError: the picture cannot be halved so often, or as `Condition`.
        """
        halvings = 2 ** (len(self.config.widths) - 1)
        if x.shape[-1] % halvings or x.shape[-2] % halvings:
            raise ValueError(
                f"rows and columns are multiples of {halvings}, got {x.shape[-2]} x {x.shape[-1]}"
            )
        embedding = self.condition(position, labels)
        x = self.enter(x)
        kept = [x]
        for layer in self.down:
            x = layer(x, embedding) if isinstance(layer, Part) else layer(x)
            kept.append(x)
        for part in self.middle:
            x = part(x, embedding)
        for layer in self.up:
            if isinstance(layer, Part):
                x = layer(torch.cat((x, kept.pop()), 1), embedding)
            else:
                x = layer(x)
        return self.leave(silu(self.norm(x)))


PART_NAMES = {  # ours to diffusers', inside a part
    "norm1": "norm1",
    "conv1": "conv1",
    "embedding": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "shortcut": "conv_shortcut",
}
ATTEND_NAMES = {
    "attend.norm": "group_norm",
    "attend.attention.query": "to_q",
    "attend.attention.key": "to_k",
    "attend.attention.value": "to_v",
    "attend.attention.output": "to_out.0",
}


def diffusers_names(config: UNetConfig) -> dict[str, str]:
    """Our parameters' prefixes and those of diffusers' UNet2DModel of the same sizes."""
    names = {
        "condition.first": "time_embedding.linear_1",
        "condition.second": "time_embedding.linear_2",
        "enter": "conv_in",
        "norm": "conv_norm_out",
        "leave": "conv_out",
    }

    def part(ours: str, block: str, index: int) -> None:
        for name, theirs in PART_NAMES.items():
            names[f"{ours}.{name}"] = f"{block}.resnets.{index}.{theirs}"
        for name, theirs in ATTEND_NAMES.items():
            names[f"{ours}.{name}"] = f"{block}.attentions.{index}.{theirs}"

    heights, parts = len(config.widths), config.parts
    for height in range(heights):
        for index in range(parts):
            part(f"down.{height * (parts + 1) + index}", f"down_blocks.{height}", index)
        place = f"down.{height * (parts + 1) + parts}"
        names[place] = f"down_blocks.{height}.downsamplers.0.conv"
        for index in range(parts + 1):
            part(f"up.{height * (parts + 2) + index}", f"up_blocks.{height}", index)
        place = f"up.{height * (parts + 2) + parts + 1}.conv"
        names[place] = f"up_blocks.{height}.upsamplers.0.conv"
    for index in range(2):
        part(f"middle.{index}", "mid_block", index)
    return names


def to_diffusers(state: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Our state dict under diffusers' names; of a network without labels."""
    table, renamed = diffusers_names(config), {}
    for name, tensor in state.items():
        prefix, _, kind = name.rpartition(".")
        renamed[f"{table[prefix]}.{kind}"] = tensor
    return renamed


def main() -> None:
    torch.manual_seed(0)
    network = UNet(UNetConfig(classes=10)).eval()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"{parameters:,} parameters")
    nn.init.normal_(network.leave.weight, std=0.05)
    picture, noise = torch.zeros(1, 1, 28, 28), torch.tensor([0.5])
    picture[..., 14, 14] = 1
    changed = []
    with torch.no_grad():
        for label in (3, 4):
            changed.append(network(picture, noise, torch.tensor([label])))
    print(f"another label changes the answer by {(changed[0] - changed[1]).abs().max():.3f}")


if __name__ == "__main__":
    main()
