"""Speculative decoding: the same tokens when greedy, the same joint distribution when sampled."""

import itertools

import pytest
import torch
from scipy.stats import chi2, ncx2

from implementations.models.decoder import Decoder
from implementations.serving.kv_cache import CachedDecoder
from implementations.serving.speculative import (
    Guess,
    ModelDraft,
    NGramDraft,
    chances,
    generate_speculative,
    verify,
)
from implementations.text.sampling import SamplingSettings, generate

SAMPLED = SamplingSettings()


FALSE_ALARM = 1e-5
DRAWS = 2000


def table_model(seed: int, spread: float = 0.6):
    """A model whose next token depends on the last one: logits from a table, over three tokens."""
    table = spread * torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)).double()
    return lambda tokens: table[tokens]


MODEL, OTHER = table_model(0), table_model(1, 2.0)


def joint(*steps: torch.Tensor) -> torch.Tensor:
    """The chances of all 27 texts of three tokens after token 1, from each step's table."""
    first, second, third = steps
    every = itertools.product(range(3), repeat=3)
    return torch.stack([first[1, a] * second[a, b] * third[b, c] for a, b, c in every])


def chi_square(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """The chance of a larger statistic if `expected` is right."""
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    return float(chi2.sf(statistic, len(observed) - 1))


def power(wrong: torch.Tensor, right: torch.Tensor) -> float:
    """The chance that texts with the wrong chances raise the alarm."""
    limit, freedom = chi2.isf(FALSE_ALARM, len(right) - 1), len(right) - 1
    return float(ncx2.sf(limit, freedom, DRAWS * ((wrong - right) ** 2 / right).sum().item()))


@pytest.mark.parametrize("draft", ["model", "n-gram"])
@pytest.mark.parametrize("guesses", [1, 3])
def test_sampled_texts_have_the_joint_distribution(draft, guesses, unchecked):
    """All 27 texts of three tokens, 2,000 draws. False alarms: 1 in 100,000, and the seeds are
    fixed. The draft's table is another and steeper one."""
    # After 0 1 2 1 the n-gram draft guesses 2, 1, ...: sometimes likely, sometimes not.
    prompt = [0, 1, 2, 1]
    made = ModelDraft(OTHER, SAMPLED) if draft == "model" else NGramDraft(3)
    observed = torch.zeros(27)
    guessed = accepted = 0
    for seed in range(DRAWS):
        written = generate_speculative(MODEL, made, prompt, 3, SAMPLED, guesses=guesses, seed=seed)
        a, b, c = written.tokens[4:]
        observed[9 * a + 3 * b + c] += 1
        guessed, accepted = guessed + written.guessed, accepted + written.accepted
    p = MODEL(torch.arange(3)).softmax(-1)
    expected = joint(p, p, p)
    assert expected.sum().item() == pytest.approx(1) and (expected * DRAWS).min() > 4
    assert chi_square(observed, expected * DRAWS) > FALSE_ALARM
    assert 0.1 < accepted / guessed < 0.9  # both roads were taken


def test_the_chi_square_would_notice():
    """What comes out if all is accepted, and if a rejected guess is drawn anew from the model: the
    alarm is missed less than once in 100,000 times. The last token is never a guess."""
    p, q = (model(torch.arange(3)).softmax(-1) for model in (MODEL, OTHER))
    rejected = (p - q).clamp(min=0).sum(-1, keepdim=True)
    redrawn = torch.minimum(p, q) + rejected * p
    right = joint(p, p, p)
    for step in (q, redrawn):
        wrong = joint(step, step, p)
        assert wrong.sum().item() == pytest.approx(1)
        assert power(wrong, right) > 1 - 1e-5
    assert power(right, right) == pytest.approx(FALSE_ALARM)


def test_verify_by_hand():
    """p = (.5, .5), q = (.8, .2): token 0 stays if u < 5/8; if not, only token 1 is left."""
    p, q = torch.tensor([[0.5, 0.5], [0.0, 1.0]]), torch.tensor([[0.8, 0.2]])
    assert verify(p, q, [0], [0.62], [0.0, 0.3]) == [0, 1]
    assert verify(p, q, [0], [0.63], [0.0, 0.3]) == [1]
    assert verify(p, q, [1], [0.999], [0.0, 0.3]) == [1, 1]
    assert verify(p, torch.zeros(0, 2), [], [], [0.7]) == [1]
    # The residual (0, .1, .2) is drawn from as (0, 1/3, 2/3).
    p, q = torch.tensor([[0.2, 0.4, 0.4], [1.0, 0.0, 0.0]]), torch.tensor([[0.5, 0.3, 0.2]])
    assert verify(p, q, [0], [0.5], [0.33, 0.0]) == [1]
    assert verify(p, q, [0], [0.5], [0.34, 0.0]) == [2]
    # p and q differ by rounding only, so the residual is empty: p is drawn from.
    p = torch.tensor([[0.5 - 1e-8, 0.5], [1.0, 0.0]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    assert verify(p, q, [0], [1 - 2**-52], [0.7, 0.3]) == [1]
    # A later guess is not even looked at after one that was rejected.
    assert verify(torch.eye(3), torch.eye(3)[[1, 0]], [1, 0], [0.0, 0.0], [0.5] * 3) == [0]


def test_chances_are_those_of_each_place():
    """With a penalty, each place counts the tokens before it and no guess after."""
    logits, settings = torch.randn(3, 5), SamplingSettings(0.7, repetition_penalty=1.8)
    text = [0, 1, 2, 3]
    rows = [chances(logits[i : i + 1], text[: 2 + i], settings)[0] for i in range(3)]
    torch.testing.assert_close(chances(logits, text, settings), torch.stack(rows))
    greedy = chances(logits, text, None)
    assert (greedy.argmax(-1) == logits.argmax(-1)).all() and (greedy.sum(-1) == 1).all()


def cached(decoder: Decoder) -> CachedDecoder:
    return CachedDecoder(decoder, decoder.empty_cache(1, 64))


@torch.no_grad()
@pytest.mark.parametrize("guesses", [1, 2, 5])
@pytest.mark.parametrize("draft", ["n-gram", "itself", "another"])
def test_greedy_is_generate(tiny, draft, guesses):
    """Token for token, with the cache rolled back after every rejected guess."""
    prompt = torch.randint(29, (1, 12))
    another = Decoder(tiny.config).double()
    drafts = {
        "n-gram": NGramDraft(29),
        "itself": ModelDraft(cached(tiny)),
        "another": ModelDraft(cached(another)),
    }
    written = generate_speculative(
        cached(tiny), drafts[draft], prompt[0].tolist(), 40, guesses=guesses
    )
    assert written.tokens == generate(tiny, prompt, 40)[0].tolist()
    if draft == "itself":
        assert written.accepted == written.guessed
        assert written.passes == -(-40 // (guesses + 1))


def test_the_longest_and_latest_match_is_taken():
    draft = NGramDraft(10, longest=2)
    assert draft.following([1, 2, 3, 9, 2, 4, 1, 2]) == [3, 9, 2, 4, 1, 2]
    assert draft.following([7, 1, 5, 1, 6, 1]) == [6, 1]
    assert draft.following([1, 2, 3]) == [] and draft.following([1]) == []
    guess = draft.propose([1, 2, 3, 1, 2], 2, seed=0)
    assert guess.tokens == [3, 1]
    assert guess.chances.argmax(-1).tolist() == [3, 1] and (guess.chances.sum(-1) == 1).all()


def test_it_stops_and_refuses():
    model, draft = MODEL, NGramDraft(3)
    whole = generate_speculative(model, draft, [0, 1, 0, 1], 9).tokens
    stopped = generate_speculative(model, draft, [0, 1, 0, 1], 9, stop=whole[6]).tokens
    assert stopped == whole[: 5 + whole[4:].index(whole[6])]
    assert generate_speculative(model, draft, [0], 0).tokens == [0]
    for prompt, count, guesses in (([], 3, 2), ([1], -1, 2), ([1], 3, 0)):
        with pytest.raises(ValueError, match="a guess or more are needed"):
            generate_speculative(model, draft, prompt, count, guesses=guesses)


class Fixed:
    """A draft that always guesses the same, with all chance on it."""

    def __init__(self, tokens: list[int], vocabulary: int = 3):
        self.tokens, self.vocabulary = tokens, vocabulary

    def propose(self, tokens, count, seed):
        chances = torch.zeros(len(self.tokens), self.vocabulary)
        chances[range(len(self.tokens)), self.tokens] = 1.0
        return Guess(self.tokens, chances)


def always(token: int, logits: float = 50.0):
    """A model that writes one token for ever."""
    row = torch.full((3,), 0.0).scatter(0, torch.tensor(token), logits)
    return lambda tokens: row.expand(*tokens.shape, 3)


def test_only_guesses_that_stand_in_the_text_are_counted():
    written = generate_speculative(always(1), Fixed([1, 1]), [0], 9, stop=1)
    assert written.tokens == [0, 1] and (written.guessed, written.accepted) == (2, 1)


def test_a_draft_that_breaks_its_promise_is_refused():
    for draft, sentence in (
        (Fixed([1] * 9), "2 guesses at most, got 9"),
        (Fixed([1, -2]), "0 to 2 here, a draft guesses -2"),
        (Fixed([1, 1], vocabulary=4), r"2 guesses of 3 chances.*\(2, 4\)"),
    ):
        with pytest.raises(ValueError, match=sentence):
            generate_speculative(always(1), draft, [0], 3)


@pytest.mark.parametrize("settings", [None, SAMPLED, SamplingSettings(1e-40)])
def test_logits_that_are_not_numbers_are_refused(settings):
    """NaN, or infinite when they are divided; nothing is accepted and nothing written."""
    model = always(1, torch.nan if settings in (None, SAMPLED) else 1.0)
    with pytest.raises(ValueError, match="finite, got nan"):
        generate_speculative(model, Fixed([1, 1]), [0], 3, settings)
    p = torch.tensor([[torch.nan] * 3, [1.0, 0.0, 0.0]])  # NaN where the guess is judged only
    with pytest.raises(ValueError, match="finite, got nan"):
        verify(p, torch.eye(3)[:1], [0], [0.5], [0.5, 0.5])


@torch.no_grad()
def test_a_cache_that_has_read_the_whole_prompt_is_refused(tiny):
    """It would give no logits for the first guess, and those of the others one place too early."""
    prompt = [1, 2, 1, 2]
    model = cached(tiny)
    model(torch.tensor([prompt[:-1]]))
    expected = generate(tiny, torch.tensor([prompt]), 9)[0].tolist()
    assert generate_speculative(model, NGramDraft(29), prompt, 9).tokens == expected
    model = cached(tiny)
    model(torch.tensor([prompt]))
    with pytest.raises(ValueError, match="has read the prompt's last token"):
        generate_speculative(model, NGramDraft(29), prompt, 9)
