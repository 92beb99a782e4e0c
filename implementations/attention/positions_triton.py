"""Rotary positions in Triton: sines and cosines are made where they are used, once for all heads.

    (first, second) -> (first cos - second sin, first sin + second cos)
    angle = p · base ** (-2i / dim)

Turning back is the gradient: the same kernel with the other sign. A program takes some tokens and
walks over the heads, so a token's angles are computed once. Frequencies are computed in float64,
rounded once and kept: the angle of token 100,000 still has the digits that float32 can give it.

The interleaved layout is read and written as it lies, and pairs are taken apart in registers: read
by steps of two, it reached 0.12 of a copy's speed on an H200, where the half-split one has 0.82.

Floor   bytes, for n numbers of b bytes: 2 n b each way
Shapes  x [..., head, token, dim], heads and tokens in any strides
Run     uv run python implementations/attention/positions_triton.py
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from implementations.attention.positions import Positions, check_pairs
from implementations.lab.ahead_of_time import Variant
from implementations.layers.row_tiles import (
    ceil_divide,
    check_device,
    check_rows,
    launch,
    power_of_two,
    wide_dtype,
)

# A program turns NUMBERS at once, those of up to HEADS heads. On an H200 with heads of 128, of a
# copy's speed in both layouts: 0.96; 4 heads 0.93 and 0.94; 1 head 0.90 and 0.87.
HEADS, NUMBERS, WARPS = 8, 2048, 4


@triton.jit
def rotate_kernel(
    x,
    positions,
    frequencies,
    output,
    tokens,
    heads,
    x_batch,
    x_head,
    x_token,
    output_batch,
    output_head,
    output_token,
    GIVEN: tl.constexpr,
    SIGN: tl.constexpr,
    DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    wide = frequencies.dtype.element_ty
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[None, :, None]
    pair = tl.arange(0, PAIRS)[None, None, :]
    place = token.to(wide)
    if GIVEN:
        place = tl.load(positions + token, token < tokens, 0).to(wide)
    angle = place * tl.load(frequencies + pair, pair < DIM // 2, 0.0)
    cos = tl.cos(angle)
    sin = SIGN * tl.sin(angle)
    column = tl.arange(0, 2 * PAIRS)[None, None, :] if INTERLEAVED else pair
    inside = (token < tokens) & (column < (DIM if INTERLEAVED else DIM // 2))
    batch = tl.program_id(1).to(tl.int64)
    read = x + batch * x_batch + token.to(tl.int64) * x_token + column
    write = output + batch * output_batch + token.to(tl.int64) * output_token + column
    for start in range(0, heads, HEADS):
        head = (start + tl.arange(0, HEADS)).to(tl.int64)[:, None, None]
        here = inside & (head < heads)
        source, target = read + head * x_head, write + head * output_head
        if INTERLEAVED:
            both = tl.load(source, here, 0.0).to(wide)
            first, second = tl.split(tl.reshape(both, (HEADS, TOKENS, PAIRS, 2)))
        else:
            first = tl.load(source, here, 0.0).to(wide)
            second = tl.load(source + DIM // 2, here, 0.0).to(wide)
        turned = first * cos - second * sin
        other = first * sin + second * cos
        if INTERLEAVED:
            both = tl.reshape(tl.join(turned, other), (HEADS, TOKENS, 2 * PAIRS))
            tl.store(target, both, here)
        else:
            tl.store(target, turned, here)
            tl.store(target + DIM // 2, other, here)


@lru_cache(maxsize=16)
def frequencies(dim: int, base: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One for each pair of channels, computed in float64 and rounded once."""
    channel = torch.arange(0, dim, 2, dtype=torch.float64)
    return (base ** (-channel / dim)).to(device, dtype)


@torch.library.custom_op("ml_studies::rotate", mutates_args=())
def rotate_op(
    x: Tensor, positions: Tensor | None, base: float, interleaved: bool, back: bool
) -> Tensor:
    """Turned forth, or back; the output has the order of the input's axes in memory."""
    output = empty_like(x)
    if x.numel() == 0:
        return output
    heads, turned = as_heads(x if readable(x) else x.contiguous()), as_heads(output)
    batch, count, tokens, dim = heads.shape
    pairs, at_once = power_of_two(dim // 2), min(HEADS, power_of_two(count))
    block = max(1, NUMBERS // (2 * pairs * at_once))
    launch(
        rotate_kernel,
        (ceil_divide(tokens, block), batch),
        heads,
        heads if positions is None else positions.contiguous(),
        frequencies(dim, base, wide_dtype(x), x.device),
        turned,
        tokens,
        count,
        *heads.stride()[:3],
        *turned.stride()[:3],
        GIVEN=positions is not None,
        SIGN=-1.0 if back else 1.0,
        DIM=dim,
        INTERLEAVED=interleaved,
        HEADS=at_once,
        TOKENS=block,
        PAIRS=pairs,
        num_warps=WARPS,
    )
    return output


def readable(x: Tensor) -> bool:
    """A head's numbers are neighbours, and at most one axis stands before the heads."""
    return x.stride(-1) == 1 and x.ndim <= 4


def empty_like(x: Tensor) -> Tensor:
    """Room for the output, its axes in memory in the order of a readable input's."""
    return torch.empty_like(x) if readable(x) else torch.empty_like(x.contiguous())


def as_heads(x: Tensor) -> Tensor:
    """[batch, head, token, dim], never copied."""
    return x[(None,) * (4 - x.ndim)] if x.ndim < 4 else x.view(-1, *x.shape[-3:])


@rotate_op.register_fake
def _(x, positions, base, interleaved, back):
    return empty_like(x)


def save(ctx, inputs, output):
    _, positions, ctx.base, ctx.interleaved, ctx.back = inputs
    ctx.save_for_backward(positions)


def backward(ctx, gradient):
    (positions,) = ctx.saved_tensors
    turned = rotate_op(gradient, positions, ctx.base, ctx.interleaved, not ctx.back)
    return turned, None, None, None, None


rotate_op.register_autograd(backward, setup_context=save)


def rotate_interleaved_triton(
    x: Float[Tensor, "*batch token dim"], positions: Positions | None = None, base: float = 10000.0
) -> Float[Tensor, "*batch token dim"]:
    """`rotate_interleaved` in one launch. Errors are those of `check`."""
    check(x, positions, base)
    return rotate_op(x, positions, base, True, False)


def rotate_half_split_triton(
    x: Float[Tensor, "*batch token dim"], positions: Positions | None = None, base: float = 10000.0
) -> Float[Tensor, "*batch token dim"]:
    """`rotate_half_split` in one launch. Errors are those of `check`."""
    check(x, positions, base)
    return rotate_op(x, positions, base, False, False)


def check(x: Tensor, positions: Tensor | None, base: float) -> None:
    """What the kernel asks of its arguments.

    Raises:
        ValueError: `x` is not of floats, has no token axis or an odd last one; positions that are
            not one number a token on the device of `x`; a base that is not positive.
    """
    check_rows(x)
    if x.ndim < 2:
        raise ValueError(f"rotary positions need [token, dim], got the shape {tuple(x.shape)}")
    tokens, dim = x.shape[-2:]
    check_pairs(dim)
    if base <= 0:
        raise ValueError(f"the base of the frequencies is positive, got {base}")
    if positions is not None:
        if positions.shape != (tokens,):
            raise ValueError(f"{tokens} tokens need as many positions, got {list(positions.shape)}")
        if positions.dtype in (torch.bool, torch.complex64, torch.complex128):
            raise ValueError(f"positions are integers or floats, got {positions.dtype}")
        check_device(x, "positions", positions)


def variants() -> Iterator[Variant]:
    """bfloat16 heads of 128, half split."""
    types = {"x": "*bf16", "output": "*bf16"}
    names = ("tokens", "heads", "x_batch", "x_head", "x_token")
    types |= dict.fromkeys((*names, "output_batch", "output_head", "output_token"), "i32")
    types |= {"positions": "*i64", "frequencies": "*fp32"}
    constants = {"GIVEN": True, "SIGN": 1.0, "DIM": 128, "INTERLEAVED": False}
    constants |= {"HEADS": HEADS, "TOKENS": NUMBERS // 128 // HEADS, "PAIRS": 64}
    # Not in the walk over heads: the 28 bytes in which a sine reduces an angle over 10^5. For an
    # H200 the same lines are compiled in serving/paged_cache_triton.py.
    name = "half split"
    yield Variant(name, rotate_kernel, types, constants, WARPS, most_spilled=32, capabilities=(80,))


def main() -> None:
    from implementations.attention.positions import rotate_half_split
    from implementations.lab.compare import error

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(2, 4, 16, 64, device=device)
    print(f"rotary positions in float32, {device}: mean error of the kernel and of the equation")
    for start in (0, 1000, 100_000):
        positions = torch.arange(start, start + 16, device=device)
        exact = rotate_half_split(x.double(), positions)
        fast = error(rotate_half_split_triton(x, positions), exact).mean
        naive = error(rotate_half_split(x, positions), exact).mean
        print(f"  from token {start:7,}  {fast:.1e}  {naive:.1e}")


if __name__ == "__main__":
    main()
