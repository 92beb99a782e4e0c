"""Positions against formulas worked by hand, complex numbers, Llama, GPT-J, GGUF and BLOOM."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama

from implementations.attention.multi_head import MultiHeadAttention
from implementations.attention.positions import (
    LearnedPositions,
    alibi_bias,
    alibi_slopes,
    convert_projection,
    half_split_to_interleaved,
    interleaved_to_half_split,
    rotate_half_split,
    rotate_interleaved,
    sinusoidal_positions,
)
from implementations.attention_basic import attention_naive, attention_weights

LAYOUTS = pytest.mark.parametrize("rotate", [rotate_interleaved, rotate_half_split])
SAME = {"rtol": 1e-10, "atol": 1e-12}  # one function in float64; atol for values that cancel
FLOAT32 = torch.finfo(torch.float32).eps


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def rotate_as_complex(x, positions, base=10000.0):
    """Interleaved rotation as the paper derives it: (first + i second) · exp(i p f)."""
    frequency = torch.tensor(
        [base ** (-2 * i / x.shape[-1]) for i in range(x.shape[-1] // 2)], dtype=torch.float64
    )
    turn = torch.polar(torch.ones(()).double(), positions.double()[:, None] * frequency)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


# --- Sinusoids and learned tables


@pytest.mark.parametrize(("width", "base"), [(2, 10000.0), (6, 10000.0), (64, 500.0)])
def test_every_sinusoid_is_the_papers_element(width, base):
    table = sinusoidal_positions(257, width, base, dtype=torch.float64)
    for position in (0, 1, 63, 256):
        for i in range(width // 2):
            angle = position / base ** (2 * i / width)
            want = torch.tensor([math.sin(angle), math.cos(angle)], dtype=torch.float64)
            assert_close(table[position, 2 * i : 2 * i + 2], want, **SAME)


def test_a_shift_is_one_linear_map_of_all_positions():
    """Section 3.5: P[p + shift] is a linear function of P[p], here written out as rotations."""
    table, shift = sinusoidal_positions(300, 8, dtype=torch.float64), 43
    angles = [shift / 10000.0 ** (2 * i / 8) for i in range(4)]
    maps = [[[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]] for a in angles]
    linear = torch.block_diag(*torch.tensor(maps, dtype=torch.float64))
    assert_close(table[:-shift] @ linear.mT, table[shift:], **SAME)


def test_narrow_sinusoids_are_the_exact_ones_rounded_once():
    exact = sinusoidal_positions(5000, 10, dtype=torch.float64)
    assert sinusoidal_positions(5000, 10).dtype == torch.float32
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(sinusoidal_positions(5000, 10, dtype=dtype), exact.to(dtype))


def test_learned_positions_add_the_rows_of_an_embedding():
    ours, theirs, x = LearnedPositions(9, 6), nn.Embedding(9, 6), torch.randn(3, 5, 6)
    ours.load_state_dict({"table": theirs.weight.detach()})
    assert torch.equal(ours(x), x + theirs(torch.arange(5)))
    upstream = torch.randn(3, 5, 6)
    ours(x).backward(upstream)
    (x + theirs(torch.arange(5))).backward(upstream)
    assert_close(ours.table.grad, theirs.weight.grad)


# --- Rotary positions


@pytest.mark.parametrize("dim", [2, 16, 66])
@pytest.mark.parametrize("tokens", [0, 1, 63])
@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_interleaved_is_complex_multiplication(dim, tokens, base):
    x = random(2, 3, tokens, dim)
    want = rotate_as_complex(x, torch.arange(tokens), base)
    assert_close(rotate_interleaved(x, base=base), want, **SAME)


@pytest.mark.parametrize("tokens", [1, 63, 257])
def test_half_split_is_llamas(tokens):
    """Transformers takes its angles in float32: each is off by its size times an epsilon or two."""
    x = random(2, 3, tokens, 16, dtype=torch.float32)
    config = LlamaConfig(hidden_size=48, num_attention_heads=3, head_dim=16, rope_theta=500.0)
    rotary = modeling_llama.LlamaRotaryEmbedding(config)
    cos, sin = rotary(x, torch.arange(tokens)[None])
    want, _ = modeling_llama.apply_rotary_pos_emb(x, x, cos, sin)
    limit = 2 * FLOAT32 * tokens * x.abs().max().item()
    assert_close(rotate_half_split(x, base=500.0), want, rtol=0, atol=limit)


def test_half_split_is_llamas_to_the_last_digit_when_given_float64_angles():
    x = random(2, 3, 63, 16)
    angle = torch.arange(63).double()[:, None] * 10000.0 ** -(torch.arange(8).double() / 8)
    cos, sin = (torch.cat((y, y), -1)[None] for y in (angle.cos(), angle.sin()))
    want, _ = modeling_llama.apply_rotary_pos_emb(x, x, cos, sin)
    assert_close(rotate_half_split(x), want, **SAME)


def test_interleaved_is_gpt_js():
    """GPT-J, too, takes its angles in float32, and puts heads after tokens."""
    x = random(2, 63, 3, 16, dtype=torch.float32)
    sin, cos = modeling_gptj.create_sinusoidal_positions(63, 16).chunk(2, -1)
    want = modeling_gptj.apply_rotary_pos_emb(x, sin[None], cos[None]).transpose(1, 2)
    limit = 2 * FLOAT32 * 63 * x.abs().max().item()
    assert_close(rotate_interleaved(x.transpose(1, 2)), want, rtol=0, atol=limit)


@LAYOUTS
def test_scores_depend_on_the_distance_alone(rotate):
    """The same 7 queries and 7 keys 100 tokens later. Unit vectors, angles below 107: 1e-12 is 40
    roundings of the largest angle."""
    query, key = nn.functional.normalize(random(2, 7, 16), dim=-1)
    early, late = (
        rotate(query, p) @ rotate(key, p).mT for p in (torch.arange(7) + s for s in (0, 100))
    )
    assert (late - early).abs().max() < 1e-12
    assert (early - query @ key.mT).abs().max() > 0.1


@LAYOUTS
def test_norms_stay_and_position_zero_is_the_identity(rotate):
    x = random(2, 63, 10)
    assert_close(rotate(x).norm(dim=-1), x.norm(dim=-1), **SAME)
    assert torch.equal(rotate(x)[:, 0], x[:, 0])


@LAYOUTS
def test_a_later_segment_is_a_slice_of_the_whole(rotate):
    """What a key-value cache relies on."""
    x = random(2, 12, 10)
    assert_close(rotate(x[:, 7:], torch.arange(5) + 7), rotate(x)[:, 7:], **SAME)
    assert_close(rotate(x[:, 7:], torch.arange(5.0) + 7), rotate(x)[:, 7:], **SAME)


@LAYOUTS
def test_positions_need_no_order(rotate):
    """Negative, repeated and fractional places, against the definition."""
    x, places = random(4, 6), torch.tensor([-3.0, 2.5, 2.5, 1000.0])
    convert = interleaved_to_half_split if rotate is rotate_half_split else torch.clone
    assert_close(rotate(convert(x), places), convert(rotate_as_complex(x, places)), **SAME)


@LAYOUTS
def test_rotation_has_the_gradient_of_its_outputs(rotate):
    assert torch.autograd.gradcheck(rotate, random(2, 3, 6).requires_grad_())


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_inputs_get_wide_angles(rotate, dtype):
    """At position 4095 the result is the exact one, rounded once. An angle in float32 is off by up
    to 4095 epsilons, an eighth of bfloat16's rounding; one in bfloat16 could be any angle."""
    x, place = random(64, 1, 16).to(dtype), torch.tensor([4095])
    rotated, exact = rotate(x, place), rotate(x.double(), place)
    assert rotated.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2 * exact.abs()
    angle = 4095 * FLOAT32 * x.double().norm(dim=-1, keepdim=True)
    assert ((rotated.double() - exact).abs() <= rounding + angle).all()


# --- From one layout to the other


def test_the_order_of_channels_by_hand():
    assert interleaved_to_half_split(torch.arange(6.0)).tolist() == [0, 2, 4, 1, 3, 5]
    assert half_split_to_interleaved(torch.arange(6.0)).tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_layouts_convert_to_the_bit(dtype):
    x = random(2, 3, 63, 10, dtype=dtype)
    assert torch.equal(half_split_to_interleaved(interleaved_to_half_split(x)), x)
    there = interleaved_to_half_split(rotate_interleaved(x))
    assert torch.equal(rotate_half_split(interleaved_to_half_split(x)), there)
    back = half_split_to_interleaved(rotate_half_split(x))
    assert torch.equal(rotate_interleaved(half_split_to_interleaved(x)), back)


@pytest.mark.parametrize("bias", [True, False])
def test_converted_projections_make_the_same_layer(bias):
    """4 query heads on 2 key heads, trained interleaved and read half split."""
    trained = MultiHeadAttention(24, 4, 2, bias=bias, rotate=rotate_interleaved).double()
    state = trained.state_dict()
    for name, heads in {"query": 4, "key": 2}.items():
        for kind in ("weight", "bias") if bias else ("weight",):
            kept = state[f"{name}.{kind}"]
            state[f"{name}.{kind}"] = convert_projection(kept, heads, interleaved_to_half_split)
    ours = MultiHeadAttention(24, 4, 2, bias=bias, rotate=rotate_half_split).double()
    ours.load_state_dict(state)
    x = random(2, 13, 24)
    want = trained(x, causal=True)
    assert_close(ours(x, causal=True), want, **SAME)
    ours.load_state_dict(trained.state_dict())
    assert (ours(x, causal=True) - want).abs().max() > 1e-3, "unconverted weights must not fit"


def test_converted_projections_are_what_transformers_reads_from_gguf():
    weight = torch.randn(24, 5)
    want = LlamaTensorProcessor()._reverse_permute_weights(weight.numpy(), 4, 3)
    ours = convert_projection(weight, 3, interleaved_to_half_split)
    assert np.array_equal(ours.numpy(), want)
    assert torch.equal(convert_projection(ours, 3, half_split_to_interleaved), weight)


# --- ALiBi


def test_alibi_table_by_hand():
    """2 heads have slopes 1/16 and 1/256; 2 queries stand at the last 2 of 4 keys."""
    distance = torch.tensor([[2.0, 1.0, 0.0, 1.0], [3.0, 2.0, 1.0, 0.0]])
    assert torch.equal(alibi_bias(2, 2, 4), torch.stack((-distance / 16, -distance / 256)))


def test_alibi_slopes_of_the_paper_and_its_code():
    """Section 3: 1/2 to 1/256 for 8 heads. For 12, its code adds 4 of the 8 between them."""
    eight = [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(8).tolist() == eight
    more = torch.tensor(eight + [2.0 ** -(h - 0.5) for h in range(1, 5)], dtype=torch.float64)
    assert_close(alibi_slopes(12, torch.float64), more, **SAME)


@pytest.mark.parametrize("heads", [1, 3, 8, 12, 16])
def test_alibi_is_blooms_under_the_softmax(heads):
    """BLOOM adds slope · p_key, in float32: in each row it differs by a constant, which the softmax
    does not see."""
    theirs = build_alibi_tensor(torch.ones(1, 9, dtype=torch.long), heads, torch.float32)
    ours, seen = alibi_bias(heads, 5, 9), torch.ones(5, 9).tril(4).bool()
    shift = (theirs - ours).where(seen, torch.nan)
    assert_close(
        shift.nan_to_num(), shift[..., :1].where(seen, 0.0), rtol=4 * FLOAT32, atol=FLOAT32
    )
    query, key, value = random(heads, 5, 4), *random(2, heads, 9, 4)
    want = attention_naive(query, key, value, causal=True, mask=theirs.double())
    got = attention_naive(query, key, value, causal=True, mask=ours.double())
    assert_close(got, want, rtol=0, atol=100 * FLOAT32)


def test_alibi_prefers_what_is_near():
    """Equal keys: weights fall by exp(-slope) a step, on both sides of the query."""
    query, key = torch.zeros(2, 1, 3, 4).double(), torch.zeros(2, 1, 7, 4).double()
    weights = attention_weights(query, key, mask=alibi_bias(1, 3, 7, torch.float64))
    step = math.exp(-1 / 256)
    want = torch.tensor([step**2, step, 1, step, step**2], dtype=torch.float64)
    assert_close(weights[0, 0, 0, 2:] / weights[0, 0, 0, 4], want, **SAME)


# --- Bad input

BAD = {
    "odd sinusoids": (lambda: sinusoidal_positions(3, 5), "must be even, got 5"),
    "odd interleaved": (lambda: rotate_interleaved(torch.randn(2, 3)), "must be even, got 3"),
    "odd half split": (lambda: rotate_half_split(torch.randn(2, 3)), "must be even, got 3"),
    "odd conversion": (lambda: interleaved_to_half_split(torch.randn(3)), "must be even, got 3"),
    "odd way back": (lambda: half_split_to_interleaved(torch.randn(3)), "must be even, got 3"),
    "one place for all": (
        lambda: rotate_half_split(torch.randn(4, 2), torch.arange(1)),
        r"4 tokens need as many positions, got \[1\]",
    ),
    "too few places": (
        lambda: rotate_interleaved(torch.randn(4, 2), torch.arange(3)),
        r"4 tokens need as many positions, got \[3\]",
    ),
    "too long": (
        lambda: LearnedPositions(4, 2)(torch.randn(1, 5, 2)),
        "5 tokens do not fit into 4",
    ),
    "too narrow": (lambda: LearnedPositions(4, 2)(torch.randn(1, 3, 1)), "width 2, the tokens 1"),
    "uneven heads": (
        lambda: convert_projection(torch.randn(6, 2), 4, interleaved_to_half_split),
        "4 heads cannot share 6 rows",
    ),
    "odd heads": (
        lambda: convert_projection(torch.randn(6, 2), 2, interleaved_to_half_split),
        "must be even, got 3",
    ),
    "no head": (lambda: alibi_slopes(0), "at least one head, got 0"),
    "queries after the last key": (lambda: alibi_bias(2, 5, 4), "queries <= keys, got 5 > 4"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_a_sentence(name, unchecked):
    call, sentence = BAD[name]
    with pytest.raises(ValueError, match=sentence):
        call()
