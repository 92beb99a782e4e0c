"""A matrix of 4-bit weights times one vector, read once: the product that decoding waits for.

    y_i = Σ over groups of scale · (Σ_k word_ik x_k - zero · Σ_k x_k)

At batch 1 each weight is used once, so the bytes decide: 4 bits and a share of a scale instead of
16. Then arithmetic is scarce: at the speed at which an H200 reads, it has 3.7 instructions for such
a weight. So a word becomes a float by its bits alone: in 2²³ + word the word is the lowest bits of
the fraction, and one logical operation puts it there, wherever it lay (a word 4 places higher
counts 16 times, and its x a sixteenth). One subtraction takes 2²³ and the zero point away, one
fused operation adds the product: 3, and 1.8 more for shifts, x and scales as it is compiled.

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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from implementations.lab.ahead_of_time import Variant
from implementations.layers.row_tiles import ceil_divide, launch
from implementations.precision.block_quantization import Quantized, unpack_nibbles

EIGHT = 8  # weights in 32 bits
# In shares of what the bytes allow, on an H200, over six layers of a 7B decoder: 0.42; with 2 rows
# 0.39, with 8 rows 0.39, with 8 groups and 1 warp 0.37, with 32 groups, 4 warps and 2 rows 0.37.
ROWS, GROUPS, WARPS = 4, 16, 2
# The float 2^23 as bits. An argument: of two constants the assembler makes two operations.
TWO_TO_23 = 0x4B000000


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
def place_of(NIBBLE: tl.constexpr):
    """Its lowest bit in the word, or in the word shifted by 12: below a float's 23 bits."""
    return 4 * NIBBLE if NIBBLE < 5 else 4 * NIBBLE - 12


@triton.jit
def matrix_vector_kernel(
    words,
    scale,
    zero,
    x,
    y,
    two_to_23,
    rows,
    groups,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:  # the next kernel may take its places now, and waits there as this one does
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, PARTS)[None, :]
    total = tl.zeros([ROWS, GROUPS, PARTS], tl.float32)
    for first in range(0, groups, GROUPS):
        # A row of words in one piece, so that neighbouring threads take neighbours along it: each
        # keeps the x of its four words for all rows.
        at = first * PARTS + tl.arange(0, GROUPS * PARTS)[None, :]
        inside = (row[:, None] < rows) & (at < groups * PARTS)
        word = tl.load(words + row[:, None] * (groups * PARTS) + at, inside, 0)
        low = tl.reshape(word, [ROWS, GROUPS, PARTS]).to(tl.uint32, bitcast=True)
        high = low >> 12
        group = first + tl.arange(0, GROUPS)
        inside = (row[:, None] < rows) & (group[None, :] < groups)
        at = row[:, None] * groups + group[None, :]
        factor = tl.load(scale + at, inside, 0.0).to(tl.float32)[:, :, None]
        offset = tl.load(zero + at, inside, 0).to(tl.float32)[:, :, None]
        product = tl.zeros([ROWS, GROUPS, PARTS], tl.float32)
        for nibble in tl.static_range(8):
            at = (group[:, None] * 8 + nibble) * PARTS + part
            number = tl.load(x + at, group[:, None] < groups, 0.0).to(tl.float32)
            number *= 1.0 / (1 << place_of(nibble))
            source = low if nibble < 5 else high
            bits = source & (15 << place_of(nibble)) | two_to_23
            value = bits.to(tl.float32, bitcast=True)
            # Both are whole numbers below 2^24: exact.
            value -= 8388608.0 + (1 << place_of(nibble)) * offset
            product += value * number[None, :, :]
        total += factor * product
    result = tl.sum(tl.sum(total, axis=2), axis=1)
    tl.store(y + row, result, row < rows)


@torch.library.custom_op("ml_studies::matrix_vector_int4", mutates_args=())
def matrix_vector_op(words: Tensor, scale: Tensor, zero: Tensor, x: Tensor) -> Tensor:
    """One number a row, in the dtype of `x`."""
    rows, groups, parts = words.shape
    y = torch.empty(rows, dtype=x.dtype, device=x.device)
    # Programmatic dependent launch came with Hopper.
    early = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    if rows:
        launch(
            matrix_vector_kernel,
            (ceil_divide(rows, ROWS),),
            words,
            scale,
            zero,
            x.contiguous(),
            y,
            TWO_TO_23,
            rows,
            groups,
            ROWS=ROWS,
            GROUPS=GROUPS,
            PARTS=parts,
            EARLY=early,
            num_warps=WARPS,
            launch_pdl=early,
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
    types |= dict.fromkeys(("two_to_23", "rows", "groups"), "i32")
    constants = {"ROWS": ROWS, "GROUPS": GROUPS, "PARTS": 16, "EARLY": True}
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
