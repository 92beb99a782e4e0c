"""RMSNorm in Triton: one launch, each row read once, with the residual sum in the same pass.

    forward    inverse = 1 / sqrt(mean(x²) + epsilon);   output = x · inverse · scale
    backward   weighted = gradient · scale
               x' = inverse · weighted - x · inverse³ · mean(weighted · x)
               scale' = Σ over rows of gradient · x · inverse

The backward pass is a few programs that each walk over many rows and keep their own sum for the
scale, which a small second reduction adds up.

Floor   bytes, for n numbers of b bytes: forward 2 n b, with the residual 4 n b;
        backward 3 n b, with the residual's gradient 4 n b
Shapes  x, residual [..., channel]    scale [channel]
Run     uv run python implementations/layers/rms_norm_triton.py
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from implementations.lab.ahead_of_time import Variant
from implementations.layers.row_tiles import (
    RowTiles,
    as_rows,
    ceil_divide,
    check_rows,
    check_same,
    launch,
    pipeline_stages,
    resident_programs,
    row_tiles,
    wide_dtype,
)

# On an H200, of a copy's speed, 2^28 numbers in bfloat16. Forward at width 1024: 0.98 with 2 rows
# and 2 warps, 0.95 with 4 and 4. At 4096 and 16,384 warps matter little: 0.96 and 0.98.
FORWARD_SMALLEST, FORWARD_WARPS = 2048, 8


def backward_tiles(width: int) -> RowTiles:
    """16 numbers a thread and 16 warps a multiprocessor, with two tiles on their way.

    At widths 1024, 2048, 4096, 8192 0.94, 0.93, 0.96, 0.96 of a copy's speed; at 4096 with one row
    and 8 warps 0.93, without tiles on their way 0.81. At 16,384 a row fills the registers: 0.80.
    """
    return row_tiles(width, smallest=8192 if width > 2048 else 4096, a_thread=16)


@triton.jit
def load_stream(
    x,
    residual,
    stream,
    row,
    column,
    inside,
    x_stride,
    residual_stride,
    ADD: tl.constexpr,
    WIDE: tl.constexpr,
):
    """x, or x + residual rounded as the stream that others will read."""
    value = tl.load(x + row * x_stride + column, inside, 0.0).to(WIDE)
    if ADD:
        value += tl.load(residual + row * residual_stride + column, inside, 0.0).to(WIDE)
        value = value.to(stream.dtype.element_ty).to(WIDE)
    return value


@triton.jit
def inverse_root(square):
    """1 / sqrt(square): in float32 a GPU's root and quotient are approximate unless asked."""
    return 1 / tl.sqrt(square) if square.dtype == tl.float64 else tl.div_rn(1.0, tl.sqrt_rn(square))


@triton.jit
def forward_kernel(
    x,
    residual,
    scale,
    output,
    stream,
    inverse,
    rows,
    width,
    x_stride,
    residual_stride,
    EPSILON: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
):
    wide = inverse.dtype.element_ty
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    squares = tl.zeros([ROWS, 1], wide)
    value = tl.zeros([ROWS, BLOCK], wide)
    for piece in range(PIECES):
        column = piece * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (column < width)
        value = load_stream(
            x, residual, stream, row, column, inside, x_stride, residual_stride, ADD, wide
        )
        if ADD:
            tl.store(stream + row * width + column, value, inside)
        squares += tl.sum(value * value, axis=1, keep_dims=True)
    root = inverse_root(squares / width + EPSILON)
    tl.store(inverse + row, root, row < rows)
    for piece in range(PIECES):
        column = piece * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (column < width)
        if PIECES > 1:
            value = load_stream(
                x, residual, stream, row, column, inside, x_stride, residual_stride, ADD, wide
            )
        factor = tl.load(scale + column, column < width, 0.0).to(wide)
        tl.store(output + row * width + column, value * root * factor, inside)


@triton.jit
def backward_kernel(
    gradient,
    stream_gradient,
    x,
    scale,
    inverse,
    x_gradient,
    scale_gradient,
    rows,
    width,
    gradient_stride,
    stream_stride,
    x_stride,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
    STAGES: tl.constexpr,
):
    wide = inverse.dtype.element_ty
    program = tl.program_id(0)
    value = tl.zeros([ROWS, BLOCK], wide)
    upstream = tl.zeros([ROWS, BLOCK], wide)
    collected = tl.zeros([ROWS, BLOCK], wide)
    tiles, programs = tl.cdiv(rows, ROWS), tl.num_programs(0)
    for tile in tl.range(program, tiles, programs, num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        root = tl.load(inverse + row, row < rows, 0.0)
        product = tl.zeros([ROWS, 1], wide)
        for piece in range(PIECES):
            column = piece * BLOCK + tl.arange(0, BLOCK)[None, :]
            inside = (row < rows) & (column < width)
            value = tl.load(x + row * x_stride + column, inside, 0.0).to(wide)
            upstream = tl.load(gradient + row * gradient_stride + column, inside, 0.0).to(wide)
            factor = tl.load(scale + column, column < width, 0.0).to(wide)
            product += tl.sum(upstream * factor * value, axis=1, keep_dims=True)
        pull = root * root * root * product / width
        for piece in range(PIECES):
            column = piece * BLOCK + tl.arange(0, BLOCK)[None, :]
            inside = (row < rows) & (column < width)
            if PIECES > 1:
                value = tl.load(x + row * x_stride + column, inside, 0.0).to(wide)
                upstream = tl.load(gradient + row * gradient_stride + column, inside, 0.0).to(wide)
            factor = tl.load(scale + column, column < width, 0.0).to(wide)
            result = upstream * factor * root - value * pull
            if ADD:
                at = stream_gradient + row * stream_stride + column
                result += tl.load(at, inside, 0.0).to(wide)
            tl.store(x_gradient + row * width + column, result, inside)
            if PIECES == 1:
                collected += upstream * value * root
            else:  # too wide for registers; nobody else adds here, so the order is fixed
                at = scale_gradient + program * width + column
                tl.atomic_add(at, upstream * value * root, inside, sem="relaxed")
    if PIECES == 1:
        column = tl.arange(0, BLOCK)
        at = scale_gradient + program * width + column
        tl.store(at, tl.sum(collected, axis=0), column < width)


@torch.library.custom_op("ml_studies::rms_norm", mutates_args=())
def rms_norm_op(
    x: Tensor, residual: Tensor | None, scale: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the stream (empty without a residual) and each row's inverse root."""
    values, width = as_rows(x), x.shape[-1]
    added = values if residual is None else as_rows(residual)
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stream = torch.empty(0 if residual is None else x.shape, dtype=x.dtype, device=x.device)
    inverse = torch.empty(len(values), dtype=wide_dtype(x), device=x.device)
    tiles = row_tiles(width, smallest=FORWARD_SMALLEST, most_warps=FORWARD_WARPS)
    launch(
        forward_kernel,
        (ceil_divide(len(values), tiles.rows),),
        values,
        added,
        scale.contiguous(),
        output,
        stream,
        inverse,
        len(values),
        width,
        values.stride(0),
        added.stride(0),
        EPSILON=epsilon,
        ADD=residual is not None,
        ROWS=tiles.rows,
        BLOCK=tiles.block,
        PIECES=tiles.pieces,
        num_warps=tiles.warps,
    )
    return output, stream, inverse


@rms_norm_op.register_fake
def _(x, residual, scale, epsilon):
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stream = torch.empty(0 if residual is None else x.shape, dtype=x.dtype, device=x.device)
    rows = x.numel() // x.shape[-1]
    return output, stream, torch.empty(rows, dtype=wide_dtype(x), device=x.device)


@torch.library.custom_op("ml_studies::rms_norm_backward", mutates_args=())
def rms_norm_backward_op(
    gradient: Tensor, stream_gradient: Tensor | None, x: Tensor, scale: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `x` (which with a residual is the stream) and of the scale."""
    values, upstream, width = as_rows(x), as_rows(gradient), x.shape[-1]
    stream = upstream if stream_gradient is None else as_rows(stream_gradient)
    tiles, inputs = backward_tiles(width), 2 if stream_gradient is None else 3
    programs = resident_programs(x, ceil_divide(len(values), tiles.rows), 16 // tiles.warps)
    x_gradient = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    make = torch.empty if tiles.pieces == 1 else torch.zeros
    scale_gradient = make(programs, width, dtype=inverse.dtype, device=x.device)
    launch(
        backward_kernel,
        (programs,),
        upstream,
        stream,
        values,
        scale.contiguous(),
        inverse,
        x_gradient,
        scale_gradient,
        len(values),
        width,
        upstream.stride(0),
        stream.stride(0),
        values.stride(0),
        ADD=stream_gradient is not None,
        ROWS=tiles.rows,
        BLOCK=tiles.block,
        PIECES=tiles.pieces,
        STAGES=pipeline_stages(x, tiles, inputs),
        num_warps=tiles.warps,
    )
    return x_gradient, scale_gradient.sum(0).to(scale.dtype)


@rms_norm_backward_op.register_fake
def _(gradient, stream_gradient, x, scale, inverse):
    x_gradient = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return x_gradient, torch.empty(scale.shape, dtype=scale.dtype, device=x.device)


def save(ctx, inputs, output):
    x, residual, scale, _ = inputs
    _, stream, inverse = output
    ctx.residual = residual is not None
    ctx.save_for_backward(stream if ctx.residual else x, scale, inverse)


def backward(ctx, gradient, stream_gradient, _):
    stream_gradient = stream_gradient if ctx.residual else None
    x, scale = rms_norm_backward_op(gradient, stream_gradient, *ctx.saved_tensors)
    return x, x if ctx.residual else None, scale, None


rms_norm_op.register_autograd(backward, setup_context=save)


def rms_norm_triton(
    x: Float[Tensor, "*batch channel"], scale: Float[Tensor, " channel"], epsilon: float = 1e-5
) -> Float[Tensor, "*batch channel"]:
    """`rms_norm_naive` in one launch; the scale may have another dtype than `x`.

    Raises:
        ValueError: what `check_rows` refuses.
    """
    check_rows(x, scale=scale)
    return rms_norm_op(x, None, scale, epsilon)[0]


def add_rms_norm_triton(
    x: Float[Tensor, "*batch channel"],
    residual: Float[Tensor, "*batch channel"],
    scale: Float[Tensor, " channel"],
    epsilon: float = 1e-5,
) -> tuple[Float[Tensor, "*batch channel"], Float[Tensor, "*batch channel"]]:
    """`add_rms_norm_naive` in one launch: (RMSNorm(x + residual), x + residual).

    Raises:
        ValueError: what `check_rows` refuses, or a residual of another shape, dtype or device.
    """
    check_rows(x, scale=scale)
    check_same(x, "residual", residual)
    output, stream, _ = rms_norm_op(x, residual, scale, epsilon)
    return output, stream


def variants() -> Iterator[Variant]:
    """bfloat16 rows of 4096, as launched."""
    pointers = dict.fromkeys(("x", "residual", "scale", "output", "stream"), "*bf16")
    integers = dict.fromkeys(("rows", "width", "x_stride", "residual_stride"), "i32")
    tiles = row_tiles(4096, smallest=FORWARD_SMALLEST, most_warps=FORWARD_WARPS)
    shape = {"ADD": True, "ROWS": tiles.rows, "BLOCK": tiles.block, "PIECES": tiles.pieces}
    types = pointers | {"inverse": "*fp32"} | integers
    yield Variant("forward", forward_kernel, types, {"EPSILON": 1e-5, **shape}, tiles.warps)
    names = ("gradient", "stream_gradient", "x", "scale")
    pointers = dict.fromkeys(names, "*bf16") | {"inverse": "*fp32", "x_gradient": "*bf16"}
    names = ("rows", "width", "gradient_stride", "stream_stride", "x_stride")
    types = pointers | {"scale_gradient": "*fp32"} | dict.fromkeys(names, "i32")
    tiles = backward_tiles(4096)
    shape |= {"ROWS": tiles.rows, "BLOCK": tiles.block, "STAGES": 3}
    yield Variant("backward", backward_kernel, types, shape, tiles.warps, capabilities=(90,))


def main() -> None:
    from implementations.lab.compare import allowed, error
    from implementations.layers.rms_norm import rms_norm_naive

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, scale = torch.randn(8, 4096, device=device).half(), torch.randn(4096, device=device).half()
    exact = rms_norm_naive(x.double(), scale.double())
    naive, fast = rms_norm_naive(x, scale), rms_norm_triton(x, scale)
    print(f"RMSNorm of float16 rows of 4096, {device}: mean error {error(fast, exact).mean:.1e}")
    print(f"  the equation in float16 {error(naive, exact).mean:.1e}", end=", ")
    print(f"allowed {allowed(naive, exact).mean:.1e}")


if __name__ == "__main__":
    main()
