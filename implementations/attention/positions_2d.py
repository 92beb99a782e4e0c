"""Positions in a picture: a row and a column for each patch, told in the three ways of a text.

    sinusoidal   x + [S(row), S(column)]       S: the sines and cosines of one axis, half the width
    learned      x + P[row, column]            P is trained; another grid reads it by interpolation
    rotary       half of a head's pairs turn by row · f_i, the other half by column · f_i

    frequencies  f_i = base ** (-4i / dim),  i = 0 ... dim/4 - 1, each used for both axes

Coordinates are those of the grid that a model was trained on. A finer grid lies between them: the
patch i of n stands at (i + 1/2) · trained / n - 1/2, so that the picture's edges stay where they
were. Turning by two coordinates keeps what rotary is for: a score depends on how far apart two
patches are, down and across, and not on where they are.

Paper   sinusoidal: He et al. 2021, arXiv:2111.06377    learned: Dosovitskiy et al. 2020,
        arXiv:2010.11929, section 3.2    rotary: Heo et al. 2024, arXiv:2403.13298 ("axial")
Shapes  coordinates [patch, 2]: row, column    x [..., token, dim], dim being one head's in rotary
Run     uv run python implementations/attention/positions_2d.py
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from implementations.attention.multi_head import MultiHeadAttention
from implementations.attention.positions import HALF_SPLIT, INTERLEAVED, angles, rotate_half_split
from implementations.attention_basic import attention_weights

Grid = tuple[int, int]
ROTARY_BASE = 100.0  # as in Heo et al.: a grid has tens of places where a text has thousands


def grid_coordinates(grid: Grid, trained: Grid | None = None) -> Float[Tensor, "patch 2"]:
    """Row and column of every patch in reading order, in units of the grid trained on.

    Args:
        grid: rows and columns of patches.
        trained: the grid that coordinates 0, 1, 2, ... belong to, `grid` unless given.
    """
    axes = [
        (torch.arange(count, dtype=torch.float64) + 0.5) * known / count - 0.5
        for count, known in zip(grid, trained or grid, strict=True)
    ]
    return torch.cartesian_prod(*axes)


def sinusoidal_positions_2d(
    coordinates: Float[Tensor, "patch 2"],
    width: int,
    base: float = 10000.0,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "patch width"]:
    """The first half of the channels tells the row, the second half the column.

    Raises:
        ValueError: `width` is no multiple of 4: a sine and a cosine for each axis.
    """
    check_quarters(width)
    angle = torch.cat([angles(axis, width // 2, base) for axis in coordinates.unbind(-1)], dim=-1)
    waves = torch.stack((angle.sin(), angle.cos()))
    return rearrange(waves, f"side patch pair -> patch {INTERLEAVED}").to(dtype)


def interpolated_positions(
    table: Float[Tensor, "patch width"], trained: Grid, grid: Grid
) -> Float[Tensor, "new_patch width"]:
    """A trained table read at the places of another grid, by cubic interpolation along both axes.

    Raises:
        ValueError: the table's rows are not the patches of `trained`.
    """
    if len(table) != trained[0] * trained[1]:
        raise ValueError(f"{len(table)} positions are no grid of {trained[0]} x {trained[1]}")
    if grid == trained:
        return table
    picture = rearrange(table, "(row column) width -> 1 width row column", row=trained[0])
    read = interpolate(picture, size=grid, mode="bicubic", align_corners=False)
    return rearrange(read, "1 width row column -> (row column) width")


def rotate_2d(
    x: Float[Tensor, "*batch patch dim"],
    coordinates: Float[Tensor, "patch 2"],
    base: float = ROTARY_BASE,
) -> Float[Tensor, "*batch patch dim"]:
    """Half split: pair i is channels i and i + dim/2; the first half of the pairs turns by row.

    Raises:
        ValueError: the last axis is no multiple of 4, or there is not one place for each patch.
    """
    check_quarters(x.shape[-1])
    split = "(side way pair)"  # the two ways are down and across
    ways = rearrange(x, f"... patch {split} -> way ... patch {HALF_SPLIT}", side=2, way=2)
    turned = [
        rotate_half_split(half, places, base)
        for half, places in zip(ways, coordinates.unbind(-1), strict=True)
    ]
    both = torch.stack(turned)
    return rearrange(both, f"way ... patch {HALF_SPLIT} -> ... patch {split}", side=2)


def check_quarters(dim: int) -> None:
    """Raise ValueError unless `dim` channels make pairs for two axes."""
    if dim % 4:
        raise ValueError(f"two axes take channels in fours, so they are a multiple of 4, got {dim}")


class GridAttention(MultiHeadAttention):
    """Multi-head self-attention of patches, with rotary positions where coordinates are given.

    Tokens before the patches (a class token, registers) are not turned.
    """

    def forward(
        self,
        x: Float[Tensor, "batch token width"],
        coordinates: Float[Tensor, "patch 2"] | None = None,
    ) -> Float[Tensor, "batch token width"]:
        query, key, value = self.project(x)
        heads = self.attention(turned(query, coordinates), turned(key, coordinates), value)
        return self.output(rearrange(heads, "batch head token dim -> batch token (head dim)"))

    def weights(
        self,
        x: Float[Tensor, "batch token width"],
        coordinates: Float[Tensor, "patch 2"] | None = None,
    ) -> Float[Tensor, "batch head query key"]:
        """Who looks at whom in this layer."""
        query, key, _ = self.project(x)
        return attention_weights(turned(query, coordinates), turned(key, coordinates))


def turned(
    x: Float[Tensor, "batch head token dim"], coordinates: Float[Tensor, "patch 2"] | None
) -> Float[Tensor, "batch head token dim"]:
    """The last tokens turned by where they stand, those before them as they are."""
    if coordinates is None:
        return x
    before = x.shape[-2] - len(coordinates)
    patches = rotate_2d(x[..., before:, :], coordinates)
    return torch.cat((x[..., :before, :], patches), dim=-2)


def main() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 64, dtype=torch.float64)
    offset = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    print("one query's score for the patch 1 below and 2 to the left, by its own place")
    for row, column in ((3, 5), (7, 2), (12, 12)):
        place = torch.tensor([[row, column]], dtype=torch.float64)
        score = (rotate_2d(query, place) * rotate_2d(key, place + offset)).sum()
        print(f"    row {row:2}, column {column:2}   {score:.6f}")
    table = sinusoidal_positions_2d(grid_coordinates((7, 7)), 64, dtype=torch.float64)
    finer = sinusoidal_positions_2d(grid_coordinates((14, 14), (7, 7)), 64, dtype=torch.float64)
    apart = (interpolated_positions(table, (7, 7), (14, 14)) - finer).norm() / finer.norm()
    print(f"sinusoids of 7 x 7 read at 14 x 14 by interpolation: {apart:.1%} from the true ones")


if __name__ == "__main__":
    main()
