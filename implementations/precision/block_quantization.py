"""Weights in 8 to 2 bits: neighbours share a scale, and each keeps a small whole number.

    weight ≈ scale · (word - zero)            word = round(weight / scale) + zero, within its bits

    symmetric   scale = max |weight| / (2^(bits-1) - 1)     zero = 2^(bits-1)
    affine      scale = (max - min) / (2^bits - 1)          zero = round(-min / scale)

The affine range always includes zero, so that zero stays exactly zero. A group's scale is kept in
fp16, as ggml does, and the words are rounded for the scale that is kept. Two words of 4 bits share
a byte: the first half of a group lies in the low nibbles, the second half in the high ones, so that
both halves are read in order.

Format  ggml's Q8_0 and Q4_1 (which keeps min in fp16 in the place of zero)
Fast    block_quantization_triton.py: 4 bits times a vector, each byte read once
Shapes  weight [..., group · k]    words [..., k, group]    scale, zero [..., k]
Run     uv run python implementations/precision/block_quantization.py
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float16, Float32, UInt8
from torch import Tensor


class Quantized(NamedTuple):
    """Weights as stored."""

    words: UInt8[Tensor, "*batch groups bytes"]
    """two a byte where they have 4 bits, else one"""
    scale: Float16[Tensor, "*batch groups"]
    zero: UInt8[Tensor, "*batch groups"]
    """the word that means zero"""
    bits: int


def quantize(
    weight: Float[Tensor, "*batch width"], bits: int, group: int = 32, *, symmetric: bool = False
) -> Quantized:
    """Round each weight to the nearest word of its group. A group of zeros keeps a scale of zero.

    Raises:
        ValueError: bits other than 8, 4, 3 and 2, a width that groups do not fill, an odd group of
            4 bits, weights that are not finite, or a scale past fp16's 65,504.
    """
    check(weight, bits, group)
    groups = weight.float().unflatten(-1, (-1, group))
    scale, zero = grid(groups, bits, symmetric=symmetric)
    return assembled(nearest_words(groups, scale, zero, bits), scale, zero, bits)


def grid(
    groups: Float[Tensor, "*groups group"], bits: int, *, symmetric: bool = False
) -> tuple[Float16[Tensor, "*groups"], Float[Tensor, "*groups"]]:
    """The scale of each group, as fp16 keeps it, and the word that means zero.

    Raises:
        ValueError: a scale past fp16's 65,504.
    """
    highest = 2**bits - 1
    if symmetric:
        scale = groups.abs().amax(-1) / (2 ** (bits - 1) - 1)
    else:
        # Divided first, since the difference alone may pass float32's end.
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = high / highest - low / highest
    scale = scale.half()
    if scale.isinf().any():
        raise ValueError(f"a scale passes fp16's 65504: weights go up to {groups.abs().max()}")
    if symmetric:
        return scale, torch.full_like(scale, 2 ** (bits - 1), dtype=groups.dtype)
    return scale, torch.round(-low / divisor(scale, groups.dtype)).clamp(0, highest)


def divisor(scale: Float16[Tensor, "*groups"], dtype: torch.dtype) -> Float[Tensor, "*groups"]:
    """The scale; infinity for a scale of zero: the weights are zero, or less than fp16 can scale,
    and all words are zero's."""
    return torch.where(scale > 0, scale.to(dtype), torch.inf)


def nearest_words(
    groups: Float[Tensor, "*groups group"],
    scale: Float16[Tensor, "*groups"],
    zero: Float[Tensor, "*groups"],
    bits: int,
) -> Float[Tensor, "*groups group"]:
    """Each weight's word, as a float."""
    words = torch.round(groups / divisor(scale, groups.dtype)[..., None]) + zero[..., None]
    return words.clamp(0, 2**bits - 1)


def assembled(words: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Quantized:
    """Words that are floats, as they are stored."""
    words = words.to(torch.uint8)
    return Quantized(pack_nibbles(words) if bits == 4 else words, scale, zero.to(torch.uint8), bits)


def dequantize(quantized: Quantized) -> Float32[Tensor, "*batch width"]:
    """scale · (word - zero), in float32."""
    words, scale, zero, bits = quantized
    if bits == 4:
        words = unpack_nibbles(words)
    centred = words.float() - zero.float()[..., None]
    return (scale.float()[..., None] * centred).flatten(-2)


def matrix_vector(quantized: Quantized, x: Float[Tensor, " width"]) -> Float[Tensor, "*batch"]:
    """The dequantized weights times a vector, in float32 or wider, returned in the dtype of `x`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (dequantize(quantized).to(wide) @ x.to(wide)).to(x.dtype)


def stored_bytes(quantized: Quantized) -> float:
    """What the words take when packed, with 3 bytes a group: an fp16 scale and the zero.

    Words of 3 and 2 bits lie one a byte here, for reading; a file would pack them as those of 4.
    """
    each = 2 if quantized.bits == 4 else 1
    return quantized.words.numel() * each * quantized.bits / 8 + 3 * quantized.scale.numel()


def pack_nibbles(words: UInt8[Tensor, "*batch group"]) -> UInt8[Tensor, "*batch bytes"]:
    """Two words below 16 a byte: the first half of the last axis low, the second half high."""
    low, high = words.chunk(2, -1)
    return low | high << 4


def unpack_nibbles(packed: UInt8[Tensor, "*batch bytes"]) -> UInt8[Tensor, "*batch group"]:
    """The words of `pack_nibbles`."""
    return torch.cat([packed & 15, packed >> 4], -1)


def check(weight: Tensor, bits: int, group: int) -> None:
    """Raise ValueError unless `quantize` can do what it is asked."""
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"weights are quantized to 8, 4, 3 or 2 bits, got {bits}")
    if group < 1 or weight.shape[-1] % group:
        raise ValueError(f"groups of {group} do not fill a width of {weight.shape[-1]}")
    if bits == 4 and group % 2:
        raise ValueError(f"two words of 4 bits share a byte, so a group is even, got {group}")
    if not weight.isfinite().all():
        raise ValueError("a weight is infinite or NaN, and would spoil its whole group")


def main() -> None:
    from implementations.sources.weights import minilm_weights

    name = "encoder.layer.0.intermediate.dense.weight"
    weight = minilm_weights()[name]
    print(f"MiniLM's {name}, {list(weight.shape)}: root mean square error over that of the weight")
    print(f"{'':18}" + "".join(f"group {group:<6}" for group in (16, 32, 128)))
    for bits in (8, 4):
        for symmetric in (True, False):
            errors = []
            for group in (16, 32, 128):
                stored = dequantize(quantize(weight, bits, group, symmetric=symmetric))
                errors.append(((stored - weight).square().mean() / weight.square().mean()).sqrt())
            label = f"int{bits} {'symmetric' if symmetric else 'affine'}"
            print(f"{label:18}" + "".join(f"{error.item():<12.2%}" for error in errors))


if __name__ == "__main__":
    main()
