"""Patch embedding: a picture becomes a sentence whose words are squares of pixels.

    token_p = W · flatten(patch p) + b       a strided convolution, written as what it is

Patches are read as a page is: row by row, from left to right. Inside a patch the order is channel,
row, column. A convolution whose stride is as long as its kernel looks at each pixel once, so its
kernel is W with the axes unflattened, and published kernels are W.

Paper   Dosovitskiy et al. 2020, arXiv:2010.11929, equation 1
Shapes  pixels [batch, channel, row, column]    tokens [batch, patch, width]
Run     uv run python implementations/layers/patch_embedding.py
"""

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn


def patch_grid(height: int, width: int, size: int) -> tuple[int, int]:
    """How many patches stand above each other and beside each other.

    Raises:
        ValueError: a patch has no pixel, or patches do not tile the picture.
    """
    if size < 1:
        raise ValueError(f"a patch is at least one pixel wide, got {size}")
    if height % size or width % size or not height * width:
        raise ValueError(f"patches of {size} do not tile a picture of {height} x {width} pixels")
    return height // size, width // size


def split_patches(
    pixels: Shaped[Tensor, "*batch channel row column"], size: int
) -> Shaped[Tensor, "*batch patch pixel"]:
    """The squares of a picture in reading order, each flattened as channel, row, column.

    Raises:
        ValueError: as `patch_grid`.
    """
    patch_grid(*pixels.shape[-2:], size)
    pattern = "... channel (row y) (column x) -> ... (row column) (channel y x)"
    return rearrange(pixels, pattern, y=size, x=size)


def join_patches(
    patches: Shaped[Tensor, "*batch patch pixel"], size: int, rows: int
) -> Shaped[Tensor, "*batch channel row column"]:
    """The inverse of `split_patches` for a picture with `rows` patches above each other."""
    pattern = "... (row column) (channel y x) -> ... channel (row y) (column x)"
    return rearrange(patches, pattern, row=rows, y=size, x=size)


def embed_patches(
    pixels: Float[Tensor, "batch channel row column"],
    weight: Float[Tensor, "width channel size size"],
    bias: Float[Tensor, " width"],
) -> Float[Tensor, "batch patch width"]:
    """W · flatten(patch) + b for every patch: equation 1 of the paper, before its positions.

    Raises:
        ValueError: as `patch_grid`.
    """
    flat = rearrange(weight, "width channel y x -> (channel y x) width")
    return split_patches(pixels, weight.shape[-1]) @ flat + bias


class PatchEmbedding(nn.Module):
    """One linear map for every patch; its weight has the shape of the published kernels.

    Args:
        channels: 1 for grey pictures, 3 for colour.
        width: size of a token's vector.
        size: rows and columns of a patch, in pixels.
    """

    def __init__(self, channels: int, width: int, size: int):
        super().__init__()
        scale = (channels * size**2) ** -0.5  # tokens start about as large as pixels are
        self.weight = nn.Parameter(scale * torch.randn(width, channels, size, size))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(
        self, pixels: Float[Tensor, "batch channel row column"]
    ) -> Float[Tensor, "batch patch width"]:
        """The tokens of each picture.

        Raises:
            ValueError: another number of channels, or as `patch_grid`.
        """
        if pixels.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"the weights are for {self.weight.shape[1]} channels, got {pixels.shape[1]}"
            )
        return embed_patches(pixels, self.weight, self.bias)


def main() -> None:
    torch.manual_seed(0)
    pixels, layer = torch.randn(8, 3, 224, 224), PatchEmbedding(3, 384, 16)
    tokens = layer(pixels)
    convolved = nn.functional.conv2d(pixels, layer.weight, layer.bias, stride=16)
    apart = tokens - rearrange(convolved, "batch width row column -> batch (row column) width")
    print(f"{list(pixels.shape)} -> {list(tokens.shape)}: 14 x 14 words of 16 x 16 pixels")
    print(f"a convolution of stride 16 is at most {apart.abs().max():.1e} away")


if __name__ == "__main__":
    main()
