"""Every word of every narrow format, and many float32 values, against torch's and ml_dtypes' casts.

Compared are words, bit for bit. Only a NaN may have any payload: the libraries differ there, torch
even between its vectorized loop and that loop's last elements.
"""

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from implementations.precision.formats import (
    BF16,
    E4M3,
    E5M2,
    FORMATS,
    FP16,
    FP32,
    TF32,
    Format,
    decode,
    encode,
    nearest_even,
    rounded,
    stochastic,
    toward_zero,
)

TORCH = {
    FP32: torch.float32,
    FP16: torch.float16,
    BF16: torch.bfloat16,
    E4M3: torch.float8_e4m3fn,
    E5M2: torch.float8_e5m2,
}
NUMPY = {
    FP32: np.float32,
    FP16: np.float16,
    BF16: ml_dtypes.bfloat16,
    E4M3: ml_dtypes.float8_e4m3fn,
    E5M2: ml_dtypes.float8_e5m2,
}
NARROW = (FP16, BF16, E4M3, E5M2)
AMOUNTS = [1_000_000, pytest.param(10_000_000, marks=pytest.mark.full)]
CHUNK = 1_000_000

by_name = {"ids": lambda value: getattr(value, "name", None)}


def every_word(source: Format) -> torch.Tensor:
    return torch.arange(2**source.bits)


def torch_words(x: torch.Tensor, target: Format) -> torch.Tensor:
    integer = {8: torch.uint8, 16: torch.int16, 32: torch.int32}[target.bits]
    return x.to(TORCH[target]).view(integer).to(torch.int64) & (1 << target.bits) - 1


def numpy_words(x: torch.Tensor, target: Format) -> torch.Tensor:
    with np.errstate(all="ignore"):  # it warns of overflows and NaNs, which are meant here
        narrow = x.numpy().astype(NUMPY[target])
    return torch.from_numpy(narrow.view(f"u{target.bits // 8}").astype(np.int64))


def float32_values(count: int, target: Format, seed: int) -> torch.Tensor:
    """Random words: half with any exponent, half with one near the target's range; a third of them
    ties or numbers of the target, made by clearing the bits below the first that is dropped."""
    generator = torch.Generator().manual_seed(seed)
    word = torch.randint(0, 2**32, (count,), generator=generator)
    smallest = FP32.bias - target.bias - target.fraction_bits - 2
    near = torch.randint(
        max(smallest, 0), FP32.bias + target.bias + 3, (count // 2,), generator=generator
    )
    word[: count // 2] = word[: count // 2] & 0x807FFFFF | near.clamp(max=255) << 23
    word[::3] &= -1 << max(22 - target.fraction_bits, 0)
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, target.largest, target.smallest]
    special += [target.smallest / 2, -target.smallest / 2, target.smallest_normal]
    return torch.cat([word.to(torch.int32).view(torch.float32), torch.tensor(special)])


def differing(got: torch.Tensor, want: torch.Tensor, target: Format) -> int:
    """How many words differ, where both are NaN not counted."""
    both_nan = decode(got, target).isnan() & decode(want, target).isnan()
    return ((got != want) & ~both_nan).sum().item()


@pytest.mark.parametrize("source", NARROW, **by_name)
def test_every_word_decodes_as_in_torch_and_ml_dtypes(source):
    words = every_word(source)
    ours = decode(words, source)
    unsigned = words.numpy().astype(f"u{source.bits // 8}")
    integer = torch.uint8 if source.bits == 8 else torch.int16
    torchs = words.to(integer).view(TORCH[source]).float()
    with np.errstate(all="ignore"):
        numpys = torch.from_numpy(unsigned.view(NUMPY[source]).astype(np.float32))
    for theirs in (torchs, numpys):
        assert torch.equal(ours.isnan(), theirs.isnan())
        numbers = ~ours.isnan()
        assert torch.equal(ours[numbers].view(torch.int32), theirs[numbers].view(torch.int32))


@pytest.mark.parametrize("target", FORMATS, **by_name)
def test_every_word_survives_the_way_back(target):
    """Under each rounding: what the format holds has nothing to round."""
    words = every_word(target) if target.bits < 32 else torch.randint(0, 2**32, (100_000,))
    values = decode(words, target)
    for rounding in (nearest_even, toward_zero, stochastic()):
        assert differing(encode(values, target, rounding=rounding), words, target) == 0


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("target", NARROW, **by_name)
def test_float32_is_cast_as_by_torch_and_ml_dtypes(target, amount):
    for seed in range(amount // CHUNK):
        x = float32_values(CHUNK, target, seed)
        words = encode(x, target)
        assert differing(words, numpy_words(x, target), target) == 0
        # Past e4m3fn's range torch's releases disagree, some saturate: there ml_dtypes is asked.
        inside = x.abs() <= target.largest if target is E4M3 else torch.ones_like(x).bool()
        assert differing(words[inside], torch_words(x[inside], target), target) == 0


@pytest.mark.parametrize("amount", AMOUNTS)
def test_float32_stays_float32(amount):
    for seed in range(amount // CHUNK):
        x = float32_values(CHUNK, FP32, seed)
        assert differing(encode(x, FP32), torch_words(x, FP32), FP32) == 0
        assert torch.equal(rounded(x, FP32).nan_to_num(), x.nan_to_num())


@pytest.mark.parametrize("amount", AMOUNTS)
def test_tf32_rounds_as_torch_rounds_to_fp16(amount):
    """tf32 has fp16's fraction: moved into fp16's range by a power of two, its numbers are fp16's,
    the subnormal ones too."""
    for seed in range(amount // CHUNK):
        x = float32_values(CHUNK, TF32, seed).double()
        exponent = torch.frexp(x).exponent.clamp(min=2 - TF32.bias).double()  # |x| < 2^exponent
        finite = x.isfinite()
        # In [0.5, 1) · 2^-13, where fp16's normal numbers begin; tf32's subnormals lie below.
        lift = torch.exp2(2 - FP16.bias - exponent)
        want = ((x * lift).half().double() / lift)[finite]
        got = rounded(x.float(), TF32)[finite].double()
        want = torch.where(want.abs() > TF32.largest, torch.sign(want) * torch.inf, want)
        assert torch.equal(got, want)
        assert torch.equal(rounded(x.float(), TF32)[~finite].isnan(), x[~finite].isnan())


@pytest.mark.parametrize("target", (FP16, BF16, E4M3, E5M2), **by_name)
def test_saturation_is_a_clamp_before_the_cast(target):
    x = float32_values(100_000, target, 0)
    clamped = x.clamp(-target.largest, target.largest)  # keeps NaN
    for theirs in (torch_words, numpy_words):
        assert differing(encode(x, target, saturate=True), theirs(clamped, target), target) == 0
    assert not decode(encode(x[~x.isnan()], target, saturate=True), target).isnan().any()


@pytest.mark.parametrize("target", NARROW, **by_name)
def test_the_properties_are_torchs_finfo(target):
    info = torch.finfo(TORCH[target])
    assert (target.largest, target.smallest_normal) == (info.max, info.smallest_normal)
    assert (target.epsilon, target.bits) == (info.eps, info.bits)
    assert target.smallest == np.float64(ml_dtypes.finfo(NUMPY[target]).smallest_subnormal)


# Worked by hand from the definition: sign, exponent field, fraction field.
BY_HAND = [
    (1.0, FP16, 0b0_01111_0000000000),
    (-2.0, BF16, 0b1_10000000_0000000),
    (2.0**-24, FP16, 1),  # the smallest subnormal
    (2.0**-25, FP16, 0),  # half of it: a tie, to even
    (3 * 2.0**-25, FP16, 2),  # one and a half of it: a tie, to even
    (2.0**-14 - 2.0**-25, FP16, 0b0_00001_0000000000),  # a subnormal that rounds to normal
    (65519.0, FP16, 0b0_11110_1111111111),  # below half way past the largest
    (65520.0, FP16, 0b0_11111_0000000000),  # half way: infinity
    (1.0625, E4M3, 0b0_0111_000),  # a tie between 1 and 1.125
    (1.1875, E4M3, 0b0_0111_010),  # a tie between 1.125 and 1.25
    (1.9375, E4M3, 0b0_1000_000),  # a tie that carries into the exponent
    (464.0, E4M3, 0b0_1111_110),  # half way past 448, whose last bit is even
    (464.1, E4M3, 0b0_1111_111),  # NaN
    (torch.inf, E4M3, 0b0_1111_111),  # e4m3fn has no infinity
    (-torch.inf, E5M2, 0b1_11111_00),
    (1 + 2.0**-11, TF32, 0b0_01111111_0000000000),
    (1 + 3 * 2.0**-11, TF32, 0b0_01111111_0000000010),
]


@pytest.mark.parametrize("value, target, word", BY_HAND, **by_name)
def test_words_by_hand(value, target, word):
    assert encode(torch.tensor(value), target).item() == word


@pytest.mark.parametrize("target", (TF32, *NARROW), **by_name)
def test_toward_zero_keeps_the_leading_bits(target):
    """The word that nearest_even chose, or the one before it where that lies beyond the value."""
    x = float32_values(100_000, target, 1)
    x = x[x.isfinite() & (x.abs() <= target.largest)]
    down, near = encode(x, target, rounding=toward_zero), encode(x, target)
    farther = rounded(x, target).abs() > x.abs()
    assert torch.equal(down, near - farther.long())
    assert farther.any() and not farther.all()


@pytest.mark.parametrize("where", ["normal", "subnormal"])
@pytest.mark.parametrize("target", (TF32, *NARROW), **by_name)
def test_stochastic_rounding_goes_up_as_often_as_it_should(target, where):
    """Counts of 200,000 draws within 5 standard deviations: a false alarm in 1.7 million."""
    draws, generator = 200_000, torch.Generator().manual_seed(1)
    # A word with neighbours on both sides, and a quarter, or an eighth, of the way to the next one.
    word = 3 if where == "subnormal" else (target.bias << target.fraction_bits) + 1
    low, high = decode(torch.tensor([word, word + 1]), target).double()
    for share in (0.25, 0.125):
        x = (low + share * (high - low)).float()
        for signed in (x, -x):
            got = rounded(signed.expand(draws), target, rounding=stochastic(generator)).double()
            ups = (got.abs() == high).sum().item()
            assert ups + (got.abs() == low).sum().item() == draws
            deviation = math.sqrt(draws * share * (1 - share))
            assert abs(ups - draws * share) < 5 * deviation


def test_stochastic_rounding_of_next_to_nothing():
    """2^-30 of the smallest subnormal hardly ever rises; an eighth of it does one time in eight."""
    generator, draws = torch.Generator().manual_seed(2), 80_000
    tiny = torch.full((draws,), E4M3.smallest * 2.0**-30)
    assert not rounded(tiny, E4M3, rounding=stochastic(generator)).any()
    eighth = torch.full((draws,), E4M3.smallest / 8)
    rises = (rounded(eighth, E4M3, rounding=stochastic(generator)) > 0).sum().item()
    assert abs(rises - draws / 8) < 5 * math.sqrt(draws * 7 / 64)


def test_narrow_inputs_shapes_and_emptiness():
    x = torch.randn(2, 1, 3)
    assert torch.equal(encode(x.bfloat16(), E5M2), encode(x.bfloat16().float(), E5M2))
    assert encode(x, FP16).shape == x.shape and encode(x.mT, FP16).shape == x.mT.shape
    assert torch.equal(encode(x.mT, FP16), encode(x, FP16).mT)
    assert encode(torch.empty(0, 4), BF16).shape == (0, 4)
    assert rounded(torch.empty(0), BF16).shape == (0,)


def test_what_would_be_rounded_twice_is_refused(unchecked):
    for x in (torch.ones(2).double(), torch.ones(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="a cast starts from float32"):
            encode(x, BF16)
