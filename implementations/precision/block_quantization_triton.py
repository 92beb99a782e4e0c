"""A matrix of 4-bit weights times one vector, read once: the product that decoding waits for.

    y_i = Σ over groups of scale · (Σ_k word_ik x_k - zero · Σ_k x_k)

At batch 1 each weight is used once, so the bytes decide: 4 bits and a share of a scale instead of
16. Then arithmetic is scarce. An H200 reads 9 · 10¹² such weights a second and has 3 instructions
for each, so a word becomes a float by its bits alone: in 2²³ + word the word is the lowest bits of
the fraction, and one logical operation puts it there, wherever in a byte it lay (a word 4 places
higher counts 16 times, and its x a sixteenth).

Floor   bytes, for n weights in groups of g: n / 2 + 3 n / g, and the vectors
Shapes  words [row, group, part] of 8 weights: bits 4p to 4p+3 of part m are weight p · g/8 + m
Run     uv run python implementations/precision/block_quantization_triton.py
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float16, Int32, UInt8
from torch import Tensor

from implementations.lab.ahead_of_time import Variant
from implementations.layers.row_tiles import ceil_divide, launch
from implementations.precision.block_quantization import Quantized, unpack_nibbles

EIGHT = 8  # weights in 32 bits
# 5.2 instructions a weight in the compiled program, against 5.9 with 4 rows and 6.4 with 8 groups;
# not timed on a GPU yet.
ROWS, GROUPS, WARPS, STAGES = 8, 32, 4, 1


class Packed(NamedTuple):
    """4-bit weights as the kernel reads them: eight in 32 bits."""

    words: Int32[Tensor, "row group part"]
    scale: Float16[Tensor, "row group"]
    zero: UInt8[Tensor, "row group"]


def packed(quantized: Quantized) -> Packed:
    """The same words in the kernel's order, in which neighbours in memory are neighbours in x.

    Raises:
        ValueError: words of other than 4 bits, no matrix, or a group that is no power of two
            from 32 on.
    """
    if quantized.bits != 4 or quantized.scale.ndim != 2:
        shape = tuple(quantized.scale.shape)
        raise ValueError(
            f"the kernel takes a matrix of 4 bits, got {quantized.bits} bits and scales {shape}"
        )
    words = unpack_nibbles(quantized.words)
    group = words.shape[-1]
    if group < 32 or group & (group - 1):
        raise ValueError(f"the kernel's groups are powers of two from 32 on, got {group}")
    parts = words.unflatten(-1, (EIGHT, -1)).to(torch.int64)
    shifts = 4 * torch.arange(EIGHT, device=words.device)[:, None]
    whole = (parts << shifts).sum(-2)
    whole = whole - (whole >> 31 << 32)  # the same 32 bits as a signed number
    return Packed(whole.to(torch.int32), quantized.scale, quantized.zero)


@triton.jit
def nibble_times(word, high, number, PLACE: tl.constexpr):
    """The word at a place of 0 to 7, times a number for each part."""
    # Five words fit below the 23rd bit; the other three do after a shift by 20.
    shift: tl.constexpr = 4 * (PLACE if PLACE < 5 else PLACE - 5)
    bits = (word if PLACE < 5 else high) & (15 << shift) | 0x4B000000
    value = bits.to(tl.float32, bitcast=True) - 8388608.0
    return value * (number * (1.0 / (1 << shift)))[None, :, :]


@triton.jit
def matrix_vector_kernel(
    words,
    scale,
    zero,
    x,
    y,
    rows,
    groups,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    part = tl.arange(0, PARTS)[None, :]
    total = tl.zeros([ROWS, GROUPS, PARTS], tl.float32)
    for first in tl.range(0, groups, GROUPS, num_stages=STAGES):
        group = first + tl.arange(0, GROUPS)
        inside = (row < rows) & (group < groups)[None, :]
        place = row * groups + group[None, :]
        at = words + place[:, :, None] * PARTS + part[None, :, :]
        word = tl.load(at, inside[:, :, None], 0)
        factor = tl.load(scale + place, inside, 0.0).to(tl.float32)
        offset = tl.load(zero + place, inside, 0).to(tl.float32)
        high = word >> 20
        sums = tl.zeros([GROUPS, PARTS], tl.float32)
        product = tl.zeros([ROWS, GROUPS, PARTS], tl.float32)
        for p in tl.static_range(8):
            at_x = x + (group[:, None] * 8 + p) * PARTS + part
            number = tl.load(at_x, (group < groups)[:, None], 0.0).to(tl.float32)
            sums += number
            product += nibble_times(word, high, number, p)
        total += factor[:, :, None] * (product - offset[:, :, None] * sums[None, :, :])
    result = tl.sum(tl.sum(total, axis=2), axis=1)
    at_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(y + at_row, result, at_row < rows)


@torch.library.custom_op("ml_studies::matrix_vector_int4", mutates_args=())
def matrix_vector_op(words: Tensor, scale: Tensor, zero: Tensor, x: Tensor) -> Tensor:
    """One number a row, in the dtype of `x`."""
    rows, groups, parts = words.shape
    y = torch.empty(rows, dtype=x.dtype, device=x.device)
    if rows:
        launch(
            matrix_vector_kernel,
            (ceil_divide(rows, ROWS),),
            words,
            scale,
            zero,
            x.contiguous(),
            y,
            rows,
            groups,
            ROWS=ROWS,
            GROUPS=GROUPS,
            PARTS=parts,
            STAGES=STAGES,
            num_warps=WARPS,
        )
    return y


@matrix_vector_op.register_fake
def _(words, scale, zero, x):
    return torch.empty(len(words), dtype=x.dtype, device=x.device)


def matrix_vector_triton(weight: Packed, x: Float[Tensor, " width"]) -> Float[Tensor, " row"]:
    """`matrix_vector` of weights that `packed` has brought into order, summed in float32.

    Raises:
        ValueError: `x` has another width than the weights, or is float64.
    """
    width = weight.scale.shape[1] * EIGHT * weight.words.shape[2]
    if x.shape != (width,):
        raise ValueError(f"weights {width} wide take a vector of that length, got {list(x.shape)}")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"the kernel sums in float32 what is no wider, got {x.dtype}")
    return matrix_vector_op(*weight, x)


def variants() -> Iterator[Variant]:
    """Groups of 128 in bfloat16's company, as launched."""
    types = {"words": "*i32", "scale": "*fp16", "zero": "*u8", "x": "*bf16", "y": "*bf16"}
    types |= {"rows": "i32", "groups": "i32"}
    constants = {"ROWS": ROWS, "GROUPS": GROUPS, "PARTS": 16, "STAGES": STAGES}
    yield Variant(
        "groups of 128", matrix_vector_kernel, types, constants, WARPS, capabilities=(90,)
    )


def main() -> None:
    from implementations.precision.block_quantization import matrix_vector, quantize

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight, x = torch.randn(40, 512, device=device), torch.randn(512, device=device)
    stored = quantize(weight, 4, 128)
    ours, naive = matrix_vector_triton(packed(stored), x), matrix_vector(stored, x)
    apart = ((ours - naive).norm() / naive.norm()).item()
    lost = ((naive - weight @ x).norm() / naive.norm()).item()
    print(f"40 x 512 weights of 4 bits times a vector, on {device}")
    print(f"  kernel and equation differ by {apart:.1e}, both from float32's weights by {lost:.1%}")


if __name__ == "__main__":
    main()
