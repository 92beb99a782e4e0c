"""fp8's scalings in Triton: both forms of a matrix, x and xᵀ, in one launch that reads it once.

    given scale   word = fp8(scale · x); the amax met on the way is the next steps' scale
    blocks        amax of each 1 x 128 and 128 x 1 strip, or of the 128 x 128 square, then as above

A program takes a tile, scales it, and writes it as it lies; then takes it once more, from a cache,
and writes it transposed through shared memory. The amax is found among the bits of the absolute
values: as integers they have the floats' order, and NaN stands above all.

Floor   bytes, for n numbers of b bytes: n (b + 2), and 8 n / 128 for the scales of blocks;
        current scaling, which must read twice: n (2 b + 2)
Shapes  x [row, column]    values [row, column] and [column, row]
Run     uv run python implementations/precision/fp8_triton.py
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch import Tensor

from implementations.lab.ahead_of_time import Variant
from implementations.layers.row_tiles import ceil_divide, launch
from implementations.precision.fp8 import (
    E4M3,
    E5M2,
    SIDE,
    SMALLEST_NORMAL,
    Block,
    Both,
    Scaled,
    check,
    largest,
)

GIVEN, STRIPS, SQUARES = 0, 1, 2
TILE = (128, 128)  # rows and columns of a program's tile under a given scale
# In shares of a copy's speed on an H200, bfloat16 [16384, 28672]: under a given scale 0.91, squares
# 0.90, strips 0.69. Squares with 16 warps 0.76; a given scale with 120 registers a thread 0.80.
WARPS = 8
REGISTERS = 80  # of a thread at most: three programs fit, and no bfloat16 spills


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def scale_of(amax, END: tl.constexpr, SMALLEST: tl.constexpr):
    # Not maximum(): it would drop a NaN.
    scale = tl.div_rn(
        tl.full(amax.shape, END, tl.float32), tl.where(amax < SMALLEST, SMALLEST, amax)
    )
    return tl.where(amax == 0, 1.0, scale)


@triton.jit
def fp8(x, END: tl.constexpr, kind: tl.constexpr):
    return tl.clamp(x, -END, END, propagate_nan=tl.PropagateNan.ALL).to(kind)


@triton.jit
def one_over(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def quantize_kernel(
    x,
    scale,
    row_values,
    column_values,
    row_inverse,
    column_inverse,
    amax_bits,
    rows,
    columns,
    x_stride,
    row_blocks,
    column_blocks,
    MODE: tl.constexpr,
    END: tl.constexpr,
    SMALLEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    kind: tl.constexpr = row_values.dtype.element_ty
    # Neighbours in a row of tiles run together and share the lines of x.
    tile_row, tile_column = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    row = tile_row * ROWS + tl.arange(0, ROWS)
    column = tile_column * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    inside_column = (column[:, None] < columns) & (row[None, :] < rows)
    at = x + row[:, None] * x_stride + column[None, :]
    at_row = row_values + row[:, None] * columns + column[None, :]
    at_column = column_values + column[:, None] * rows + row[None, :]
    value = tl.load(at, inside, 0.0)
    bits = bits_of(value.to(tl.float32))
    if MODE == 0:
        row_factor = tl.load(scale)
        column_factor = row_factor
        tl.store(at_row, fp8(value.to(tl.float32) * row_factor, END, kind), inside)
        tl.atomic_max(amax_bits, tl.max(tl.max(bits, axis=1), axis=0), sem="relaxed")
        if tile_row + tile_column == 0:
            tl.store(row_inverse, tl.div_rn(1.0, row_factor))
        if x.dtype.element_ty == tl.float32:
            # Words that go to both stores are mixed up by ptxas 12.9 (triton issue 11111), so they
            # are made twice; of narrower numbers it is x that is transposed.
            value = tl.load(at, inside, 0.0)
    else:
        if MODE == 1:
            # Through memory: a thread finds amaxes of 4 rows and 16 columns together with others,
            # makes a scale of one, and needs those of 4 rows of either form.
            # The scales lie with the rows dense, as cuBLAS reads them.
            at_strip = row_inverse + tile_column * rows + row
            at_column_strip = column_inverse + tile_row * columns + column
            tl.store(at_strip, float_of(tl.max(bits, axis=1)), row < rows)
            tl.store(at_column_strip, float_of(tl.max(bits, axis=0)), column < columns)
            tl.debug_barrier()
            strip = scale_of(tl.load(at_strip, row < rows, 0.0), END, SMALLEST)
            column_strip = tl.load(at_column_strip, column < columns, 0.0)
            column_strip = scale_of(column_strip, END, SMALLEST)
            tl.store(at_strip, strip, row < rows)
            tl.store(at_column_strip, column_strip, column < columns)
            tl.debug_barrier()
            row_factor = tl.load(at_strip, row < rows, 1.0)[:, None]
            column_factor = tl.load(at_column_strip, column < columns, 1.0)[:, None]
        else:
            row_factor = scale_of(float_of(tl.max(tl.max(bits, axis=1), axis=0)), END, SMALLEST)
            column_factor = row_factor
            inverse = tl.div_rn(1.0, row_factor)
            tl.store(row_inverse + tile_row * column_blocks + tile_column, inverse)
            tl.store(column_inverse + tile_column * row_blocks + tile_row, inverse)
            tl.debug_barrier()
        # Read again, from the nearest cache: 64 numbers fewer to keep while amaxes are looked for.
        value = tl.load(at, inside, 0.0)
        tl.store(at_row, fp8(value.to(tl.float32) * row_factor, END, kind), inside)
        if x.dtype.element_ty == tl.float32:
            value = tl.load(at, inside, 0.0)
    value = tl.trans(value).to(tl.float32)
    tl.store(at_column, fp8(value * column_factor, END, kind), inside_column)
    if MODE == 1:
        tl.debug_barrier()  # every thread has read the scales
        tl.store(at_strip, one_over(strip), row < rows)
        tl.store(at_column_strip, one_over(column_strip), column < columns)


@torch.library.custom_op("ml_studies::quantize_fp8", mutates_args=())
def quantize_op(
    x: Tensor, scale: Tensor | None, dtype: torch.dtype, mode: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The words and inverse scales of x, those of xᵀ, and under a given scale the amax."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, columns = x.shape
    outputs = empty_outputs(x, dtype, mode)
    amax = torch.zeros((), dtype=torch.int32, device=x.device)
    tile_rows, tile_columns = TILE if mode == GIVEN else (SIDE, SIDE)
    grid = (ceil_divide(columns, tile_columns), ceil_divide(rows, tile_rows))
    if 0 in grid:  # nothing to scale, and nothing that would write the inverse
        return (*outputs[:2], *(inverse.fill_(1.0) for inverse in outputs[2:]), amax.float())
    launch(
        quantize_kernel,
        grid,
        x,
        scale,
        *outputs,
        amax,
        rows,
        columns,
        x.stride(0),
        ceil_divide(rows, SIDE),
        ceil_divide(columns, SIDE),
        MODE=mode,
        END=largest(dtype),
        SMALLEST=largest(dtype) * SMALLEST_NORMAL,
        ROWS=tile_rows,
        COLUMNS=tile_columns,
        num_warps=WARPS,
        maxnreg=REGISTERS,
    )
    return *outputs, amax.view(torch.float32)


def empty_outputs(
    x: Tensor, dtype: torch.dtype, mode: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for the words of both forms and for their inverse scales."""
    rows, columns = x.shape
    row_blocks, column_blocks = ceil_divide(rows, SIDE), ceil_divide(columns, SIDE)
    values = [
        torch.empty(shape, dtype=dtype, device=x.device) for shape in (x.shape, x.shape[::-1])
    ]
    if mode == GIVEN:
        shapes = [(), (0,)]
    elif mode == STRIPS:
        shapes = [(column_blocks, rows), (row_blocks, columns)]
    else:
        shapes = [(row_blocks, column_blocks), (column_blocks, row_blocks)]
    return *values, *(torch.empty(shape, dtype=torch.float32, device=x.device) for shape in shapes)


@quantize_op.register_fake
def _(x, scale, dtype, mode):
    amax = torch.empty((), dtype=torch.float32, device=x.device)
    return *empty_outputs(x, dtype, mode), amax


def quantize_both_triton(
    x: Float[Tensor, "row column"], dtype: torch.dtype, scale: Float32[Tensor, ""]
) -> tuple[Scaled, Scaled, Float32[Tensor, ""]]:
    """`quantize_both` in one launch.

    Raises:
        ValueError: what `check` or `check_format` refuses.
    """
    check(x)
    check_format(dtype)
    row_values, column_values, inverse, _, amax = quantize_op(x, scale, dtype, GIVEN)
    return Scaled(row_values, inverse), Scaled(column_values, inverse), amax


def quantize_blocks_triton(
    x: Float[Tensor, "row column"], dtype: torch.dtype, block: Block = (1, SIDE)
) -> Both:
    """`quantize_blocks` in one launch, for strips of 1 x 128 and squares of 128 x 128.

    Raises:
        ValueError: blocks of another shape, or what `check` or `check_format` refuses.
    """
    check(x)
    check_format(dtype)
    if block not in ((1, SIDE), (SIDE, SIDE)):
        raise ValueError(f"the kernel's blocks are 1 x {SIDE} and {SIDE} x {SIDE}, got {block}")
    mode = STRIPS if block[0] == 1 else SQUARES
    row_values, column_values, row_inverse, column_inverse, _ = quantize_op(x, None, dtype, mode)
    if mode == STRIPS:
        row_inverse, column_inverse = row_inverse.mT, column_inverse.mT
    return Scaled(row_values, row_inverse, block), Scaled(column_values, column_inverse, block)


def check_format(dtype: torch.dtype) -> None:
    """Raise ValueError for what is no fp8 of the tensor cores."""
    if dtype not in (E4M3, E5M2):
        raise ValueError(f"the kernel writes float8_e4m3fn and float8_e5m2, got {dtype}")


def variants() -> Iterator[Variant]:
    """bfloat16 to e4m3 under a given scale, and in strips; an A100 has no fp8."""
    values = dict.fromkeys(("row_values", "column_values"), "*fp8e4nv")
    pointers = {"x": "*bf16", "scale": "*fp32"} | values
    pointers |= {"row_inverse": "*fp32", "column_inverse": "*fp32", "amax_bits": "*i32"}
    names = ("rows", "columns", "x_stride", "row_blocks", "column_blocks")
    types = pointers | dict.fromkeys(names, "i32")
    end = largest(E4M3)
    for name, mode, tile in (("given scale", GIVEN, TILE), ("strips", STRIPS, (SIDE, SIDE))):
        constants = {"MODE": mode, "END": end, "SMALLEST": end * SMALLEST_NORMAL}
        constants |= {"ROWS": tile[0], "COLUMNS": tile[1]}
        yield Variant(name, quantize_kernel, types, constants, WARPS, capabilities=(90,))


def main() -> None:
    from implementations.precision.fp8 import dequantize, quantize_blocks

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Powers of two, which fp8 holds exactly: the interpreter's cast to fp8 rounds wrongly.
    x = torch.exp2(torch.randint(-4, 5, (200, 300), device=device).float())
    kernel, equation = quantize_blocks_triton(x, E4M3), quantize_blocks(x, E4M3)
    for name, ours, naive in zip(("x ", "xᵀ"), kernel, equation, strict=True):
        apart = (dequantize(ours) - dequantize(naive)).abs().max()
        print(f"{name} in strips on {device}: kernel and equation at most {apart:.1e} apart")


if __name__ == "__main__":
    main()
