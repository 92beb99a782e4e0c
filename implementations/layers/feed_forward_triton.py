"""SwiGLU's bend in Triton: both halves read once, nothing kept between.

    forward    output = silu(gate) · expand,   silu(g) = g σ(g)
    backward   gate' = gradient · expand · σ(g) (1 + g (1 - σ(g)));   expand' = gradient · silu(g)

The three linear maps around it are left to torch.

Floor   bytes, for n numbers of b bytes: forward 3 n b, backward 5 n b
Shapes  gate, expand [...]
Run     uv run python implementations/layers/feed_forward_triton.py
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
    check_same,
    launch,
    row_tiles,
)

# Rows of 4096 on an H200, forward and backward, in shares of a copy's speed: 0.97 and 0.98 with 8
# warps, 0.94 and 0.98 with 4.
WARPS = 8


@triton.jit
def swiglu_kernel(
    gate,
    expand,
    gradient,
    output,
    expand_gradient,
    rows,
    width,
    gate_stride,
    expand_stride,
    gradient_stride,
    WIDE: tl.constexpr,
    BACKWARD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < width)
    g = tl.load(gate + row * gate_stride + column, inside, 0.0).to(WIDE)
    e = tl.load(expand + row * expand_stride + column, inside, 0.0).to(WIDE)
    sigmoid = 1 / (1 + tl.exp(-g))
    at = row * width + column
    if BACKWARD:
        upstream = tl.load(gradient + row * gradient_stride + column, inside, 0.0).to(WIDE)
        tl.store(output + at, upstream * e * sigmoid * (1 + g * (1 - sigmoid)), inside)
        tl.store(expand_gradient + at, upstream * g * sigmoid, inside)
    else:
        tl.store(output + at, g * sigmoid * e, inside)


def launch_swiglu(gate: Tensor, expand: Tensor, gradient: Tensor | None, *outputs: Tensor) -> None:
    gate, expand = as_rows(gate), as_rows(expand)
    upstream = gate if gradient is None else as_rows(gradient)
    rows, width = gate.shape
    tiles = row_tiles(width, widest=4096)
    launch(
        swiglu_kernel,
        (ceil_divide(rows, tiles.rows), tiles.pieces),
        gate,
        expand,
        upstream,
        outputs[0],
        outputs[-1],
        rows,
        width,
        gate.stride(0),
        expand.stride(0),
        upstream.stride(0),
        WIDE=tl.float64 if gate.dtype == torch.float64 else tl.float32,
        BACKWARD=gradient is not None,
        ROWS=tiles.rows,
        BLOCK=tiles.block,
        num_warps=WARPS,
    )


@torch.library.custom_op("ml_studies::swiglu", mutates_args=())
def swiglu_op(gate: Tensor, expand: Tensor) -> Tensor:
    output = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    launch_swiglu(gate, expand, None, output)
    return output


@torch.library.custom_op("ml_studies::swiglu_backward", mutates_args=())
def swiglu_backward_op(gradient: Tensor, gate: Tensor, expand: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and expand."""
    results = [torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2)]
    launch_swiglu(gate, expand, gradient, *results)
    return results[0], results[1]


@swiglu_op.register_fake
def _(gate, expand):
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@swiglu_backward_op.register_fake
def _(gradient, gate, expand):
    results = [torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2)]
    return results[0], results[1]


swiglu_op.register_autograd(
    lambda ctx, gradient: swiglu_backward_op(gradient, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def swiglu_triton(
    gate: Float[Tensor, "*batch hidden"], expand: Float[Tensor, "*batch hidden"]
) -> Float[Tensor, "*batch hidden"]:
    """`swiglu_naive` in one launch.

    Raises:
        ValueError: what `check_rows` refuses, or halves of two shapes, dtypes or devices.
    """
    check_rows(gate)
    check_same(gate, "expand", expand)
    return swiglu_op(gate, expand)


def variants() -> Iterator[Variant]:
    """bfloat16 rows of 4096, backward: the forward pass is a part of it."""
    tiles = row_tiles(4096, widest=4096)
    names = ("gate", "expand", "gradient", "output", "expand_gradient")
    integers = ("rows", "width", "gate_stride", "expand_stride", "gradient_stride")
    types = dict.fromkeys(names, "*bf16") | dict.fromkeys(integers, "i32")
    shape = {"WIDE": tl.float32, "BACKWARD": True, "ROWS": tiles.rows, "BLOCK": tiles.block}
    yield Variant("backward", swiglu_kernel, types, shape, WARPS, capabilities=(90,))


def main() -> None:
    from implementations.lab.compare import allowed, error
    from implementations.layers.feed_forward import swiglu_naive

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gate, expand = (torch.randn(64, 1536, device=device).half() for _ in range(2))
    exact = swiglu_naive(gate.double(), expand.double())
    naive, fast = swiglu_naive(gate, expand), swiglu_triton(gate, expand)
    print(f"SwiGLU in float16, {device}: mean error {error(fast, exact).mean:.1e}")
    print(f"  the equation in float16 {error(naive, exact).mean:.1e}", end=", ")
    print(f"allowed {allowed(naive, exact).mean:.1e}")


if __name__ == "__main__":
    main()
