"""Softmax in Triton: one launch, each row read once.

    forward    output = exp(x - maximum) / Σ exp(x - maximum)
    backward   x' = output · (gradient - Σ gradient · output)

The backward pass makes the output again from x, the maximum and the sum of each row. Reading the
output would cost as much and, in half precision, read it rounded: near one-hot rows the difference
cancels, and the kernel's gradient was up to 7 times as wrong as the equation's.

A row wider than a tile is walked over twice. The first walk is the online softmax: it keeps the
largest number so far and the sum of powers relative to it, and scales that sum whenever the largest
changes.

Paper   Milakov & Gimelshein 2018, arXiv:1805.02867 (online softmax)
Floor   bytes, for n numbers of b bytes: forward 2 n b, backward 3 n b
Shapes  x [..., channel]
Run     uv run python implementations/layers/softmax_triton.py
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from implementations.lab.ahead_of_time import Variant
from implementations.layers.row_tiles import (
    as_rows,
    ceil_divide,
    check_rows,
    launch,
    row_tiles,
    wide_dtype,
)


@triton.jit
def reciprocal(total):
    """Rounded correctly, so that shares sum to one: a GPU's own float32 quotient is near it."""
    return 1 / total if total.dtype == tl.float64 else tl.div_rn(1.0, total)


@triton.jit
def forward_kernel(
    x,
    output,
    maxima,
    totals,
    rows,
    width,
    x_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
):
    wide = maxima.dtype.element_ty
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    maximum = tl.full([ROWS, 1], float("-inf"), wide)
    total = tl.zeros([ROWS, 1], wide)
    power = tl.zeros([ROWS, BLOCK], wide)
    for piece in range(PIECES):
        column = piece * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (column < width)
        value = tl.load(x + row * x_stride + column, inside, float("-inf")).to(wide)
        largest = tl.maximum(maximum, tl.max(value, axis=1, keep_dims=True))
        base = tl.where(largest == float("-inf"), 0.0, largest)  # -inf less -inf would be NaN
        power = tl.exp(value - base)
        total = total * tl.exp(maximum - base) + tl.sum(power, axis=1, keep_dims=True)
        maximum = largest
    total = tl.where(row < rows, total, 1.0)  # of no row there would be 0 / 0
    tl.store(maxima + row, maximum, row < rows)
    tl.store(totals + row, total, row < rows)
    inverse = reciprocal(total)
    for piece in range(PIECES):
        column = piece * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (column < width)
        if PIECES > 1:
            value = tl.load(x + row * x_stride + column, inside, float("-inf")).to(wide)
            power = tl.exp(value - maximum)
        tl.store(output + row * width + column, power * inverse, inside)


@triton.jit
def backward_kernel(
    gradient,
    x,
    maxima,
    totals,
    x_gradient,
    rows,
    width,
    gradient_stride,
    x_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
):
    wide = maxima.dtype.element_ty
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    maximum = tl.load(maxima + row, row < rows, 0.0)
    inverse = reciprocal(tl.load(totals + row, row < rows, 1.0))
    product = tl.zeros([ROWS, 1], wide)
    share = tl.zeros([ROWS, BLOCK], wide)
    upstream = tl.zeros([ROWS, BLOCK], wide)
    for piece in range(PIECES):
        column = piece * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (column < width)
        value = tl.load(x + row * x_stride + column, inside, float("-inf")).to(wide)
        share = tl.exp(value - maximum) * inverse
        upstream = tl.load(gradient + row * gradient_stride + column, inside, 0.0).to(wide)
        product += tl.sum(share * upstream, axis=1, keep_dims=True)
    for piece in range(PIECES):
        column = piece * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (column < width)
        if PIECES > 1:
            value = tl.load(x + row * x_stride + column, inside, float("-inf")).to(wide)
            share = tl.exp(value - maximum) * inverse
            upstream = tl.load(gradient + row * gradient_stride + column, inside, 0.0).to(wide)
        tl.store(x_gradient + row * width + column, share * (upstream - product), inside)


@torch.library.custom_op("ml_studies::softmax", mutates_args=())
def softmax_op(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and each row's maximum and sum of powers."""
    output, values = torch.empty(x.shape, dtype=x.dtype, device=x.device), as_rows(x)
    wide, (rows, width) = wide_dtype(x), values.shape
    maxima, totals = (torch.empty(rows, dtype=wide, device=x.device) for _ in range(2))
    tiles = row_tiles(width)
    launch(
        forward_kernel,
        (ceil_divide(rows, tiles.rows),),
        values,
        output,
        maxima,
        totals,
        rows,
        width,
        values.stride(0),
        ROWS=tiles.rows,
        BLOCK=tiles.block,
        PIECES=tiles.pieces,
        num_warps=tiles.warps,
    )
    return output, maxima, totals


@torch.library.custom_op("ml_studies::softmax_backward", mutates_args=())
def softmax_backward_op(gradient: Tensor, x: Tensor, maxima: Tensor, totals: Tensor) -> Tensor:
    x_gradient = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    upstream, values = as_rows(gradient), as_rows(x)
    rows, width = values.shape
    tiles = row_tiles(width)
    launch(
        backward_kernel,
        (ceil_divide(rows, tiles.rows),),
        upstream,
        values,
        maxima,
        totals,
        x_gradient,
        rows,
        width,
        upstream.stride(0),
        values.stride(0),
        ROWS=tiles.rows,
        BLOCK=tiles.block,
        PIECES=tiles.pieces,
        num_warps=tiles.warps,
    )
    return x_gradient


@softmax_op.register_fake
def _(x):
    rows, wide = x.numel() // x.shape[-1], wide_dtype(x)
    maxima, totals = (torch.empty(rows, dtype=wide, device=x.device) for _ in range(2))
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), maxima, totals


@softmax_backward_op.register_fake
def _(gradient, x, maxima, totals):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


softmax_op.register_autograd(
    lambda ctx, gradient, *_: softmax_backward_op(gradient, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output[1:]),
)


def softmax_triton(x: Float[Tensor, "*batch channel"]) -> Float[Tensor, "*batch channel"]:
    """`softmax_naive` in one launch.

    Raises:
        ValueError: what `check_rows` refuses.
    """
    check_rows(x)
    return softmax_op(x)[0]


def variants() -> Iterator[Variant]:
    """bfloat16 rows of 4096, as launched."""
    tiles = row_tiles(4096)
    shape = {"ROWS": tiles.rows, "BLOCK": tiles.block, "PIECES": tiles.pieces}
    statistics = {"maxima": "*fp32", "totals": "*fp32"}
    types = {"x": "*bf16", "output": "*bf16"} | statistics
    types |= dict.fromkeys(("rows", "width", "x_stride"), "i32")
    yield Variant("forward", forward_kernel, types, shape, tiles.warps)
    types = dict.fromkeys(("gradient", "x", "x_gradient"), "*bf16") | statistics
    types |= dict.fromkeys(("rows", "width", "gradient_stride", "x_stride"), "i32")
    yield Variant("backward", backward_kernel, types, shape, tiles.warps, capabilities=(90,))


def main() -> None:
    from implementations.lab.compare import allowed, error
    from implementations.layers.softmax import softmax_naive

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = (5 * torch.randn(8, 20_000, device=device)).half()
    exact, naive, fast = softmax_naive(x.double()), softmax_naive(x), softmax_triton(x)
    print(f"softmax of float16 rows of 20,000, {device}: mean error {error(fast, exact).mean:.1e}")
    print(f"  the equation in float16 {error(naive, exact).mean:.1e}", end=", ")
    print(f"allowed {allowed(naive, exact).mean:.1e}")


if __name__ == "__main__":
    main()
