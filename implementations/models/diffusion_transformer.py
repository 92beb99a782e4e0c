"""The diffusion transformer: patches of a noisy picture, and a norm that is told how noisy it is.

    shift, scale, gate = W silu(condition) + b        six of them a block, W and b zero at first
    x = x + gate₁ attention((1 + scale₁) norm(x) + shift₁)
    x = x + gate₂ feed_forward((1 + scale₂) norm(x) + shift₂)
    answer = W_out ((1 + scale) norm(x) + shift) + b_out,  put back as patches; W_out, b_out zero

This is adaLN-zero: all gates are closed at first, so that every block begins as the identity, and
the condition decides what each adds to the stream. The norm has no weights of its own.

Paper   Peebles & Xie 2022, arXiv:2212.09748
Shapes  x [batch, channel, row, column]    position [batch]    labels [batch]
Run     uv run python implementations/models/diffusion_transformer.py
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from implementations.attention.multi_head import MultiHeadAttention
from implementations.attention.positions_2d import grid_coordinates, sinusoidal_positions_2d
from implementations.attention_basic import attention_naive
from implementations.layers.feed_forward import FeedForward, gelu_tanh
from implementations.layers.patch_embedding import PatchEmbedding, join_patches, patch_grid
from implementations.models.unet import Condition, Picture

Tokens = Float[Tensor, "batch token width"]


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a diffusion transformer; the defaults suit digits."""

    image: int = 28
    """rows and columns"""
    channels: int = 1
    patch: int = 4
    width: int = 192
    layers: int = 6
    heads: int = 6
    hidden: int = 768
    dropout: float = 0.0
    classes: int = 0


class Modulation(nn.Module):
    """As many vectors of the stream's width as asked for, from the condition; zero at first."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.linear, self.count = nn.Linear(width, count * width), count
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, condition: Float[Tensor, "batch width"]) -> tuple[Tensor, ...]:
        return self.linear(silu(condition))[:, None].chunk(self.count, -1)


def modulated(x: Tokens, shift: Tensor, scale: Tensor) -> Tokens:
    """The norm without weights, then the condition's scale and shift."""
    return (1 + scale) * layer_norm(x, x.shape[-1:], eps=1e-6) + shift


class ConditionedBlock(nn.Module):
    """Attention and feed-forward, each between a modulated norm and a gate."""

    def __init__(self, config: TransformerConfig, attention: Callable[..., Tensor]):
        super().__init__()
        self.attention = MultiHeadAttention(config.width, config.heads, attention=attention)
        self.feed_forward = FeedForward(config.width, config.hidden, gelu_tanh)
        self.modulation = Modulation(config.width, 6)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tokens, condition: Float[Tensor, "batch width"]) -> Tokens:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)
        x = x + gate1 * self.dropout(self.attention(modulated(x, shift1, scale1)))
        return x + gate2 * self.dropout(self.feed_forward(modulated(x, shift2, scale2)))


class DiffusionTransformer(nn.Module):
    """Around any function with the signature of `attention_naive`.

    Raises:
        ValueError: patches do not tile the picture, or heads the width.
    """

    def __init__(
        self, config: TransformerConfig, attention: Callable[..., Tensor] = attention_naive
    ):
        super().__init__()
        self.config = config
        grid = patch_grid(config.image, config.image, config.patch)
        self.condition = Condition(config.width, config.width, config.classes)
        self.patches = PatchEmbedding(config.channels, config.width, config.patch)
        places = sinusoidal_positions_2d(grid_coordinates(grid), config.width)
        self.register_buffer("places", places, persistent=False)
        self.blocks = nn.ModuleList(
            ConditionedBlock(config, attention) for _ in range(config.layers)
        )
        self.modulation = Modulation(config.width, 2)
        self.leave = nn.Linear(config.width, config.channels * config.patch**2)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(
        self,
        x: Picture,
        position: Float[Tensor, " batch"],
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Picture:
        """The network's answer, as large as the picture.

        Raises:
            ValueError: the picture is of another size, or as `Condition`.
        """
        size = self.config.image
        if tuple(x.shape[-2:]) != (size, size):
            raise ValueError(f"pictures are {size} x {size}, got {list(x.shape[-2:])}")
        condition = self.condition(position, labels)
        tokens = self.patches(x) + self.places.to(x.dtype)
        for block in self.blocks:
            tokens = block(tokens, condition)
        answer = self.leave(modulated(tokens, *self.modulation(condition)))
        return join_patches(answer, self.config.patch, size // self.config.patch)


def main() -> None:
    torch.manual_seed(0)
    network = DiffusionTransformer(TransformerConfig(classes=10))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"{parameters:,} parameters")
    tokens, condition = torch.randn(2, 49, 192), torch.randn(2, 192)
    apart = (network.blocks[0](tokens, condition) - tokens).abs().max()
    print(f"before training a block changes its tokens by {apart:.1e}")


if __name__ == "__main__":
    main()
