"""The encoder against transformers' BertModel on MiniLM's real weights."""

import pytest
import torch
from transformers import BertConfig, BertModel

from implementations.attention_basic import attention_weights
from implementations.models import encoder
from implementations.models.encoder import Encoder, EncoderConfig, pad
from implementations.sources.text import bible_verses
from implementations.sources.weights import minilm_tokenizer, minilm_weights

ODD_TEXTS = [
    "",
    "a",
    "naïve café, Ångström, Übermut",
    "😀 👩‍👩‍👧 🇫🇷",
    "日本語の文章",
    "word " * 510,  # with [CLS] and [SEP]: exactly 512 tokens
    "\x00\x01 \t\n",
    "supercalifragilisticexpialidocious",
]


@pytest.fixture(scope="module")
def ours() -> Encoder:
    return Encoder.from_minilm()


@pytest.fixture(scope="module")
def theirs() -> BertModel:
    config = BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        layer_norm_eps=1e-12,
        attn_implementation="eager",
    )
    model = BertModel(config).eval()
    weights = minilm_weights()
    del weights["embeddings.position_ids"]  # a constant that newer versions no longer store
    model.load_state_dict(weights, strict=True)
    return model


def reference_embedding(model: BertModel, ids: list[int]) -> torch.Tensor:
    """transformers' hidden states, averaged and scaled as the model card says."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        mean = model(tokens).last_hidden_state.mean(1)
    return (mean / mean.norm(dim=-1, keepdim=True))[0]


def test_200_texts_agree_with_transformers_alone_and_in_a_batch(ours, theirs):
    """To 1e-5: odd texts and verses of every length; padding changes nothing beyond 1e-5."""
    verses = list(bible_verses("web").values())
    texts = [*verses[:: len(verses) // (200 - len(ODD_TEXTS))], *ODD_TEXTS][-200:]
    tokenizer = minilm_tokenizer()
    ids = [tokenizer.encode(text).ids for text in texts]
    expected = torch.stack([reference_embedding(theirs, text) for text in ids])
    alone = torch.cat([ours.embed([text], tokenizer) for text in texts])
    assert (alone - expected).abs().max() < 1e-5
    batched = torch.cat([ours.embed(texts[i : i + 8], tokenizer) for i in range(0, 200, 8)])
    assert (batched - alone).abs().max() < 1e-5


def test_a_sentence_is_the_mean_over_its_own_tokens(ours, theirs):
    """A short text beside a long one is embedded as alone, and as transformers' mean."""
    tokenizer, texts = minilm_tokenizer(), ["Dog bites man.", "a", "one two three four five six"]
    ids = [tokenizer.encode(text).ids for text in texts]
    expected = torch.stack([reference_embedding(theirs, row) for row in ids])
    assert (ours.embed(texts, tokenizer) - expected).abs().max() < 1e-5


def test_every_head_of_every_layer_agrees_with_transformers(ours, theirs):
    """All 72 attention maps and all hidden states, with padding in the batch, to 1e-5."""
    tokenizer = minilm_tokenizer()
    texts = ["The animal didn't cross the street because it was too tired.", "Dog bites man."]
    tokens, mask = pad([tokenizer.encode(text).ids for text in texts])
    types = torch.zeros_like(tokens)
    types[0, 5:] = 1
    with torch.no_grad():
        answer = theirs(
            tokens, mask.long(), types, output_attentions=True, output_hidden_states=True
        )
        hidden = ours.hidden_states(tokens, mask, types)
        pooled = ours.pooled(hidden[-1])
        for layer, block in enumerate(ours.blocks):
            query, key, _ = block.attention.project(hidden[layer])
            weights = attention_weights(query, key, mask=mask[:, None, None, :])
            assert (weights - answer.attentions[layer]).abs().max() < 1e-5
    for got, want in zip(hidden, answer.hidden_states, strict=True):
        # Hidden states reach about 10; padding positions are nobody's to compare.
        assert ((got - want).abs() * mask[..., None]).max() < 1e-4
    assert (pooled - answer.pooler_output).abs().max() < 1e-5


def test_padding_is_not_attended_to(ours):
    """What stands in the padding changes no bit of the real tokens."""
    tokens = torch.randint(1000, 2000, (1, 6))
    mask = torch.tensor([[True, True, True, True, False, False]])
    with torch.no_grad():
        before = ours(tokens, mask)[:, :4]
        tokens[:, 4:] = 0
        assert torch.equal(ours(tokens, mask)[:, :4], before)


def test_a_strict_load_refuses_a_missing_or_foreign_weight(monkeypatch):
    weights = minilm_weights()
    weights["lm_head.weight"] = weights.pop("pooler.dense.weight")
    monkeypatch.setattr(encoder, "minilm_weights", lambda: weights)
    with pytest.raises(RuntimeError, match=r"(?s)pooler\.weight.*lm_head\.weight"):
        Encoder.from_minilm()


def test_pad():
    tokens, mask = pad([[5, 6, 7], [8]])
    assert tokens.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    with pytest.raises(ValueError, match="give at least one text"):
        pad([])


def test_too_long_is_a_sentence(ours):
    with pytest.raises(ValueError, match="at most 512 tokens, got 513"):
        ours(torch.zeros(1, 513, dtype=torch.long))


@pytest.mark.parametrize("layer, head", [(6, 0), (-1, 0), (0, 12)])
def test_layers_and_heads_that_do_not_exist(layer, head):
    with pytest.raises(ValueError, match="the model has"):
        EncoderConfig().check_layer_and_head(layer, head)
