"""Streaming attention: the mask by hand and by transformers, the output by a cache that evicts."""

from functools import partial

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sliding_window_overlay

from implementations.attention.streaming import attention_streaming, window_mask
from implementations.attention_basic import attention_naive
from implementations.lab.compare import assert_same_function
from implementations.models.decoder import Decoder, DecoderConfig

# queries, keys, window, sinks: ones, odd sizes, a window longer than the text, overlapping sinks
SIZES = [
    (1, 1, 1, 0),
    (63, 63, 16, 4),
    (5, 63, 16, 4),
    (1, 63, 7, 1),
    (17, 17, 40, 3),
    (9, 11, 3, 20),
]


def draw(queries: int, keys: int, heads: int = 4, key_heads: int = 2) -> list[Tensor]:
    sizes = (heads, queries), (key_heads, keys), (key_heads, keys)
    return [torch.randn(2, h, tokens, 16, dtype=torch.float64) for h, tokens in sizes]


def evicting(query: Tensor, key: Tensor, value: Tensor, window: int, sinks: int) -> Tensor:
    """A loop over the queries, each reading a cache that was cut down after every token."""
    queries, keys = query.shape[-2], key.shape[-2]
    cache: list[int] = []
    rows = []
    for token in range(keys):
        cache.append(token)
        if token >= keys - queries:
            row = query[:, :, token - (keys - queries), None]
            rows.append(attention_naive(row, key[:, :, cache], value[:, :, cache]))
        recent = cache[-(window - 1) :] if window > 1 else []
        cache = [kept for kept in cache if kept < sinks or kept in recent]
    return torch.cat(rows, -2)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_a_cache_that_evicts(size):
    """Outputs and gradients are those of a rolling cache that keeps the first keys."""
    queries, keys, window, sinks = size
    assert_same_function(
        partial(attention_streaming, window=window, sinks=sinks),
        partial(evicting, window=window, sinks=sinks),
        *draw(queries, keys),
    )


def test_mask_by_hand():
    """A window of 3 and 2 sinks, and the same for the last 2 of 7 tokens."""
    rows = ["1......", "11.....", "111....", "1111...", "11111..", "11.111.", "11..111"]
    expected = torch.tensor([[letter == "1" for letter in row] for row in rows])
    assert window_mask(7, 7, window=3, sinks=2).equal(expected)
    assert window_mask(2, 7, window=3, sinks=2).equal(expected[-2:])


@pytest.mark.parametrize("window", [1, 2, 5, 9, 10])
def test_the_window_is_transformers(window):
    """Without sinks it is the sliding window of Mistral, which counts the query's token too."""
    near = sliding_window_overlay(window)
    expected = torch.tensor(
        [
            [near(0, 0, q, k) and causal_mask_function(0, 0, q, k) for k in range(9)]
            for q in range(9)
        ]
    )
    assert window_mask(9, 9, window).equal(expected)


@pytest.mark.parametrize("queries, keys, window, sinks", SIZES)
def test_every_query_sees_window_and_sinks_or_all_there_is(queries, keys, window, sinks):
    position = torch.arange(keys - queries, keys)
    seen = window_mask(queries, keys, window, sinks).sum(-1)
    assert seen.equal((position + 1).clamp(max=window + sinks))


@pytest.mark.parametrize("window, sinks", [(9, 0), (40, 3), (1, 9), (5, 4)])
def test_a_window_that_holds_the_text_is_causal_attention(window, sinks):
    """window >= keys, or sinks that close the gap."""
    streaming = partial(attention_streaming, window=window, sinks=sinks)
    assert_same_function(streaming, partial(attention_naive, causal=True), *draw(5, 9))


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_another_mask_is_obeyed_besides(kind):
    other = torch.rand(9, 11) > 0.3 if kind == "boolean" else torch.randn(9, 11).double()
    both = torch.zeros(9, 11).double().masked_fill(~window_mask(9, 11, 4, 2), -torch.inf)
    both = both.masked_fill(~other, -torch.inf) if kind == "boolean" else both + other
    assert_same_function(
        partial(attention_streaming, window=4, sinks=2, mask=other, scale=0.3),
        partial(attention_naive, mask=both, scale=0.3),
        *draw(9, 11),
    )


def test_a_decoder_reads_no_further_than_its_windows_and_sinks():
    """Two layers: the last logits see the last 2 · (window - 1) + 1 tokens, and the sinks."""
    config = DecoderConfig(vocabulary=50, width=16, layers=2, heads=2, hidden=32, positions=32)
    decoder = Decoder(config, partial(attention_streaming, window=4, sinks=1)).double()
    tokens = torch.randint(49, (1, 20))

    def moved(place: int) -> bool:
        changed = tokens.clone()
        changed[0, place] = 49
        return not decoder(changed)[0, -1].equal(decoder(tokens)[0, -1])

    assert [place for place in range(20) if moved(place)] == [0, *range(13, 20)]


def test_bad_input_is_a_sentence(unchecked):
    query, key, value = draw(5, 9)
    with pytest.raises(ValueError, match="at least the query's own token, got 0"):
        attention_streaming(query, key, value, window=0, sinks=4)
    with pytest.raises(ValueError, match="the number of sinks is at least 0, got -1"):
        attention_streaming(query, key, value, window=4, sinks=-1)
    with pytest.raises(ValueError, match="causal must be True"):
        attention_streaming(query, key, value, window=4, sinks=1, causal=False)
    with pytest.raises(ValueError, match="causal attention needs queries <= keys, got 9 > 5"):
        window_mask(9, 5, window=4)
    with pytest.raises(ValueError, match="a mask is Boolean or added"):
        attention_streaming(query, key, value, window=4, sinks=1, mask=torch.ones(5, 9).int())
