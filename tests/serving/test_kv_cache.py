"""A cached decoder against the same decoder without a cache, and against transformers' cache."""

from dataclasses import replace

import pytest
import safetensors.torch
import torch
from torch.testing import assert_close
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from implementations.attention.multi_head import MultiHeadAttention
from implementations.attention.vendor import attention_sdpa
from implementations.models.decoder import Decoder, DecoderConfig
from implementations.serving.kv_cache import CachedDecoder, KeyValueCache, LayerCache
from implementations.text.sampling import generate

LLAMA = DecoderConfig(
    vocabulary=97, width=32, layers=2, heads=4, hidden=80, positions=64, key_value_heads=2
)
GPT2 = replace(
    LLAMA,
    key_value_heads=None,
    norm="layer",
    position="learned",
    feed_forward="gelu",
    bias=True,
)
STYLES = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "one key head": replace(LLAMA, key_value_heads=1),
    "no positions": replace(LLAMA, position="none"),
}
SAME = {"rtol": 1e-10, "atol": 1e-10}


def spread(decoder: Decoder) -> Decoder:
    """Float64 weights large enough that attention is far from uniform."""
    for parameter in decoder.double().parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return decoder.eval()


@pytest.fixture(params=STYLES)
def decoder(request) -> Decoder:
    return spread(Decoder(STYLES[request.param]))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def in_pieces(decoder: Decoder, tokens: torch.Tensor, pieces: list[int], cache: KeyValueCache):
    """The logits of a text that is read in pieces."""
    assert sum(pieces) == tokens.shape[1]
    return torch.cat([decoder(piece, cache) for piece in tokens.split(pieces, dim=1)], dim=1)


@pytest.mark.parametrize(
    "pieces", [[40], [1] * 40, [39, 1], [1, 39], [7, 16, 1, 1, 15]], ids=lambda p: f"{len(p)}"
)
def test_cached_equals_uncached(decoder, pieces):
    """In pieces of any size, with a slab that the text fills or does not."""
    tokens = torch.randint(97, (3, 40))
    for capacity in (40, 64):
        cache = decoder.empty_cache(3, capacity)
        assert_close(in_pieces(decoder, tokens, pieces, cache), decoder(tokens), **SAME)
        assert cache.length == 40


def test_other_attention_of_the_same_signature_is_cached_too():
    ours, vendor = spread(Decoder(LLAMA)), Decoder(LLAMA, attention_sdpa).double()
    vendor.load_state_dict(ours.state_dict())
    tokens = torch.randint(97, (2, 9))
    cached = in_pieces(vendor, tokens, [5, 1, 3], vendor.empty_cache(2, 9))
    assert_close(cached, ours(tokens), **SAME)


def test_what_is_truncated_leaves_no_trace(decoder):
    """Read, roll back, read something else: as if only the second text had been read."""
    first, second = torch.randint(97, (2, 1, 20))
    second[:, :8] = first[:, :8]
    cache = decoder.empty_cache(1, 20)
    decoder(first, cache)
    cache.truncate(8)
    assert_close(decoder(second[:, 8:], cache), decoder(second)[:, 8:], **SAME)
    cache.truncate(0)
    assert_close(decoder(first, cache), decoder(first), **SAME)


def test_forks_grow_apart(decoder):
    """One prompt of two texts, continued in three caches by turns, each as if it were alone."""
    prompt, rows = torch.randint(97, (2, 6)), torch.tensor([1, 0, 1])
    cache = decoder.empty_cache(2, 11)
    decoder(prompt, cache)
    branches = [
        (cache, prompt, torch.randint(97, (2, 5))),
        (cache.fork(), prompt, torch.randint(97, (2, 5))),
        (cache.fork(rows), prompt[rows], torch.randint(97, (3, 5))),
    ]
    first = [decoder(tail[:, :2], branch) for branch, _, tail in branches]
    second = [decoder(tail[:, 2:], branch) for branch, _, tail in branches]
    for (_, start, tail), *got in zip(branches, first, second, strict=True):
        expected = decoder(torch.cat((start, tail), 1))[:, 6:]
        assert_close(torch.cat(got, 1), expected, **SAME)


def test_greedy_text_is_the_same(decoder):
    """Forty prompts: token for token what the decoder writes that reads everything again."""
    prompts = torch.randint(97, (40, 5))
    cached = CachedDecoder(decoder, decoder.empty_cache(40, 25))
    assert torch.equal(generate(cached, prompts, 20), generate(decoder, prompts, 20))


def test_each_token_is_read_once():
    """And what two texts share is not read again, but for the last token of the second."""
    decoder, lengths = spread(Decoder(LLAMA)), []

    def counted(tokens, cache):
        lengths.append(tokens.shape[1])
        return decoder(tokens, cache)

    cached = CachedDecoder(counted, decoder.empty_cache(1, 30))
    text = generate(cached, torch.randint(97, (1, 7)), 4)
    assert lengths == [7, 1, 1, 1]
    changed = text.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 97
    # generate never read its own last token; then a new text, a text again, and a shorter one.
    for tokens, length in ((text, 1), (changed, 6), (changed, 1), (changed[:, :3], 1)):
        lengths.clear()
        got = cached(tokens)
        assert lengths == [length]
        assert_close(got, decoder(tokens)[:, -length:], **SAME)


def test_an_interrupted_pass_spoils_nothing():
    """Stopped between two layers, the first of which has the tokens already."""
    decoder = spread(Decoder(LLAMA))
    cached = CachedDecoder(decoder, decoder.empty_cache(1, 12))
    first, second = torch.randint(97, (2, 1, 12))
    second[:, :4] = first[:, :4]
    cached(first)
    stop = decoder.blocks[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cached(second)
    stop.remove()
    for tokens in (first, second):
        got = cached(tokens)
        assert_close(got, decoder(tokens)[:, -got.shape[1] :], **SAME)


def test_logits_and_text_equal_transformers_cache(tmp_path):
    """The same weights in transformers' Llama, read in the same pieces with its DynamicCache."""
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=80,
            max_position_embeddings=64,
            rms_norm_eps=LLAMA.epsilon,
            rope_theta=LLAMA.rotary_base,
            tie_word_embeddings=True,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    ours = spread(Decoder(LLAMA))
    ours.save(tmp_path / "ours.safetensors")
    state = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    theirs.double().eval().load_state_dict(state, strict=False)
    theirs.tie_weights()
    tokens, pieces = torch.randint(97, (2, 40)), [7, 16, 1, 1, 15]
    cache = DynamicCache()
    expected = [
        theirs(piece, past_key_values=cache, use_cache=True).logits
        for piece in tokens.split(pieces, dim=1)
    ]
    ours_cache = ours.empty_cache(2, 40)
    got = in_pieces(ours, tokens, pieces, ours_cache)
    # transformers computes rotary angles in float32: 2e-6 in the angle at position 40.
    scale = got.abs().max().item()
    assert (got - torch.cat(expected, 1)).abs().max() < 1e-5 * scale
    for layer, other in zip(ours_cache.layers, cache.layers, strict=True):
        assert_close(layer.key, other.keys, rtol=0, atol=1e-5 * scale)
        assert_close(layer.value, other.values, rtol=0, atol=1e-5 * scale)
    written = theirs.generate(
        tokens[:, :6], attention_mask=torch.ones(2, 6), max_new_tokens=20, do_sample=False
    )
    cached = CachedDecoder(ours, ours.empty_cache(2, 26))
    assert torch.equal(generate(cached, tokens[:, :6], 20), written)


def test_a_cache_is_as_wide_as_its_keys():
    """Grouped heads share keys, and the cache keeps each once, in the weights' dtype."""
    cache = Decoder(LLAMA).to(torch.bfloat16).empty_cache(3, 10)
    assert [tuple(layer.key.shape) for layer in cache.layers] == [(3, 2, 10, 8)] * 2
    assert cache.layers[0].value.dtype == torch.bfloat16
    assert Decoder(GPT2).empty_cache(1, 10).layers[1].value.shape == (1, 4, 10, 8)


def keys(tokens: int, batch: int = 1, heads: int = 2, dim: int = 4, **like) -> torch.Tensor:
    return torch.randn(batch, heads, tokens, dim, **like)


@pytest.mark.parametrize(
    "key, value, sentence",
    [
        (keys(4), keys(4), "room for 5 tokens, not for 6"),
        (keys(1, batch=2), keys(1), r"keys of shape \(1, 2, 1, 4\), got \(2, 2, 1, 4\)"),
        (keys(1), keys(1, heads=4), r"values of shape \(1, 2, 1, 4\), got \(1, 4, 1, 4\)"),
        (keys(2), keys(1), r"values of shape \(1, 2, 2, 4\), got \(1, 2, 1, 4\)"),
        (keys(1).double(), keys(1), "keys in torch.float32 on cpu, got torch.float64 on cpu"),
        (keys(1), keys(1, device="meta"), "values in torch.float32 on cpu, got .* on meta"),
        (keys(1, requires_grad=True), keys(1), "under torch.no_grad"),
    ],
)
def test_what_does_not_fit_is_a_sentence_and_writes_nothing(key, value, sentence, unchecked):
    cache = LayerCache(keys(5), keys(5))
    cache.append(keys(2), keys(2))
    before = cache.key.clone(), cache.value.clone()
    with pytest.raises(ValueError, match=sentence):
        cache.append(key, value)
    assert cache.length == 2
    assert torch.equal(cache.key, before[0]) and torch.equal(cache.value, before[1])


def test_other_mistakes_are_sentences(unchecked):
    decoder = Decoder(LLAMA)
    cache = decoder.empty_cache(1, 70)
    decoder(torch.zeros(1, 60, dtype=torch.long), cache)
    five = torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="at most 64 tokens, got 65"):
        decoder(five, cache)
    for length in (-1, 61):
        with pytest.raises(ValueError, match=f"holds 60 tokens, it cannot keep {length}"):
            cache.truncate(length)
    with pytest.raises(ValueError, match="has 1 layers, the model 2"):
        decoder(five[:, :1], KeyValueCache(cache.layers[:1]))
    with pytest.raises(ValueError, match="sizes of 1 or more"):
        decoder.empty_cache(0, 5)
    with pytest.raises(ValueError, match="at least one token"):
        CachedDecoder(decoder, cache)(five[:, :0])
    with torch.enable_grad(), pytest.raises(ValueError, match=r"torch\.no_grad"):
        decoder(five, decoder.empty_cache(1, 5))
    layer = MultiHeadAttention(8, 2)
    with pytest.raises(ValueError, match="cannot serve a context"):
        layer(torch.randn(1, 3, 8), torch.randn(1, 2, 8), cache=cache.layers[0])
    assert cache.length == 60
