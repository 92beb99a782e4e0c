"""Row tiles: how a kernel that reduces along rows cuts a matrix into pieces.

    narrow rows   several rows a program        65,536 rows of 1    -> tiles of 4096 x 1
    usual rows    one row a program, whole      16,384 rows of 4096 -> tiles of 1 x 4096
    wide rows     one row a program, in pieces  8 rows of 65,537    -> 5 tiles of 1 x 16,384

A row that stays in registers is read once. 16,384 numbers are 32 registers in each of 512 threads;
a wider row is walked over once a pass, and comes from the L2 cache after the first.

Run     uv run python implementations/layers/row_tiles.py
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

WIDEST = 16384  # numbers of one tile
REDUCTIONS = 16384  # bytes of shared memory in which a program's threads meet
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class RowTiles(NamedTuple):
    """A tile is `rows` rows by `block` columns; `pieces` tiles cover the width."""

    rows: int
    block: int
    pieces: int
    warps: int


def row_tiles(
    width: int,
    *,
    smallest: int = 4096,
    widest: int = WIDEST,
    most_warps: int = 16,
    a_thread: int = 32,
) -> RowTiles:
    """The tile for rows of a width.

    Args:
        width: numbers in a row.
        smallest: numbers that a tile should hold at least, so that its launch is worth it.
        widest: numbers of a row that a program holds at once; a power of two.
        most_warps: of a program.
        a_thread: numbers that a thread should hold.
    """
    block = min(power_of_two(width), widest)
    rows = max(1, smallest // block)
    # 32 numbers a thread, in 16-byte loads: four in flight for each thread in bfloat16. A kernel
    # that has measured better tiles passes them.
    warps = min(max(rows * block, smallest) // (32 * a_thread), most_warps)
    return RowTiles(rows, block, ceil_divide(width, block), warps)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below the number: Triton's ranges have such lengths."""
    return 1 << (number - 1).bit_length()


def ceil_divide(number: int, divisor: int) -> int:
    return -(-number // divisor)


def as_rows(x: Tensor) -> Tensor:
    """The same numbers as a matrix of rows: a view wherever one step leads from row to row.

    Only if none does, or if a row's numbers are not neighbours, they are copied.
    """
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def resident_programs(x: Tensor, tiles: int, each: int = 2) -> int:
    """How many programs share the tiles when each takes many: `each` a multiprocessor."""
    if not x.is_cuda:
        return min(tiles, 3)  # the interpreter runs them one after the other
    return min(tiles, each * torch.cuda.get_device_properties(x.device).multi_processor_count)


def pipeline_stages(x: Tensor, tiles: RowTiles, inputs: int) -> int:
    """How many tiles of each input a loop holds: three, two of them on their way, or one.

    One if a program's shared memory cannot hold three; two were slower than one.
    """
    if not x.is_cuda:
        return 1  # the interpreter has no use for it
    memory = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin
    tile = tiles.rows * tiles.block * x.element_size()
    return 3 if tiles.pieces == 1 and 3 * inputs * tile + REDUCTIONS <= memory else 1


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *others: Any, **options: Any) -> None:
    """Start a kernel on the GPU of its first argument: Triton takes the current one."""
    with torch.cuda.device_of(first):
        kernel[grid](first, *others, **options)


def wide_dtype(x: Tensor) -> torch.dtype:
    """What a kernel computes in: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def check_rows(x: Tensor, **channels: Tensor) -> None:
    """What every kernel along rows asks of its input and of one number a channel.

    Raises:
        ValueError: `x` has no axis, no channel or another dtype than a float; a parameter is not
            one float a channel on the device of `x`; one of them is sparse.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"the kernel computes with floats, got {x.dtype}")
    check_dense("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"a row needs at least one number, got the shape {tuple(x.shape)}")
    for name, values in channels.items():
        if tuple(values.shape) != (x.shape[-1],):
            raise ValueError(
                f"{name} needs {x.shape[-1]} numbers, one a channel, got {tuple(values.shape)}"
            )
        if values.dtype not in DTYPES:
            raise ValueError(f"{name} holds floats, got {values.dtype}")
        check_dense(name, values)
        check_device(x, name, values)


def check_same(x: Tensor, name: str, other: Tensor) -> None:
    """Raise ValueError unless the other, dense too, has the shape, dtype and device of `x`."""
    if other.shape != x.shape:
        raise ValueError(f"{name} has the shape {tuple(other.shape)}, x {tuple(x.shape)}")
    if other.dtype != x.dtype:
        raise ValueError(f"{name} is {other.dtype}, x {x.dtype}")
    check_dense(name, other)
    check_device(x, name, other)


def check_dense(name: str, values: Tensor) -> None:
    """Raise ValueError for a tensor without an address for each of its numbers."""
    if values.layout != torch.strided:
        raise ValueError(f"the kernel reads addresses, and {name} is {values.layout}")


def check_device(x: Tensor, name: str, other: Tensor) -> None:
    """Raise ValueError unless both stand on one device."""
    if other.device != x.device:
        raise ValueError(f"{name} is on {other.device}, x on {x.device}")


def main() -> None:
    print("   width  rows  block  pieces  warps")
    for width in (1, 63, 257, 1024, 4096, 4099, 16384, 65537, 131072):
        tiles = row_tiles(width)
        print(f"{width:8}{tiles.rows:6}{tiles.block:7}{tiles.pieces:8}{tiles.warps:7}")


if __name__ == "__main__":
    main()
