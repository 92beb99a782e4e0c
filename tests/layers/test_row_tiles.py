"""Tiles cover every width and never exceed what a program may hold."""

import re
from pathlib import Path

import pytest
import torch

from implementations.layers.row_tiles import as_rows, launch, power_of_two, row_tiles

PACKAGE = Path(__file__).parents[2] / "implementations"


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


def test_a_kernel_starts_on_the_gpu_of_its_first_argument(monkeypatch):
    """Recorded in place of a second GPU: the guard is entered before the kernel and left after."""
    seen = []

    class Guard:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            seen.append(("enter", self.tensor))

        def __exit__(self, *failure):
            seen.append(("leave", self.tensor))

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    kernel = {(2, 3): lambda *arguments, **options: seen.append((arguments, options))}
    x = torch.ones(3)
    launch(kernel, (2, 3), x, 4, BLOCK=5)
    assert seen == [("enter", x), ((x, 4), {"BLOCK": 5}), ("leave", x)]


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/*_triton.py")), ids=lambda path: path.stem)
def test_every_kernel_is_started_under_a_guard(path):
    """Through `launch`, or inside a `with torch.cuda.device_of` of its own."""
    source = path.read_text("utf-8")
    bare = re.findall(r"^ +\w+_kernel\[", source, flags=re.MULTILINE)
    assert not bare or "with torch.cuda.device_of(" in source


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu():
    from implementations.layers.softmax_triton import softmax_triton

    x = torch.randn(3, 5, device="cuda:1")
    torch.testing.assert_close(softmax_triton(x), x.softmax(-1))
