"""Tiles cover every width and never exceed what a program may hold."""

import pytest
import torch

from implementations.layers.row_tiles import as_rows, power_of_two, row_tiles


@pytest.mark.parametrize("width", [1, 2, 63, 64, 257, 4096, 4099, 16384, 16385, 65537, 10**6])
def test_tiles_cover_the_width_and_no_tile_is_idle(width):
    tiles = row_tiles(width)
    assert tiles.block * tiles.pieces >= width > tiles.block * (tiles.pieces - 1)
    assert tiles.block & (tiles.block - 1) == 0 and tiles.rows & (tiles.rows - 1) == 0
    assert 4096 <= tiles.rows * tiles.block <= 16384
    assert 32 * tiles.warps * 32 <= max(4096, tiles.rows * tiles.block)


def test_powers_of_two():
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]


def test_rows_are_a_view_where_they_can_be():
    x = torch.arange(24.0).reshape(2, 3, 4)
    for view, copied in [(x, False), (x[:, :, 1:3], False), (x[..., :1], False), (x.mT, True)]:
        rows = as_rows(view)
        assert torch.equal(rows, view.reshape(-1, view.shape[-1]))
        assert (rows.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()) == copied
        assert rows.stride(1) == 1 or rows.shape[1] == 1
