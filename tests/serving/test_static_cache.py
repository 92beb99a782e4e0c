"""Passes of one shape against the growing cache and against no cache; compiled, and as a graph."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from implementations.attention.vendor import attention_sdpa
from implementations.models.decoder import Decoder, DecoderConfig
from implementations.serving.kv_cache import CachedDecoder, KeyValueCache
from implementations.serving.static_cache import StaticCache, StaticDecoder
from implementations.text.sampling import generate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LLAMA = DecoderConfig(
    vocabulary=97, width=32, layers=2, heads=4, hidden=80, positions=64, key_value_heads=2
)
SAME = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def spread(config: DecoderConfig = LLAMA, **options) -> Decoder:
    """Float64 weights large enough that attention is far from uniform."""
    decoder = Decoder(config, **options).double().to(DEVICE)
    for parameter in decoder.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return decoder.eval()


def room(decoder: Decoder, batch: int, capacity: int = 40) -> KeyValueCache:
    """A cache whose memory is NaN where nothing was written."""
    cache = decoder.empty_cache(batch, capacity)
    for layer in cache.layers:
        layer.key.fill_(torch.nan)
        layer.value.fill_(torch.nan)
    return cache


@pytest.mark.parametrize("position", ["rotary", "none"])
@pytest.mark.parametrize("attention", [None, attention_sdpa], ids=["naive", "torch"])
def test_static_passes_equal_no_cache(position, attention):
    """A prompt, tokens one by one to the end of the slab."""
    options = {} if attention is None else {"attention": attention}
    decoder = spread(replace(LLAMA, position=position), **options)
    tokens = torch.randint(97, (3, 40), device=DEVICE)
    cache = room(decoder, 3)
    static = StaticDecoder(decoder, cache)
    pieces = [static(piece, cache) for piece in tokens.split([7] + [1] * 33, 1)]
    assert_close(torch.cat(pieces, 1), decoder(tokens), **SAME)
    assert cache.length == 40


def test_several_tokens_a_pass():
    """As when a guess of three tokens is verified."""
    decoder, tokens = spread(), torch.randint(97, (2, 13), device=DEVICE)
    cache = room(decoder, 2)
    decoder(tokens[:, :4], cache)
    static = StaticCache(cache, attention_sdpa, new=3)
    pieces = []
    for start in (4, 7, 10):
        static.seek(start)
        pieces.append(decoder(tokens[:, start : start + 3], static))
    assert_close(torch.cat(pieces, 1), decoder(tokens)[:, 4:], **SAME)


def check_rollback(**options):
    """Read, roll back, read on: what stands after the text in the slab is not seen."""
    decoder, (first, second) = spread(), torch.randint(97, (2, 2, 12), device=DEVICE)
    second[:, :5] = first[:, :5]
    cache = room(decoder, 2)
    static = StaticDecoder(decoder, cache, **options)
    for tokens, start in ((first, 0), (second, 5), (first, 3)):
        cache.truncate(start)
        got = [static(tokens[:, i, None], cache).clone() for i in range(start, 12)]
        assert_close(torch.cat(got, 1), decoder(tokens)[:, start:], **SAME)


def test_after_rolling_back_nothing_is_left():
    check_rollback()


@pytest.mark.cuda
def test_a_captured_graph_follows_the_text():
    check_rollback(graph=True)


def check_greedy(**options):
    decoder, prompts = spread(), torch.randint(97, (40, 5), device=DEVICE)
    cache = room(decoder, 40, 25)
    static = CachedDecoder(StaticDecoder(decoder, cache, **options), cache)
    assert torch.equal(generate(static, prompts, 20), generate(decoder, prompts, 20))


def test_greedy_text_is_the_same():
    check_greedy()


@pytest.mark.cuda
def test_greedy_text_of_a_captured_graph_is_the_same():
    check_greedy(graph=True)


# torch 2.11 decorates functions of its own compiler with it, when that is first used.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compiled_whole_and_once(unchecked):
    """One graph without breaks serves every step: a second compilation is an error."""
    whole = partial(torch.compile, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        check_greedy(compiled=whole)
        torch._dynamo.reset()


def test_what_cannot_be_static_is_a_sentence(unchecked):
    decoder = spread()
    cache = room(decoder, 1, 8)
    static = StaticDecoder(decoder, cache)
    tokens = torch.zeros(1, 8, dtype=torch.long, device=DEVICE)
    with pytest.raises(ValueError, match="the cache that it was made with"):
        static(tokens, room(decoder, 1, 8))
    static(tokens, cache)
    with pytest.raises(ValueError, match="room for 8 tokens, not for 9"):
        static(tokens[:, :1], cache)
    assert cache.length == 8
    with pytest.raises(ValueError, match="room for 8 tokens, not for 0"):
        static.static.seek(-1)
    for new in (0, 9):
        with pytest.raises(ValueError, match=f"a pass reads 1 to 8 tokens here, got {new}"):
            StaticCache(cache, attention_sdpa, new)
    with pytest.raises(ValueError, match="not learned ones"):
        learned = spread(replace(LLAMA, position="learned"))
        StaticDecoder(learned, room(learned, 1))
    with pytest.raises(ValueError, match="reads 64 tokens, the cache holds 65"):
        StaticDecoder(decoder, room(decoder, 1, 65))
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="needs a cache on a GPU, got cpu"):
            StaticDecoder(decoder, cache, graph=True)
