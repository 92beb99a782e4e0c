"""FlashAttention by tiles: the equation and torch, summaries by hand, and the bytes it moves."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa

from implementations.attention.flash import (
    Traffic,
    flash_attention,
    flash_attention_with_log_sum_exp,
    main,
    merge,
    summarize,
)
from implementations.attention.streaming import window_mask
from implementations.attention_basic import attention_naive
from implementations.lab.compare import (
    assert_same_accuracy,
    assert_same_function,
    error,
    outputs_and_gradients,
)
from implementations.lab.memory import peak_bytes
from implementations.models.decoder import Decoder, DecoderConfig

# batch, heads, key heads, queries, keys, dim: ones, odd lengths and dims, groups of 1, 4 and 8,
# one tile, several, and a last one that is not full
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 2, 2, 63, 63, 17),
    (1, 8, 2, 5, 257, 64),
    (1, 8, 1, 130, 131, 33),
    (2, 3, 3, 1, 65, 80),
    (1, 4, 1, 64, 128, 16),
]
# A window of one key, one that ends inside a tile, one of a whole tile, one longer than the text
PATTERNS = {
    "full": {},
    "causal": {"causal": True},
    **{f"window {size}": {"causal": True, "window": size} for size in (1, 7, 64, 1000)},
}


def draw(batch, heads, key_heads, queries, keys, dim, dtype=torch.float64) -> list[Tensor]:
    """Random query, key and value of one shape."""
    sizes = [(heads, queries), (key_heads, keys), (key_heads, keys)]
    return [torch.randn(batch, h, tokens, dim, dtype=dtype) for h, tokens in sizes]


def visible(query: Tensor, key: Tensor, causal: bool = False, window: int | None = None):
    """The mask of a pattern, made by the file that streaming attention is tested with."""
    return window_mask(query.shape[-2], key.shape[-2], window or 10**6) if causal else None


def equation(query, key, value, scale=None, **pattern) -> Tensor:
    return attention_naive(query, key, value, mask=visible(query, key, **pattern), scale=scale)


def output_and_log_sum(query, key, value, **options) -> Tensor:
    """Both results side by side, so that both are compared, with gradients through both."""
    output, log_sum_exp = flash_attention_with_log_sum_exp(query, key, value, **options)
    return torch.cat([output, log_sum_exp[..., None]], -1)


def output_and_log_sum_by_torch(query, key, value, **pattern) -> Tensor:
    """The same by the equation: the log-sum-exp of the matrix of scores."""
    output = equation(query, key, value, **pattern)
    shared = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ shared.mT / query.shape[-1] ** 0.5
    mask = visible(query, key, **pattern)
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return torch.cat([output, scores.logsumexp(-1, keepdim=True)], -1)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_equation(shape, pattern):
    """Output, log-sum-exp and every gradient, under random upstream gradients for both."""
    assert_same_function(
        partial(output_and_log_sum, **PATTERNS[pattern]),
        partial(output_and_log_sum_by_torch, **PATTERNS[pattern]),
        *draw(*shape),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_equals_torch(shape, causal):
    """Torch's kernel, the last query standing at the last key."""
    bias = causal_lower_right(shape[3], shape[4])._materialize() if causal else None
    assert_same_function(
        partial(flash_attention, causal=causal, scale=0.3),
        partial(sdpa, attn_mask=bias, enable_gqa=True, scale=0.3),
        *draw(*shape),
    )


@pytest.mark.parametrize("tile", [(1, 1), (3, 5), (16, 4), (5, 64), (100, 100)], ids=str)
@pytest.mark.parametrize("pattern", ["full", "causal", "window 7"])
def test_the_size_of_a_tile_does_not_matter(tile, pattern):
    """Tiles of one row, tiles that do not divide the lengths, and one tile for all."""
    sizes = {"query_tile": tile[0], "key_tile": tile[1]}
    assert_same_function(
        partial(output_and_log_sum, **sizes, **PATTERNS[pattern]),
        partial(output_and_log_sum_by_torch, **PATTERNS[pattern]),
        *draw(1, 4, 2, 23, 31, 5),
    )


@pytest.mark.parametrize("pattern", ["full", "causal", "window 2"])
def test_gradcheck(pattern):
    """Both outputs by finite differences, in groups, queries < keys, several tiles."""
    options = {"window 2": {"causal": True, "window": 2}, **PATTERNS}[pattern]
    inputs = [x.requires_grad_() for x in draw(1, 2, 1, 3, 5, 3)]
    function = partial(
        flash_attention_with_log_sum_exp, query_tile=2, key_tile=2, scale=0.7, **options
    )
    assert torch.autograd.gradcheck(function, inputs)


def test_summaries_by_hand():
    """Scores ln 1, ln 2 | ln 8, ln 5: weights 1/16, 2/16, 8/16, 5/16, the largest coming late."""
    value = torch.tensor([16.0, 8.0, 2.0, 32.0], dtype=torch.float64)[:, None]
    scores = torch.tensor([[1.0, 2.0, 8.0, 5.0]], dtype=torch.float64).log()
    left = summarize(scores[:, :2], value[:2])
    right = summarize(scores[:, 2:], value[2:])
    as_floats = lambda summary: [part.item() for part in summary]  # noqa: E731
    ln2, ln8 = scores[0, 1].item(), scores[0, 2].item()
    assert as_floats(left) == pytest.approx([ln2, 1 / 2 + 1, 16 / 2 + 8])
    assert as_floats(right) == pytest.approx([ln8, 1 + 5 / 8, 2 + 32 * 5 / 8])
    both = merge(left, right)
    assert as_floats(both) == pytest.approx([ln8, 16 / 8, (16 + 16 + 16 + 160) / 8])
    assert (both.weighted / both.total).item() == pytest.approx(1 + 1 + 1 + 10)


def test_merging_is_associative_and_order_does_not_matter():
    """Scores far apart, some hidden, and in one summary whole rows of them."""
    scores = 30 * torch.randn(3, 5, 4, dtype=torch.float64)
    scores[0, :, :3] = scores[1, 2] = -torch.inf
    a, b, c = map(summarize, scores, torch.randn(3, 4, 2, dtype=torch.float64))
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=0)
    close(merge(merge(a, b), c), merge(a, merge(b, c)))
    close(merge(a, b), merge(b, a))
    whole = summarize(torch.cat([*scores], -1), torch.cat([torch.zeros(4, 2)] * 3).double())
    close(merge(merge(a, b), c).total, whole.total)


def test_hidden_keys_alone_add_nothing():
    nothing = summarize(torch.full((5, 4), -torch.inf).double(), torch.randn(4, 2).double())
    something = summarize(torch.randn(5, 4).double(), torch.randn(4, 2).double())
    for merged in (merge(nothing, something), merge(something, nothing)):
        torch.testing.assert_close(merged, something, rtol=0, atol=0)
    assert merge(nothing, nothing).total.count_nonzero() == 0


def test_scores_that_would_overflow():
    """Scores of thousands: exp of them is no number, their differences are."""
    query, key, value = draw(1, 2, 2, 5, 7, 16)
    assert_same_function(output_and_log_sum, output_and_log_sum_by_torch, 1e3 * query, key, value)


def test_a_hidden_key_does_not_matter():
    """However high it would score: a maximum over hidden scores too would leave weights of zero."""
    query, key, value = draw(1, 2, 2, 7, 9, 4)
    expected = flash_attention(query, key, value, causal=True, window=3, key_tile=4)
    for hidden in (8, 0):  # the future of all queries but the last, and long past for it
        moved = key.clone()
        moved[..., hidden, :] = 1e4 * query.sum(-2).sign()
        output = flash_attention(query, moved, value, causal=True, window=3, key_tile=4)
        unmoved = ~window_mask(7, 9, 3)[:, hidden]
        assert unmoved.sum() >= 6
        torch.testing.assert_close(output[:, :, unmoved], expected[:, :, unmoved])


def test_a_query_that_sees_nothing_gets_zeros_and_gives_no_gradient():
    """All its scores -inf: zeros and -inf, as the equation has it; no NaN in any gradient."""
    inputs = draw(1, 2, 2, 3, 4, 16)
    inputs[0][:, :, 1] = 0.0
    inputs[0][:, :, 1, 0] = -torch.inf
    inputs[1][..., 0] = inputs[1][..., 0].abs()
    options = {"query_tile": 2, "key_tile": 3}
    output, log_sum_exp = flash_attention_with_log_sum_exp(*inputs, **options)
    torch.testing.assert_close(output, attention_naive(*inputs), rtol=1e-10, atol=1e-12)
    assert output[..., 1, :].count_nonzero() == 0
    assert (log_sum_exp == -torch.inf).sum() == 2 and (log_sum_exp[..., 1] == -torch.inf).all()
    _, d_query, _, d_value = outputs_and_gradients(partial(output_and_log_sum, **options), inputs)
    assert d_query[..., [0, 2], :].isfinite().all() and d_value.isfinite().all()


def test_a_nan_stays_in_its_row():
    query, key, value = draw(1, 2, 2, 5, 6, 16)
    query[0, 1, 3, 2] = torch.nan
    output, log_sum_exp = flash_attention_with_log_sum_exp(query, key, value, key_tile=4)
    assert output.isnan().equal(attention_naive(query, key, value).isnan())
    assert log_sum_exp.isnan().sum() == 1


@pytest.mark.parametrize("pattern", ["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_narrow_inputs_are_widened(dtype, pattern):
    """At most twice as wrong as the equation, also where dquery is a sum of many tiles' parts."""
    assert_same_accuracy(
        partial(flash_attention, key_tile=8, **PATTERNS[pattern]),
        partial(equation, **PATTERNS[pattern]),
        *draw(2, 4, 2, 129, 129, 64, dtype=dtype),
    )
    _, log_sum_exp = flash_attention_with_log_sum_exp(*draw(1, 1, 1, 2, 2, 2, dtype=dtype))
    assert log_sum_exp.dtype == torch.float32


@pytest.mark.parametrize("batch", [(), (2, 3), (0,)], ids=str)
def test_any_number_of_batch_dimensions(batch):
    sizes = (4, 5), (2, 6), (2, 6)
    inputs = [torch.randn(*batch, *size, 8, dtype=torch.float64) for size in sizes]
    assert_same_function(flash_attention, attention_naive, *inputs)


def test_strided_inputs_and_a_value_of_another_width():
    """Views of [batch, position, head, dim], as a projection makes them."""
    query, key = (torch.randn(2, n, 4, 8, dtype=torch.float64).transpose(1, 2) for n in (5, 6))
    value = torch.randn(2, 11, 4, 6, dtype=torch.float64).permute(0, 2, 3, 1)
    assert_same_function(flash_attention, attention_naive, query, key, value)


# The bytes


def moved(*shape: int, backward: bool = False, **options) -> tuple[int, int]:
    """Numbers read and written, in units of one float64."""
    traffic = Traffic()
    inputs = [x.requires_grad_(backward) for x in draw(*shape)]
    output = flash_attention(*inputs, query_tile=2, key_tile=3, traffic=traffic, **options)
    if backward:
        traffic.read = traffic.written = 0
        output.backward(torch.randn_like(output))
    return traffic.read // 8, traffic.written // 8


def test_bytes_of_the_forward_by_hand():
    """4 queries in 2 tiles, 6 keys in 2 tiles, dim 5: keys and values pass once a query tile."""
    queries, keys = 4 * 5, 6 * 5
    assert moved(1, 1, 1, 4, 6, 5) == (queries + 2 * (2 * keys), queries + 4)
    # Causal: queries 0, 1 see the keys up to 3, queries 2, 3 all six.
    assert moved(1, 1, 1, 4, 6, 5, causal=True) == (queries + 2 * 5 * (4 + 6), queries + 4)
    # A window of 2: queries 0, 1 see keys 1 to 3, queries 2, 3 see keys 3 to 5.
    window = {"causal": True, "window": 2}
    assert moved(1, 1, 1, 4, 6, 5, **window) == (queries + 2 * 5 * (3 + 3), queries + 4)


def test_bytes_of_the_backward_by_hand():
    """Delta reads dO, O, dL; a key tile then reads query, dO, dquery, L and delta of all rows."""
    queries, keys = 4 * 5, 6 * 5
    read = (2 * queries + 4) + 2 * keys + 2 * (3 * queries + 2 * 4)
    written = 4 + 2 * queries + 2 * keys
    assert moved(1, 1, 1, 4, 6, 5, backward=True) == (read, written)
    # Causal: keys 0 to 2 are seen by all queries, keys 3 to 5 by queries 1, 2, 3 alone.
    read = (2 * queries + 4) + 2 * keys + (3 * 5 + 2) * (4 + 3)
    written = 4 + 5 * (4 + 3) + 2 * keys
    assert moved(1, 1, 1, 4, 6, 5, backward=True, causal=True) == (read, written)
    # A window of 2: keys 0 to 2 are seen by queries 0 and 1, keys 3 to 5 by queries 1, 2, 3.
    read = (2 * queries + 4) + 2 * keys + (3 * 5 + 2) * (2 + 3)
    written = 4 + 5 * (2 + 3) + 2 * keys
    window = {"causal": True, "window": 2}
    assert moved(1, 1, 1, 4, 6, 5, backward=True, **window) == (read, written)


def test_a_group_reads_its_keys_once():
    """Four heads on one key head: four times the queries, the keys of one head."""
    queries, keys = 4 * 5, 6 * 5
    assert moved(1, 4, 1, 4, 6, 5) == (4 * queries + 2 * 2 * keys, 4 * (queries + 4))


def test_narrow_tiles_are_counted_narrow():
    """bfloat16 travels as bfloat16, the log-sum-exp as float32."""
    traffic = Traffic()
    flash_attention(*draw(1, 1, 1, 4, 4, 8, dtype=torch.bfloat16), traffic=traffic)
    assert (traffic.read, traffic.written) == (3 * 4 * 8 * 2, 4 * 8 * 2 + 4 * 4)


@pytest.mark.parametrize("backward", [False, True])
def test_memory_is_linear_in_the_length(backward):
    """Twice the length, twice the memory; the equation needs four times as much."""

    def run(attention, *inputs):
        return outputs_and_gradients(attention, inputs) if backward else attention(*inputs)

    def growth(attention) -> float:
        inputs = [draw(1, 1, 1, length, length, 16) for length in (512, 1024)]
        small, large = (peak_bytes(partial(run, attention), *each) for each in inputs)
        return large / small

    tiled = partial(flash_attention, query_tile=128, key_tile=128)
    assert growth(tiled) < 2.05
    assert growth(attention_naive) > 3.8


# In a model, and refused


def test_a_decoder_takes_it():
    """Passed by name, it reads as the equation does."""
    config = DecoderConfig(
        vocabulary=50, width=16, layers=2, heads=4, key_value_heads=2, hidden=32, positions=99
    )
    naive, flash = Decoder(config).double(), Decoder(config, flash_attention).double()
    flash.load_state_dict(naive.state_dict())
    tokens = torch.randint(50, (2, 70))
    assert error(flash(tokens), naive(tokens)).largest < 1e-10


GOOD = draw(1, 4, 2, 3, 5, 8)
X = torch.randn
BAD = {
    "a mask": (GOOD, {"mask": torch.ones(3, 5) > 0}, "takes no mask"),
    "no head dimension": ([X(3, 8), X(5, 8), X(5, 8)], {}, "inputs are .*got query .3, 8."),
    "mixed dtypes": (
        [GOOD[0].float(), *GOOD[1:]],
        {},
        "one floating-point dtype, got torch.float32",
    ),
    "integers": ([x.int() for x in GOOD], {}, "one floating-point dtype, got torch.int32"),
    "other device": ([GOOD[0].to("meta"), *GOOD[1:]], {}, "on one device, got meta, cpu"),
    "batches": ([X(2, 4, 3, 8), X(1, 4, 3, 8), X(2, 4, 3, 8)], {}, "the same batch sizes"),
    "ranks": ([X(1, 4, 3, 8), X(4, 3, 8), X(4, 3, 8)], {}, "the same batch sizes"),
    "dims": ([X(1, 4, 3, 8), X(1, 4, 3, 7), X(1, 4, 3, 8)], {}, "have the same dim"),
    "values missing": ([X(1, 4, 3, 8), X(1, 4, 3, 8), X(1, 4, 2, 8)], {}, "every key has a value"),
    "value heads": ([X(1, 4, 3, 8), X(1, 4, 3, 8), X(1, 2, 3, 8)], {}, "every key has a value"),
    "no queries": ([X(1, 4, 0, 8), X(1, 4, 3, 8), X(1, 4, 3, 8)], {}, "at least one head, pos"),
    "no keys": ([X(1, 4, 3, 8), X(1, 4, 0, 8), X(1, 4, 0, 8)], {}, "at least one head, pos"),
    "no dim": ([X(1, 4, 3, 0)] * 3, {}, "at least one head, pos"),
    "groups": ([X(1, 4, 3, 8), X(1, 3, 3, 8), X(1, 3, 3, 8)], {}, "3 key heads cannot be shared"),
    "too many queries": (
        [GOOD[1], *[x[..., :3, :] for x in GOOD[1:]]],
        {"causal": True},
        "got 5 > 3",
    ),
    "window alone": (GOOD, {"window": 2}, "causal must be True"),
    "no window": (GOOD, {"window": 0, "causal": True}, "the query's own token, got 0"),
    "no tile": (GOOD, {"key_tile": 0}, "at least one row, got 64 and 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_sentence(case, unchecked):
    inputs, options, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        flash_attention(*inputs, **options)


def test_main_shows_errors_and_bytes(capsys):
    main()
    printed = capsys.readouterr().out
    assert printed.count("tokens: error") == 4 and "nan" not in printed
