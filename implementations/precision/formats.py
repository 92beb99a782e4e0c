"""Floating-point formats, bit by bit: which numbers each has, and how a value becomes one of them.

    word  = sign | exponent field e | fraction field f of F bits
    value = (-1)^sign · 2^(e - bias) · (1 + f / 2^F)     e > 0: normal
          = (-1)^sign · 2^(1 - bias) · f / 2^F           e = 0: subnormal, evenly spaced to zero
    bias  = 2^(exponent bits - 1) - 1

A cast keeps the first F + 1 bits of the significand and looks at those that it drops: up, or not?

    nearest_even   up if they are more than half a spacing; at exactly half, to the even neighbour
    stochastic     up with probability (what is dropped) / spacing: right on average
    toward_zero    never: every sum of positive numbers drifts down

The largest exponent field means infinity (f = 0) and NaN, except in e4m3fn: it has no infinity, one
NaN (all ones), and spends the rest of that field on numbers up to 448. Everything here is integer
arithmetic on float32's bits; no float is added or multiplied.

Paper   Micikevicius et al. 2022 (fp8), arXiv:2209.05433; the others: IEEE 754-2019
Shapes  any; codes are int64, a word in the lowest bits
Run     uv run python implementations/precision/formats.py
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor


class Format(NamedTuple):
    """A sign, an exponent field and a fraction field."""

    name: str
    exponent_bits: int
    fraction_bits: int
    has_infinity: bool = True

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.fraction_bits

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def overflow(self) -> int:
        """The positive code past the largest number: infinity, or e4m3fn's NaN."""
        ones = 2**self.exponent_bits - 1
        return ones << self.fraction_bits if self.has_infinity else 2 ** (self.bits - 1) - 1

    @property
    def nan(self) -> int:
        """The quiet NaN: infinity with the first fraction bit set."""
        return self.overflow | 1 << (self.fraction_bits - 1)

    @property
    def largest(self) -> float:
        return decode(torch.tensor(self.overflow - 1), self).item()

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def smallest(self) -> float:
        """The smallest subnormal, which is the spacing of all of them."""
        return 2.0 ** (1 - self.bias - self.fraction_bits)

    @property
    def epsilon(self) -> float:
        """The spacing just above one; rounding is off by at most half of it, relatively."""
        return 2.0**-self.fraction_bits


FP32 = Format("fp32", 8, 23)
TF32 = Format("tf32", 8, 10)  # what a tensor core reads of a float32
FP16 = Format("fp16", 5, 10)
BF16 = Format("bf16", 8, 7)
E4M3 = Format("e4m3fn", 4, 3, has_infinity=False)
E5M2 = Format("e5m2", 5, 2)
FORMATS = (FP32, TF32, FP16, BF16, E4M3, E5M2)

Codes = Int64[Tensor, "*shape"]
Rounding = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(kept bits, dropped bits, their spacing) -> True where the kept bits go up by one"""

# A shift within int64 that drops all 24 bits of any significand. Under it the chance that
# stochastic rounding moves a tiny number up is too large by less than 2^24 / 2^62.
LONGEST_SHIFT = 62


def nearest_even(kept: Codes, dropped: Codes, unit: Codes) -> Bool[Tensor, "*shape"]:
    """To the nearer neighbour; a tie goes to the one whose last bit is zero."""
    return (2 * dropped > unit) | ((2 * dropped == unit) & (kept % 2 == 1))


def toward_zero(kept: Codes, dropped: Codes, unit: Codes) -> Bool[Tensor, "*shape"]:
    """The dropped bits are forgotten."""
    return torch.zeros_like(kept, dtype=torch.bool)


def stochastic(generator: torch.Generator | None = None) -> Rounding:
    """A rounding that goes up with probability dropped / unit: the mean of many is the value."""

    def up(kept: Codes, dropped: Codes, unit: Codes) -> Bool[Tensor, "*shape"]:
        noise = torch.empty_like(kept).random_(0, 2**LONGEST_SHIFT, generator=generator)
        return noise % unit < dropped

    return up


def encode(
    x: Float[Tensor, "*shape"],
    target: Format,
    *,
    rounding: Rounding = nearest_even,
    saturate: bool = False,
) -> Int64[Tensor, "*shape"]:
    """The words of `x` in a format; what is too large becomes its infinity, or e4m3fn's NaN.

    Args:
        saturate: what is too large becomes the largest number instead, infinity too; NaN stays.

    Raises:
        ValueError: `x` is wider than float32, so that it would be rounded twice.
    """
    if not x.is_floating_point() or x.dtype == torch.float64:
        raise ValueError(f"a cast starts from float32 or a narrower float, got {x.dtype}")
    word = x.float().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    sign, exponent, fraction = word >> 31, word >> 23 & 0xFF, word & 0x7FFFFF
    significand = fraction + (torch.sign(exponent) << 23)  # with the leading one, if normal
    field = exponent.clamp(min=1) - FP32.bias + target.bias
    # Below the smallest normal number the field stays at one and the significand gives way.
    shift = (23 - target.fraction_bits + (1 - field).clamp(min=0)).clamp(max=LONGEST_SHIFT)
    unit = torch.ones_like(shift) << shift
    kept, dropped = significand >> shift, significand & (unit - 1)
    kept = kept + rounding(kept, dropped, unit)
    # The leading one counts as one exponent, so a carry out of the fraction lands where it should.
    code = kept + (field.clamp(min=1) - 1 << target.fraction_bits)
    code = code.clamp(max=target.overflow - 1 if saturate else target.overflow)
    is_nan = (exponent == 0xFF) & (fraction > 0)
    return torch.where(is_nan, target.nan, code) | sign << (target.bits - 1)


def decode(code: Int64[Tensor, "*shape"], source: Format) -> Float32[Tensor, "*shape"]:
    """The values of a format's words. All six formats are parts of float32, so this is exact."""
    bits = source.fraction_bits
    sign, magnitude = code >> (source.bits - 1), code & (1 << source.bits - 1) - 1
    field, fraction = magnitude >> bits, magnitude & (1 << bits) - 1
    significand = fraction + (torch.sign(field) << bits)
    exponent = field.clamp(min=1) - source.bias + FP32.bias
    for _ in range(bits):  # most subnormal numbers are normal in float32
        lift = ((significand < 1 << bits) & (exponent > 1)).to(torch.int64)
        significand, exponent = significand << lift, exponent - lift
    word = (significand << 23 - bits) + (exponent - 1 << 23)
    word = torch.where(significand == 0, 0, word)
    is_nan = magnitude > source.overflow if source.has_infinity else magnitude == source.overflow
    word = torch.where(source.has_infinity & (magnitude == source.overflow), FP32.overflow, word)
    word = torch.where(is_nan, FP32.nan, word) | sign << 31
    return word.to(torch.int32).view(torch.float32)


def rounded(
    x: Float[Tensor, "*shape"],
    target: Format,
    *,
    rounding: Rounding = nearest_even,
    saturate: bool = False,
) -> Float32[Tensor, "*shape"]:
    """`x` as the format holds it, read back. Arguments and errors are those of `encode`."""
    return decode(encode(x, target, rounding=rounding, saturate=saturate), target)


def main() -> None:
    print(f"{'':8}bits  {'largest':>10}{'normal from':>13}{'smallest':>10}{'epsilon':>10}   π")
    pi = torch.tensor(torch.pi)
    for source in FORMATS:
        word = f"{encode(pi, source).item():0{source.bits}b}"
        split = 1 + source.exponent_bits
        print(
            f"{source.name:8}{source.bits:4}  {source.largest:10.3g}{source.smallest_normal:13.1e}"
            f"{source.smallest:10.1e}{source.epsilon:10.1e}   {rounded(pi, source).item():.7f}"
            f" = {word[0]} {word[1:split]} {word[split:]}"
        )
    tenth, spacing = torch.full((100_000,), 1.1), BF16.epsilon
    for name, rounding in {"nearest": nearest_even, "stochastic": stochastic()}.items():
        mean = rounded(tenth, BF16, rounding=rounding).double().mean()
        print(f"1.1 in bf16, {name}: off by {(mean - tenth[0]) / spacing:+.3f} spacings on average")


if __name__ == "__main__":
    main()
