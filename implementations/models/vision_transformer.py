"""The vision transformer: a picture read as a text of patches, by the blocks of every transformer.

    h_0 = [class token; registers; patches W + b] + positions (class token and patches have one)
    h_i = block_i(h_{i-1}), norm first
    features = norm(h)[class token], or the mean of norm(h) over the patches

A class token, a mean and registers are three answers to one question: where to put what concerns
the whole picture. Positions are learned, sinusoidal, rotary or absent; each can be asked for a
picture of another size than those trained on.

Paper   Dosovitskiy et al. 2020, arXiv:2010.11929; registers: Darcet et al. 2023, arXiv:2309.16588
Shapes  pixels [batch, channel, row, column]    tokens [batch, token, width]
Run     uv run python implementations/models/vision_transformer.py
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implementations.attention.positions_2d import (
    GridAttention,
    grid_coordinates,
    interpolated_positions,
    sinusoidal_positions_2d,
)
from implementations.attention_basic import attention_naive
from implementations.layers.block import Block
from implementations.layers.dropout import Dropout
from implementations.layers.feed_forward import FeedForward
from implementations.layers.layer_norm import LayerNorm
from implementations.layers.patch_embedding import PatchEmbedding, patch_grid
from implementations.models.parameter_names import from_published, to_published

VIT_NAMES = {  # as in the files of google/vit-base-patch16-224-in21k, without its pooler
    "class_token": "embeddings.cls_token",
    "positions": "embeddings.position_embeddings",
    "patches": "embeddings.patch_embeddings.projection",
    "blocks.{layer}.attention_norm": "encoder.layer.{layer}.layernorm_before",
    "blocks.{layer}.attention.query": "encoder.layer.{layer}.attention.attention.query",
    "blocks.{layer}.attention.key": "encoder.layer.{layer}.attention.attention.key",
    "blocks.{layer}.attention.value": "encoder.layer.{layer}.attention.attention.value",
    "blocks.{layer}.attention.output": "encoder.layer.{layer}.attention.output.dense",
    "blocks.{layer}.feed_forward_norm": "encoder.layer.{layer}.layernorm_after",
    "blocks.{layer}.feed_forward.expand": "encoder.layer.{layer}.intermediate.dense",
    "blocks.{layer}.feed_forward.contract": "encoder.layer.{layer}.output.dense",
    "norm": "layernorm",
}
# A model that classifies is kept as a model and a classifier: google/vit-base-patch16-224.
CLASSIFIER_NAMES = {name: f"vit.{theirs}" for name, theirs in VIT_NAMES.items()}
CLASSIFIER_NAMES["head"] = "classifier"


@dataclass(frozen=True)
class ViTConfig:
    """Sizes and style of a vision transformer; the defaults are small enough for a laptop."""

    image: int = 32  # rows and columns of pixels that it is trained on
    patch: int = 4
    channels: int = 3
    width: int = 96
    layers: int = 6
    heads: int = 4
    hidden: int = 192  # inside the feed-forward layer
    position: Literal["learned", "sinusoidal", "rotary", "none"] = "learned"
    pooling: Literal["class", "mean"] = "class"
    registers: int = 0
    classes: int = 0  # of a linear classifier on the features; 0 for none
    epsilon: float = 1e-12  # as in the published files
    dropout: float = 0.0

    @property
    def before(self) -> int:
        """How many tokens stand before the patches."""
        return (self.pooling == "class") + self.registers

    @property
    def grid(self) -> tuple[int, int]:
        """Patches above and beside each other in the pictures that it is trained on.

        Raises:
            ValueError: they do not tile the picture.
        """
        return patch_grid(self.image, self.image, self.patch)


class VisionTransformer(nn.Module):
    """Around any function with the signature of `attention_naive`."""

    def __init__(self, config: ViTConfig, attention: Callable[..., Tensor] = attention_naive):
        super().__init__()
        self.config, width = config, config.width
        self.patches = PatchEmbedding(config.channels, width, config.patch)
        has_class = config.pooling == "class"
        places = config.grid[0] * config.grid[1] + has_class
        learned = config.position == "learned"
        self.class_token = table(1, width) if has_class else None
        self.registers = table(config.registers, width) if config.registers else None
        self.positions = table(places, width) if learned else None
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(
                GridAttention(width, config.heads, attention=attention),
                # Torch's GELU is one pass over the wide space, ours four.
                FeedForward(width, config.hidden, nn.functional.gelu),
                lambda: LayerNorm(width, config.epsilon),
                dropout=config.dropout,
            )
            for _ in range(config.layers)
        )
        self.norm = LayerNorm(width, config.epsilon)
        self.head = nn.Linear(width, config.classes) if config.classes else None

    def embed(
        self, pixels: Float[Tensor, "batch channel row column"]
    ) -> Float[Tensor, "batch token width"]:
        """What enters the first block: class token, registers, patches, with their positions."""
        patches, batch = self.patches(pixels), len(pixels)
        where = self.positions_for(self.grid_of(pixels), patches)
        before = [] if self.class_token is None else [self.class_token.expand(batch, -1, -1)]
        if where is not None:
            patches = patches + where[:, len(before) :]
            before = [token + where[:, :1] for token in before]
        if self.registers is not None:
            before.append(self.registers.expand(batch, -1, -1))
        return self.dropout(torch.cat([*before, patches], dim=1))

    def positions_for(
        self, grid: tuple[int, int], like: Tensor
    ) -> Float[Tensor, "1 place width"] | None:
        """What is added to the class token, if there is one, and to the patches of a grid."""
        has_class = self.class_token is not None
        if self.positions is not None:
            read = interpolated_positions(self.positions[0, has_class:], self.config.grid, grid)
            return torch.cat((self.positions[:, :has_class], read[None]), dim=1)
        if self.config.position == "sinusoidal":
            places = grid_coordinates(grid, self.config.grid)
            waves = sinusoidal_positions_2d(places, self.config.width).to(like)
            return nn.functional.pad(waves, (0, 0, int(has_class), 0))[None]  # zeros: nowhere
        return None

    def hidden_states(
        self, pixels: Float[Tensor, "batch channel row column"]
    ) -> list[Float[Tensor, "batch token width"]]:
        """What enters the first block, then what each block makes of it: layers + 1 tensors.

        Raises:
            ValueError: another number of channels, or a size that patches do not tile.
        """
        hidden, coordinates = [self.embed(pixels)], self.coordinates(pixels)
        for block in self.blocks:
            hidden.append(block(hidden[-1], coordinates=coordinates))
        return hidden

    def coordinates(self, pixels: Tensor) -> Float[Tensor, "patch 2"] | None:
        """Where the patches stand, for rotary positions; None for the other kinds."""
        if self.config.position != "rotary":
            return None
        return grid_coordinates(self.grid_of(pixels), self.config.grid).to(pixels.device)

    def grid_of(self, pixels: Tensor) -> tuple[int, int]:
        return patch_grid(*pixels.shape[-2:], self.config.patch)

    def tokens(
        self, pixels: Float[Tensor, "batch channel row column"]
    ) -> Float[Tensor, "batch token width"]:
        """The last hidden states, normalised. Errors are those of `hidden_states`."""
        return self.norm(self.hidden_states(pixels)[-1])

    def features(
        self, pixels: Float[Tensor, "batch channel row column"]
    ) -> Float[Tensor, "batch width"]:
        """One vector for each picture. Errors are those of `hidden_states`."""
        tokens = self.tokens(pixels)
        if self.config.pooling == "class":
            return tokens[:, 0]
        return tokens[:, self.config.before :].mean(1)

    def forward(
        self, pixels: Float[Tensor, "batch channel row column"]
    ) -> Float[Tensor, "batch output"]:
        """Scores of the classes, or the features where there is no classifier."""
        features = self.features(pixels)
        return features if self.head is None else self.head(features)

    @torch.no_grad()
    def attention_maps(
        self, pixels: Float[Tensor, "batch channel row column"]
    ) -> Float[Tensor, "layer batch head query key"]:
        """Who looks at whom, in every head of every layer."""
        hidden, coordinates = self.hidden_states(pixels), self.coordinates(pixels)
        return torch.stack(
            [
                block.attention.weights(block.attention_norm(x), coordinates)
                for block, x in zip(self.blocks, hidden[:-1], strict=True)
            ]
        )

    def published(self) -> dict[str, Tensor]:
        """The weights under the names of the published files.

        Raises:
            ValueError: the model is not of the published style.
        """
        return to_published(self.state_dict(), self.published_names())

    def load_published(self, weights: Mapping[str, Tensor]) -> "VisionTransformer":
        """Take the weights of a published file, every one of them.

        Raises:
            ValueError: the model is not of the published style.
            RuntimeError: the file's names or shapes are not those of this model.
        """
        names = self.published_names()
        self.load_state_dict(from_published(weights, self.state_dict(), names), strict=True)
        return self.eval()

    def published_names(self) -> dict[str, str]:
        config = self.config
        if (config.position, config.pooling, config.registers) != ("learned", "class", 0):
            raise ValueError(
                "published models have learned positions, a class token and no registers, got "
                f"{config.position} positions, {config.pooling} and {config.registers}"
            )
        return CLASSIFIER_NAMES if config.classes else VIT_NAMES


def table(rows: int, width: int) -> nn.Parameter:
    """Trained vectors, as small as BERT's at the start, in the published shape."""
    return nn.Parameter(0.02 * torch.randn(1, rows, width))


def main() -> None:
    torch.manual_seed(0)
    small = {"image": 224, "patch": 16, "width": 384, "layers": 12, "heads": 6, "hidden": 1536}
    for name, sizes in {"this file's default": {}, "ViT-S/16": small}.items():
        model = VisionTransformer(ViTConfig(**sizes))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name}: {parameters:,} parameters")
    print("one picture of 32 x 32, and the same model asked for other sizes:")
    for position in ("learned", "sinusoidal", "rotary", "none"):
        model = VisionTransformer(ViTConfig(position=position, registers=4)).eval()
        sizes = [(32, 32), (48, 48), (24, 64)]
        shapes = [list(model.tokens(torch.rand(1, 3, *size)).shape) for size in sizes]
        print(f"  {position:11}", *shapes)


if __name__ == "__main__":
    main()
