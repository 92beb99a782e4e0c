"""Beam search against brute force, greedy decoding and transformers."""

import itertools

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from implementations.models.decoder import DecoderConfig
from implementations.models.llama_in_transformers import llama_config
from implementations.text.beam_search import beam_search
from implementations.text.sampling import generate

SAME = {"rtol": 1e-10, "atol": 0.0}


def markov(vocabulary: int):
    """A model whose next token depends on the last two and on the length: were it only the last
    two, texts with the same pairs in another order would tie."""
    table = 2 * torch.randn(16, vocabulary, vocabulary, vocabulary, dtype=torch.float64)

    def model(tokens):
        length = torch.arange(tokens.shape[1]) + 1
        return table[length, tokens.roll(1, -1), tokens]

    return model, table.log_softmax(-1)


def log_probability_of(text, table):
    """Of a text behind its prompt of two tokens."""
    return sum(table[n, text[n - 2], text[n - 1], text[n]].item() for n in range(2, len(text)))


def brute_force(table, prompt, count, stop, penalty):
    """Every text with its log probability, added up token by token; the best score first."""
    texts = {}
    for tokens in itertools.product(range(table.shape[-1]), repeat=count):
        if stop in tokens:
            tokens = tokens[: tokens.index(stop) + 1]
        texts[tokens] = log_probability_of((*prompt, *tokens), table)
    score = {tokens: total / len(tokens) ** penalty for tokens, total in texts.items()}
    return [(t, texts[t], score[t]) for t in sorted(texts, key=score.get, reverse=True)]


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("stop", [None, 2])
@pytest.mark.parametrize("vocabulary, count", [(3, 4), (4, 3), (5, 1), (3, 1)])
def test_with_enough_beams_it_is_exhaustive(vocabulary, count, stop, penalty):
    """Every text, its log probability and its rank, for two prompts at once."""
    model, table = markov(vocabulary)
    prompts = torch.tensor([[0, 1], [1, 0]])
    beams = vocabulary**count
    found = beam_search(model, prompts, beams, count, stop, penalty)
    for row, prompt in enumerate(prompts.tolist()):
        want = brute_force(table, prompt, count, stop, penalty)
        for place, (tokens, log_probability, score) in enumerate(want):
            filled = [*tokens, *[stop] * (count - len(tokens))]
            assert found.tokens[row, place].tolist() == prompt + filled
            assert found.log_probability[row, place].item() == pytest.approx(log_probability)
            assert found.score[row, place].item() == pytest.approx(score)
        assert (found.log_probability[row, len(want) :] == -torch.inf).all()


@pytest.mark.parametrize("stop", [None, 4])
def test_one_beam_is_greedy(stop):
    model, _ = markov(7)
    for _ in range(20):
        prompt = torch.randint(7, (1, 2))
        found = beam_search(model, prompt, 1, 12, stop)
        assert torch.equal(found.tokens[:, 0], generate(model, prompt, 12, stop=stop))


@pytest.mark.parametrize("beams", [1, 2, 5])
@pytest.mark.parametrize("stop", [None, 4])
def test_log_probabilities_are_those_of_the_texts(beams, stop):
    model, table = markov(7)
    found = beam_search(model, torch.randint(7, (6, 2)), beams, 9, stop, 0.8)
    for text, got in zip(found.tokens.flatten(0, 1), found.log_probability.flatten(), strict=True):
        text = text.tolist()
        end = text.index(stop, 2) + 1 if stop in text[2:] else len(text)
        assert got.item() == pytest.approx(log_probability_of(text[:end], table), rel=1e-10)
    assert (found.score.diff(dim=1) <= 0).all()


def test_every_beam_is_another_text():
    model, _ = markov(7)
    found = beam_search(model, torch.randint(7, (4, 2)), 6, 5)
    assert all(len({tuple(text) for text in texts}) == 6 for texts in found.tokens.tolist())


def test_a_row_is_searched_the_same_alone_as_in_a_batch():
    """Rows end at different steps; alone, a row may be filled up to a shorter length."""
    model, _ = markov(7)
    prompts = torch.randint(7, (6, 2))
    together = beam_search(model, prompts, 3, 10, stop=4)
    for row in range(6):
        alone = beam_search(model, prompts[row : row + 1], 3, 10, stop=4)
        length = alone.tokens.shape[-1]
        assert torch.equal(alone.tokens[0], together.tokens[row, :, :length])
        assert (together.tokens[row, :, length:] == 4).all()
        assert_close(alone.log_probability[0], together.log_probability[row], **SAME)


def test_a_wider_beam_finds_what_greed_misses():
    """.5 · .6 by the likelier first step, .4 · .9 by the other."""
    table = torch.eye(5)
    table[0] = torch.tensor([0.1, 0.5, 0.4, 0.0, 0.0])
    table[1] = torch.tensor([0.0, 0.0, 0.0, 0.6, 0.4])
    table[2] = torch.tensor([0.0, 0.0, 0.1, 0.0, 0.9])
    found = [beam_search(lambda t: table[t].log(), torch.tensor([[0]]), n, 2) for n in (1, 2)]
    assert [x.tokens[0, 0].tolist() for x in found] == [[0, 1, 3], [0, 2, 4]]
    probabilities = [x.log_probability[0, 0].exp().item() for x in found]
    assert probabilities == pytest.approx([0.3, 0.36])


@pytest.fixture(scope="module")
def llama():
    config = DecoderConfig(23, 16, 2, 2, 24, positions=64, key_value_heads=1, tied=False)
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(config, initializer_range=0.6, pad_token_id=0)).eval()


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("stop", [None, 5])
@pytest.mark.parametrize("beams", [2, 4])
def test_equals_transformers(llama, beams, stop, penalty):
    """All beams of 8 prompts, in order, with the scores that ranked them."""
    prompts = torch.randint(23, (8, 4), generator=torch.Generator().manual_seed(0))
    ends = {} if stop is None else {"eos_token_id": stop, "pad_token_id": stop}
    want = llama.generate(
        prompts,
        attention_mask=prompts >= 0,
        do_sample=False,
        num_beams=beams,
        num_return_sequences=beams,
        early_stopping="never",
        length_penalty=penalty,
        max_new_tokens=12,
        return_dict_in_generate=True,
        output_scores=True,
        **ends,
    )
    found = beam_search(lambda t: llama(t).logits, prompts, beams, 12, stop, penalty)
    assert torch.equal(found.tokens.flatten(0, 1), want.sequences)
    # 12 steps in float32, theirs with a key-value cache.
    assert_close(found.score.flatten(), want.sequences_scores, rtol=1e-5, atol=1e-5)
    if stop is not None:
        assert (found.tokens[..., 4:] == stop).any()


def test_float64_stays():
    model, _ = markov(4)
    assert beam_search(model, torch.tensor([[0, 1]]), 2, 3).log_probability.dtype == torch.float64


def test_nothing_to_add_returns_the_prompt():
    model, _ = markov(4)
    found = beam_search(model, torch.tensor([[0, 1]]), 2, 0)
    assert found.tokens[0, 0].tolist() == [0, 1]
    assert found.log_probability.tolist() == [[0.0, -torch.inf]]


PROMPT = torch.zeros(1, 2).long()
BAD = {
    "no beam": ({"beams": 0}, "at least one beam, got 0"),
    "negative count": ({"count": -1}, "how many tokens to add, got -1"),
    "negative penalty": ({"length_penalty": -1.0}, "at least 0 and finite, got -1"),
    "penalty NaN": ({"length_penalty": torch.nan}, "at least 0 and finite, got nan"),
    "empty prompt": ({"tokens": PROMPT[:, :0]}, "a prompt has at least one token"),
    "logits NaN": ({"model": lambda t: torch.full((*t.shape, 3), torch.nan)}, "finite, got nan"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    changed, message = BAD[name]
    good = {"model": markov(3)[0], "tokens": PROMPT, "beams": 2, "count": 3}
    with pytest.raises(ValueError, match=message):
        beam_search(**good | changed)
