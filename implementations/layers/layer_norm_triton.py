"""LayerNorm in Triton: one launch, each row read once, with the residual sum in the same pass.

    forward    normal = (x - mean) · inverse,   inverse = 1 / sqrt(variance + epsilon)
               output = normal · scale + shift
    backward   weighted = gradient · scale
               x' = inverse · (weighted - mean(weighted) - normal · mean(weighted · normal))
               scale' = Σ over rows of gradient · normal;   shift' = Σ over rows of gradient

Pieces of a row have a mean and a sum of squares around it; two are joined without looking back:

    mean = m + d · n₂/n,   squares = s₁ + s₂ + d² · n₁ n₂/n,   d = m₂ - m₁

Paper   joining: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm ..."
Floor   bytes, for n numbers of b bytes: forward 2 n b, with the residual 4 n b;
        backward 3 n b, with the residual's gradient 4 n b
Shapes  x, residual [..., channel]    scale, shift [channel]
Run     uv run python implementations/layers/layer_norm_triton.py
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from implementations.lab.ahead_of_time import Variant
from implementations.layers.rms_norm_triton import inverse_root, load_stream
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


def forward_tiles(width: int) -> RowTiles:
    """On an H200 0.97, 0.98, 0.96, 0.97 of a copy's speed at widths 1024, 2048, 4096, 8192.

    With 32 numbers a thread at 8192 0.90. At 16,384 a thread of 64 numbers takes 168 registers, and
    only one program fits on a multiprocessor, which does not read while it computes: 0.57. Held to
    128, two fit: 0.93.
    """
    return row_tiles(width, smallest=2048, most_warps=8, a_thread=32 if width <= 4096 else 64)


def backward_tiles(width: int) -> RowTiles:
    """16 numbers a thread and 16 warps a multiprocessor, with two tiles on their way.

    At widths 1024, 2048, 4096, 8192 0.88, 0.94, 0.92, 0.93 of a copy's speed; at 4096 with two rows
    and 16 warps 0.91, without tiles on their way 0.77. At 16,384 x, its gradient and two sums fill
    the registers: 0.47.
    """
    return row_tiles(width, smallest=4096 if width > 1024 else 2048, a_thread=16)


@triton.jit
def forward_kernel(
    x,
    residual,
    scale,
    shift,
    output,
    stream,
    means,
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
    mean = tl.zeros([ROWS, 1], wide)
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
        before, after = piece * BLOCK, tl.minimum(piece * BLOCK + BLOCK, width)
        count = after - before
        own_mean = tl.sum(value, axis=1, keep_dims=True) / count
        centred = tl.where(column < width, value - own_mean, 0.0)
        apart = own_mean - mean
        squares += tl.sum(centred * centred, axis=1, keep_dims=True)
        squares += apart * apart * before * count / after
        mean += apart * count / after
    root = inverse_root(squares / width + EPSILON)
    tl.store(means + row, mean, row < rows)
    tl.store(inverse + row, root, row < rows)
    for piece in range(PIECES):
        column = piece * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (column < width)
        if PIECES > 1:
            value = load_stream(
                x, residual, stream, row, column, inside, x_stride, residual_stride, ADD, wide
            )
        factor = tl.load(scale + column, column < width, 0.0).to(wide)
        offset = tl.load(shift + column, column < width, 0.0).to(wide)
        tl.store(output + row * width + column, (value - mean) * root * factor + offset, inside)


@triton.jit
def backward_kernel(
    gradient,
    stream_gradient,
    x,
    scale,
    means,
    inverse,
    x_gradient,
    scale_gradient,
    shift_gradient,
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
    normal = tl.zeros([ROWS, BLOCK], wide)
    upstream = tl.zeros([ROWS, BLOCK], wide)
    for_scale = tl.zeros([ROWS, BLOCK], wide)
    for_shift = tl.zeros([ROWS, BLOCK], wide)
    tiles, programs = tl.cdiv(rows, ROWS), tl.num_programs(0)
    for tile in tl.range(program, tiles, programs, num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mean = tl.load(means + row, row < rows, 0.0)
        root = tl.load(inverse + row, row < rows, 0.0)
        plain = tl.zeros([ROWS, 1], wide)
        product = tl.zeros([ROWS, 1], wide)
        for piece in range(PIECES):
            column = piece * BLOCK + tl.arange(0, BLOCK)[None, :]
            inside = (row < rows) & (column < width)
            value = tl.load(x + row * x_stride + column, inside, 0.0).to(wide)
            normal = (value - mean) * root
            upstream = tl.load(gradient + row * gradient_stride + column, inside, 0.0).to(wide)
            weighted = upstream * tl.load(scale + column, column < width, 0.0).to(wide)
            plain += tl.sum(weighted, axis=1, keep_dims=True)
            product += tl.sum(weighted * normal, axis=1, keep_dims=True)
        for piece in range(PIECES):
            column = piece * BLOCK + tl.arange(0, BLOCK)[None, :]
            inside = (row < rows) & (column < width)
            if PIECES > 1:
                value = tl.load(x + row * x_stride + column, inside, 0.0).to(wide)
                normal = (value - mean) * root
                upstream = tl.load(gradient + row * gradient_stride + column, inside, 0.0).to(wide)
            weighted = upstream * tl.load(scale + column, column < width, 0.0).to(wide)
            result = root * (weighted - plain / width - normal * (product / width))
            if ADD:
                at = stream_gradient + row * stream_stride + column
                result += tl.load(at, inside, 0.0).to(wide)
            tl.store(x_gradient + row * width + column, result, inside)
            if PIECES == 1:
                for_scale += upstream * normal
                for_shift += upstream
            else:  # too wide for registers; nobody else adds here, so the order is fixed
                at = program * width + column
                tl.atomic_add(scale_gradient + at, upstream * normal, inside, sem="relaxed")
                tl.atomic_add(shift_gradient + at, upstream, inside, sem="relaxed")
    if PIECES == 1:
        column = tl.arange(0, BLOCK)
        at = program * width + column
        tl.store(scale_gradient + at, tl.sum(for_scale, axis=0), column < width)
        tl.store(shift_gradient + at, tl.sum(for_shift, axis=0), column < width)


@torch.library.custom_op("ml_studies::layer_norm", mutates_args=())
def layer_norm_op(
    x: Tensor, residual: Tensor | None, scale: Tensor, shift: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, the stream (empty without a residual), each row's mean and inverse root."""
    values, width = as_rows(x), x.shape[-1]
    added = values if residual is None else as_rows(residual)
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stream = torch.empty(0 if residual is None else x.shape, dtype=x.dtype, device=x.device)
    wide, rows = wide_dtype(x), len(values)
    means, inverse = (torch.empty(rows, dtype=wide, device=x.device) for _ in range(2))
    tiles = forward_tiles(width)
    launch(
        forward_kernel,
        (ceil_divide(len(values), tiles.rows),),
        values,
        added,
        scale.contiguous(),
        shift.contiguous(),
        output,
        stream,
        means,
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
        maxnreg=128 if tiles.block > 8192 else None,
    )
    return output, stream, means, inverse


@layer_norm_op.register_fake
def _(x, residual, scale, shift, epsilon):
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stream = torch.empty(0 if residual is None else x.shape, dtype=x.dtype, device=x.device)
    rows, wide = x.numel() // x.shape[-1], wide_dtype(x)
    means, inverse = (torch.empty(rows, dtype=wide, device=x.device) for _ in range(2))
    return output, stream, means, inverse


@torch.library.custom_op("ml_studies::layer_norm_backward", mutates_args=())
def layer_norm_backward_op(
    gradient: Tensor,
    stream_gradient: Tensor | None,
    x: Tensor,
    scale: Tensor,
    means: Tensor,
    inverse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x` (which with a residual is the stream), of scale and shift."""
    values, upstream, width = as_rows(x), as_rows(gradient), x.shape[-1]
    stream = upstream if stream_gradient is None else as_rows(stream_gradient)
    tiles, inputs = backward_tiles(width), 2 if stream_gradient is None else 3
    programs = resident_programs(x, ceil_divide(len(values), tiles.rows), 16 // tiles.warps)
    x_gradient = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    make = torch.empty if tiles.pieces == 1 else torch.zeros
    sums = make(2, programs, width, dtype=inverse.dtype, device=x.device)
    launch(
        backward_kernel,
        (programs,),
        upstream,
        stream,
        values,
        scale.contiguous(),
        means,
        inverse,
        x_gradient,
        sums[0],
        sums[1],
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
    total = sums.sum(1).to(scale.dtype)
    return x_gradient, total[0].clone(), total[1].clone()


@layer_norm_backward_op.register_fake
def _(gradient, stream_gradient, x, scale, means, inverse):
    x_gradient = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    channels = [torch.empty(scale.shape, dtype=scale.dtype, device=x.device) for _ in range(2)]
    return x_gradient, *channels


def save(ctx, inputs, output):
    x, residual, scale, *_ = inputs
    _, stream, means, inverse = output
    ctx.residual = residual is not None
    ctx.save_for_backward(stream if ctx.residual else x, scale, means, inverse)


def backward(ctx, gradient, stream_gradient, *_):
    stream_gradient = stream_gradient if ctx.residual else None
    x, scale, shift = layer_norm_backward_op(gradient, stream_gradient, *ctx.saved_tensors)
    return x, x if ctx.residual else None, scale, shift, None


layer_norm_op.register_autograd(backward, setup_context=save)


def layer_norm_triton(
    x: Float[Tensor, "*batch channel"],
    scale: Float[Tensor, " channel"],
    shift: Float[Tensor, " channel"],
    epsilon: float = 1e-5,
) -> Float[Tensor, "*batch channel"]:
    """`layer_norm_naive` in one launch; scale and shift may have another dtype than `x`.

    Raises:
        ValueError: what `check_rows` refuses, or a scale and a shift of two dtypes.
    """
    check_rows(x, scale=scale, shift=shift)
    check_dtypes(scale, shift)
    return layer_norm_op(x, None, scale, shift, epsilon)[0]


def add_layer_norm_triton(
    x: Float[Tensor, "*batch channel"],
    residual: Float[Tensor, "*batch channel"],
    scale: Float[Tensor, " channel"],
    shift: Float[Tensor, " channel"],
    epsilon: float = 1e-5,
) -> tuple[Float[Tensor, "*batch channel"], Float[Tensor, "*batch channel"]]:
    """`add_layer_norm_naive` in one launch: (LayerNorm(x + residual), x + residual).

    Raises:
        ValueError: as in `layer_norm_triton`, or a residual of another shape, dtype or device.
    """
    check_rows(x, scale=scale, shift=shift)
    check_dtypes(scale, shift)
    check_same(x, "residual", residual)
    output, stream, *_ = layer_norm_op(x, residual, scale, shift, epsilon)
    return output, stream


def check_dtypes(scale: Tensor, shift: Tensor) -> None:
    if scale.dtype != shift.dtype:
        raise ValueError(f"scale and shift share a dtype, got {scale.dtype} and {shift.dtype}")


def variants() -> Iterator[Variant]:
    """bfloat16 rows of 4096, as launched."""
    tiles = forward_tiles(4096)
    shape = {"ADD": True, "ROWS": tiles.rows, "BLOCK": tiles.block, "PIECES": tiles.pieces}
    names = ("x", "residual", "scale", "shift", "output", "stream")
    types = dict.fromkeys(names, "*bf16") | dict.fromkeys(("means", "inverse"), "*fp32")
    types |= dict.fromkeys(("rows", "width", "x_stride", "residual_stride"), "i32")
    yield Variant("forward", forward_kernel, types, {"EPSILON": 1e-5, **shape}, tiles.warps)
    types = dict.fromkeys(("gradient", "stream_gradient", "x", "scale", "x_gradient"), "*bf16")
    names = ("means", "inverse", "scale_gradient", "shift_gradient")
    integers = ("rows", "width", "gradient_stride", "stream_stride", "x_stride")
    types |= dict.fromkeys(names, "*fp32") | dict.fromkeys(integers, "i32")
    tiles = backward_tiles(4096)
    shape |= {"ROWS": tiles.rows, "BLOCK": tiles.block, "STAGES": 3}
    yield Variant("backward", backward_kernel, types, shape, tiles.warps, capabilities=(90,))


def main() -> None:
    from implementations.lab.compare import allowed, error
    from implementations.layers.layer_norm import layer_norm_naive

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, scale, shift = (torch.randn(*s, 4096, device=device).half() for s in ((8,), (), ()))
    exact = layer_norm_naive(x.double(), scale.double(), shift.double())
    naive, fast = layer_norm_naive(x, scale, shift), layer_norm_triton(x, scale, shift)
    print(f"LayerNorm of float16 rows of 4096, {device}: mean error {error(fast, exact).mean:.1e}")
    print(f"  the equation in float16 {error(naive, exact).mean:.1e}", end=", ")
    print(f"allowed {allowed(naive, exact).mean:.1e}")


if __name__ == "__main__":
    main()
