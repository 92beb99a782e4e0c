"""Block formats against gguf, which reads our bytes, against torch's fake quantization, by hand."""

import gguf
import numpy as np
import pytest
import torch

from implementations.precision.block_quantization import (
    dequantize,
    pack_nibbles,
    quantize,
    unpack_nibbles,
)

Q4_1, Q8_0 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0


def uneven(*shape: int) -> torch.Tensor:
    """Weights whose groups of 32 differ in size and centre; one in a hundred is an outlier."""
    x = torch.randn(*shape) * torch.exp2(torch.randint(-6, 3, (*shape[:-1], 1)))
    x = x + torch.randn(*shape[:-1], 1)
    return torch.where(torch.rand(shape) < 0.01, 20 * x, x)


def as_bytes(x: torch.Tensor) -> np.ndarray:
    """Each group's numbers as bytes: [..., groups, n]."""
    return x.numpy().view(np.uint8)


def test_gguf_reads_our_8_bits():
    stored = quantize(uneven(40, 256), 8, 32, symmetric=True)
    signed = (stored.words.to(torch.int16) - 128).to(torch.int8)
    block = np.concatenate([as_bytes(stored.scale[..., None]), as_bytes(signed)], -1)
    theirs = gguf.dequantize(block.reshape(40, -1), Q8_0)
    assert torch.equal(dequantize(stored), torch.from_numpy(theirs))


def test_8_bits_are_never_farther_than_ggufs():
    """The same scales; gguf rounds for a scale not yet in fp16, so some of its words are off."""
    x = uneven(200, 256)
    stored = quantize(x, 8, 32, symmetric=True)
    blocks = gguf.quantize(x.numpy(), Q8_0).reshape(200, 8, 34)
    assert np.array_equal(as_bytes(stored.scale[..., None]), blocks[..., :2])
    theirs = torch.from_numpy(gguf.dequantize(blocks.reshape(200, -1), Q8_0))
    ours, gguf_error = (dequantize(stored) - x).abs(), (theirs - x).abs()
    # What float32 leaves open at a tie: a division's rounding, at words up to 127.
    slack = 128 * 2.0**-23 * stored.scale.float().repeat_interleave(32, -1)
    assert (ours <= gguf_error + slack).all()
    assert ((ours - gguf_error).abs() <= slack).float().mean() > 0.9  # mostly the same words


def test_gguf_reads_our_4_bits():
    """Weights on a grid of 16, at both of its ends: their words, scale and zero come back exactly.

    Q4_1 keeps the minimum, -scale · zero, in fp16: exact with a scale of 7 bits.
    """
    rows, groups = 50, 8
    words = torch.randint(0, 16, (rows, groups, 32))
    words[..., 5], words[..., 20] = 0, 15
    zero = torch.randint(0, 16, (rows, groups))
    scale = torch.randint(64, 128, (rows, groups)) * torch.exp2(-torch.randint(6, 12, (groups,)))
    x = (scale[..., None] * (words - zero[..., None])).flatten(-2)
    stored = quantize(x, 4, 32)
    assert torch.equal(stored.scale, scale.half()) and torch.equal(stored.zero.long(), zero)
    assert torch.equal(dequantize(stored), x)
    minimum = (-scale * zero).half()
    parts = [as_bytes(part[..., None]) for part in (stored.scale, minimum)]
    block = np.concatenate([*parts, stored.words.numpy()], -1)
    theirs = gguf.dequantize(block.reshape(rows, -1), Q4_1)
    assert torch.equal(torch.from_numpy(theirs), x)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [2, 32, 96])
def test_equals_torchs_fake_quantization(group, bits, symmetric):
    """Given our scales and zeros, torch's values; but where a weight is a tie within rounding."""
    x = uneven(30, 192)
    stored = quantize(x, bits, group, symmetric=symmetric)
    rows, scale = x.reshape(-1, group), stored.scale.float().flatten()
    theirs = torch.fake_quantize_per_channel_affine(
        rows, scale, stored.zero.int().flatten(), 0, 0, 2**bits - 1
    )
    part = (rows.double() / scale.double()[:, None]).remainder(1)
    tie = (part - 0.5).abs() < 256 * 2.0**-23
    assert torch.equal(dequantize(stored).reshape(-1, group)[~tie], theirs[~tie])
    assert tie.float().mean() < 0.01


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_no_weight_is_off_by_more_than_half_a_scale(bits, symmetric):
    """Half, and at a clamped end what fp16 takes from the scale: 2^-11 of up to 2^bits words."""
    x = uneven(100, 256)
    stored = quantize(x, bits, 32, symmetric=symmetric)
    scale = stored.scale.float().repeat_interleave(32, -1)
    assert ((dequantize(stored) - x).abs() <= (0.5 + 2.0 ** (bits - 11)) * scale).all()
    sizes = groups_range(x, symmetric) / (2**bits - 1 - symmetric)
    assert torch.allclose(stored.scale.float(), sizes, rtol=2.0**-10)


def groups_range(x, symmetric):
    """From end to end of what a group's words must reach."""
    groups = torch.cat([x.unflatten(-1, (-1, 32)), torch.zeros(*x.shape[:-1], 8, 1)], -1)
    return 2 * groups.abs().amax(-1) if symmetric else groups.amax(-1) - groups.amin(-1)


def test_words_by_hand():
    """-1 to 2 in 15 steps of 0.2: zero is word 5. Kept in fp16 the scale is 0.19995."""
    stored = quantize(torch.tensor([-1.0, 0.0, 0.31, 2.0]), 4, 4)
    assert stored.zero.tolist() == [5] and stored.scale.item() == pytest.approx(0.2, rel=2.0**-11)
    assert unpack_nibbles(stored.words).tolist() == [[0, 5, 7, 15]]
    assert stored.words.tolist() == [[0 | 7 << 4, 5 | 15 << 4]]
    symmetric = quantize(torch.tensor([-1.0, 0.0, 0.31, 1.75]), 4, 4, symmetric=True)
    assert symmetric.scale.tolist() == [0.25]
    assert unpack_nibbles(symmetric.words).tolist() == [[4, 8, 9, 15]]


def test_every_byte_unpacks_and_packs():
    packed = torch.arange(256, dtype=torch.uint8)
    words = unpack_nibbles(packed)
    assert words.tolist() == [b % 16 for b in range(256)] + [b // 16 for b in range(256)]
    assert torch.equal(pack_nibbles(words), packed)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_constants_and_nothing(bits, symmetric):
    back = lambda x: dequantize(quantize(x, bits, 4, symmetric=symmetric))  # noqa: E731
    assert not back(torch.zeros(2, 8)).any()
    assert not back(torch.full((1, 8), 1e-9)).any()  # less than fp16 can scale
    for constant in (3.0, -3.0):
        assert torch.allclose(back(torch.full((8,), constant)), torch.tensor(constant), rtol=1e-3)
    mixed = torch.tensor([0.0, 5.0, -0.3, 0.0])
    assert back(mixed)[0] == back(mixed)[3] == 0
    assert back(torch.empty(0, 8)).shape == (0, 8)
    assert back(torch.randn(2, 3, 8).bfloat16()).shape == (2, 3, 8)


def test_a_scale_among_fp16s_subnormals_stays_within_its_words():
    """1.49 smallest numbers become one: 22 steps of it are needed, and 15 there are."""
    smallest = 2.0**-24
    stored = quantize(torch.tensor([-15 * 1.49 * smallest, 0.0]), 4, 2)
    assert stored.scale.tolist() == [smallest] and stored.zero.tolist() == [15]
    assert dequantize(stored).tolist() == [-15 * smallest, 0.0]


BAD = {
    "bits": (torch.ones(8), 5, 4, "8, 4, 3 or 2 bits"),
    "width": (torch.ones(9), 8, 4, "do not fill"),
    "no group": (torch.ones(8), 8, 0, "do not fill"),
    "odd group": (torch.ones(9), 4, 3, "even"),
    "infinite": (torch.tensor([1.0, torch.inf]), 8, 2, "infinite or NaN"),
    "NaN": (torch.tensor([1.0, torch.nan]), 8, 2, "infinite or NaN"),
    "scale": (torch.tensor([1.0, 3e38]), 8, 2, "passes fp16"),
    "range": (torch.tensor([-3e38, 3e38]), 8, 2, "passes fp16"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_refused(case):
    weight, bits, group, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        quantize(weight, bits, group)
