"""Softmax in Triton: one launch, each row read once.

    forward    output = exp(x - maximum) / Σ exp(x - maximum)
    backward   x' = output · (gradient - Σ gradient · output)

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
from implementations.layers.row_tiles import as_rows, ceil_divide, check_rows, row_tiles


@triton.jit
def forward_kernel(
    x,
    output,
    rows,
    width,
    x_stride,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    maximum = tl.full([ROWS, 1], float("-inf"), WIDE)
    total = tl.zeros([ROWS, 1], WIDE)
    power = tl.zeros([ROWS, BLOCK], WIDE)
    for piece in range(PIECES):
        column = piece * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (column < width)
        value = tl.load(x + row * x_stride + column, inside, float("-inf")).to(WIDE)
        largest = tl.maximum(maximum, tl.max(value, axis=1, keep_dims=True))
        base = tl.where(largest == float("-inf"), 0.0, largest)  # -inf less -inf would be NaN
        power = tl.exp(value - base)
        total = total * tl.exp(maximum - base) + tl.sum(power, axis=1, keep_dims=True)
        maximum = largest
    total = tl.where(row < rows, total, 1.0)  # of no row there would be 0 / 0
    for piece in range(PIECES):
        column = piece * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (column < width)
        if PIECES > 1:
            value = tl.load(x + row * x_stride + column, inside, float("-inf")).to(WIDE)
            power = tl.exp(value - maximum)
        tl.store(output + row * width + column, power / total, inside)


@triton.jit
def backward_kernel(
    gradient,
    output,
    x_gradient,
    rows,
    width,
    gradient_stride,
    output_stride,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    product = tl.zeros([ROWS, 1], WIDE)
    share = tl.zeros([ROWS, BLOCK], WIDE)
    upstream = tl.zeros([ROWS, BLOCK], WIDE)
    for piece in range(PIECES):
        column = piece * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (column < width)
        share = tl.load(output + row * output_stride + column, inside, 0.0).to(WIDE)
        upstream = tl.load(gradient + row * gradient_stride + column, inside, 0.0).to(WIDE)
        product += tl.sum(share * upstream, axis=1, keep_dims=True)
    for piece in range(PIECES):
        column = piece * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (column < width)
        if PIECES > 1:
            share = tl.load(output + row * output_stride + column, inside, 0.0).to(WIDE)
            upstream = tl.load(gradient + row * gradient_stride + column, inside, 0.0).to(WIDE)
        tl.store(x_gradient + row * width + column, share * (upstream - product), inside)


def launch(kernel, matrices: list[Tensor], result: Tensor) -> None:
    """Run one of the kernels over rows; both read matrices and write a dense result."""
    rows, width = matrices[0].shape
    tiles = row_tiles(width)
    kernel[(ceil_divide(rows, tiles.rows),)](
        *matrices,
        result,
        rows,
        width,
        *(matrix.stride(0) for matrix in matrices),
        WIDE=tl.float64 if result.dtype == torch.float64 else tl.float32,
        ROWS=tiles.rows,
        BLOCK=tiles.block,
        PIECES=tiles.pieces,
        num_warps=tiles.warps,
    )


@torch.library.custom_op("ml_studies::softmax", mutates_args=())
def softmax_op(x: Tensor) -> Tensor:
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(forward_kernel, [as_rows(x)], output)
    return output


@torch.library.custom_op("ml_studies::softmax_backward", mutates_args=())
def softmax_backward_op(gradient: Tensor, output: Tensor) -> Tensor:
    x_gradient = torch.empty(output.shape, dtype=output.dtype, device=output.device)
    launch(backward_kernel, [as_rows(gradient), as_rows(output)], x_gradient)
    return x_gradient


@softmax_op.register_fake
def _(x):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@softmax_backward_op.register_fake
def _(gradient, output):
    return torch.empty(output.shape, dtype=output.dtype, device=output.device)


softmax_op.register_autograd(
    lambda ctx, gradient: softmax_backward_op(gradient, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
)


def softmax_triton(x: Float[Tensor, "*batch channel"]) -> Float[Tensor, "*batch channel"]:
    """`softmax_naive` in one launch.

    Raises:
        ValueError: what `check_rows` refuses.
    """
    check_rows(x)
    return softmax_op(x)


def variants() -> Iterator[Variant]:
    """bfloat16 rows of 4096, as launched."""
    tiles = row_tiles(4096)
    shape = {"WIDE": tl.float32, "ROWS": tiles.rows, "BLOCK": tiles.block, "PIECES": tiles.pieces}
    integers = dict.fromkeys(("rows", "width", "x_stride"), "i32")
    types = {"x": "*bf16", "output": "*bf16"} | integers
    yield Variant("forward", forward_kernel, types, shape, tiles.warps)
    pointers = dict.fromkeys(("gradient", "output", "x_gradient"), "*bf16")
    integers = dict.fromkeys(("rows", "width", "gradient_stride", "output_stride"), "i32")
    yield Variant("backward", backward_kernel, pointers | integers, shape, tiles.warps)


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
