"""Speculative decoding: a cheap draft guesses some tokens, and the model reads all guesses at once.

    guesses      x_1 ... x_k   with the draft's chances q_i(x) after the guesses before
    one pass     the model's chances p_1 ... p_{k+1} at the same places and one further
    accept x_i   if u_i < p_i(x_i) / q_i(x_i), one after another
    else         draw from max(p_i - q_i, 0), normalised, and drop all later guesses
    all taken    draw one more from p_{k+1}

Every token has the model's own distribution, whatever the draft is: notes/05_serving.md proves it
in three lines. A bad draft costs time and never quality. With a share a of guesses accepted, each
independently, one pass of the model writes (1 - a^(k+1)) / (1 - a) tokens on average.

    n-gram draft  what followed when the text's last tokens last stood in it: free, and q = 1
    model draft   a smaller decoder of the same vocabulary

Paper   Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318
        n-gram: Saxena 2023, prompt lookup decoding
Shapes  p [guess + 1, vocabulary]    q [guess, vocabulary]
Run     uv run python implementations/serving/speculative.py
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from implementations.serving.draws import draw, uniform
from implementations.text.sampling import Model, SamplingSettings, greedy, processed

Chances = Float[Tensor, "place vocabulary"]


class Guess(NamedTuple):
    """Tokens that may come next, and the chances from which each was drawn."""

    tokens: list[int]
    chances: Chances


@runtime_checkable
class Draft(Protocol):
    """Guesses the next tokens of a text."""

    def propose(self, tokens: Sequence[int], count: int, seed: int) -> Guess:
        """At most `count` of them; `seed` and their places are all the randomness there is."""


@dataclass
class Written:
    """A text, and how it was written."""

    tokens: list[int]
    """the prompt and what follows"""
    passes: int = 0
    """how often the model was called"""
    guessed: int = 0
    accepted: int = 0
    """guesses that stand in the text"""


def chances(
    logits: Float[Tensor, "place vocabulary"],
    tokens: Sequence[int],
    settings: SamplingSettings | None,
) -> Chances:
    """What the next token is drawn from at each place, the last after all `tokens`; without
    settings all chance is the likeliest token's.

    Raises:
        ValueError: as `processed`.
    """
    rows = []
    for back, row in zip(range(len(logits) - 1, -1, -1), logits, strict=True):
        if settings is None:
            rows.append(torch.zeros_like(row).scatter(0, greedy(row)[None], 1.0))
        else:
            before = torch.tensor(tokens[: len(tokens) - back], device=row.device)
            rows.append(processed(row, before, settings).softmax(-1))
    return torch.stack(rows)


def verify(
    p: Float[Tensor, "place vocabulary"],
    q: Float[Tensor, "guess #vocabulary"],
    guess: Sequence[int],
    u: Sequence[float],
    last: Sequence[float],
) -> list[int]:
    """The accepted guesses and one token more.

    Args:
        p: the model's chances at each guess's place, and after all of them.
        q: the draft's, from which the guesses were drawn.
        u: one uniform number for each guess.
        last: one more for each place, with which its token is drawn if none is accepted there.

    Returns:
        Tokens: at least one, at most one more than guesses.

    Raises:
        ValueError: chances that are not numbers.
    """
    for i, token in enumerate(guess):
        if not u[i] * q[i, token] < p[i, token]:  # NaN is below nothing
            residual = (p[i] - q[i]).clamp(min=0)
            if not residual.any():  # p and q differ by rounding only
                residual = p[i]
            return [*guess[:i], one(residual, last[i])]
    return [*guess, one(p[len(guess)], last[len(guess)])]


def one(chance: Float[Tensor, " vocabulary"], u: float) -> int:
    """A token with these chances, which need not sum to one."""
    return int(draw(chance[None], torch.tensor([u], dtype=torch.float64, device=chance.device)))


@torch.no_grad()
def generate_speculative(
    model: Model,
    draft: Draft,
    prompt: Sequence[int],
    count: int,
    settings: SamplingSettings | None = None,
    *,
    guesses: int = 4,
    seed: int = 0,
    stop: int | None = None,
) -> Written:
    """`count` tokens after the prompt, or fewer if `stop` comes.

    Args:
        model: maps tokens [1, token] to logits after at least the last tokens that are new to it:
            a `CachedDecoder`, which forgets rejected guesses by itself, or a decoder.
        settings: how the model's logits are changed before a token is drawn; greedy if absent.
        guesses: how many the draft is asked for.

    Raises:
        ValueError: an empty prompt, fewer than one guess, a negative count, a cached model that
            has read all of the prompt before, or as `check_guess` and `processed`.
    """
    if not prompt or count < 0 or guesses < 1:
        given = f"{len(prompt)} tokens, {count} to write, {guesses} guesses"
        raise ValueError(f"a prompt of a token or more and a guess or more are needed, got {given}")
    written, end = Written(list(prompt)), len(prompt) + count
    while (length := len(written.tokens)) < end:
        wanted = min(guesses, end - length - 1)
        empty = Guess([], torch.zeros(0, 1))
        guess, q = draft.propose(written.tokens, wanted, seed) if wanted else empty
        text = [*written.tokens, *guess]
        logits = model(torch.tensor([text]))[0, -len(guess) - 1 :]
        if len(logits) <= len(guess):
            raise ValueError("the model has read the prompt's last token: it gives no logits there")
        check_guess(guess, q, wanted, logits.shape[-1])
        p = chances(logits, text, settings)
        places = range(length, length + len(guess) + 1)
        u = [uniform(seed, place, "accept") for place in places]
        last = [uniform(seed, place, "token") for place in places]
        new = verify(p, q, guess, u, last)
        accepted, ends = len(new) - 1, stop in new
        if ends:
            new = new[: new.index(stop) + 1]
        written.tokens += new
        written.passes += 1
        written.guessed += len(guess)
        written.accepted += min(accepted, len(new))
        if ends:
            break
    return written


def check_guess(guess: Sequence[int], q: Tensor, wanted: int, vocabulary: int) -> None:
    """Raise ValueError unless a draft keeps its promise: so many tokens at most, with chances over
    the model's vocabulary for each."""
    if len(guess) > wanted:
        raise ValueError(f"a draft was asked for {wanted} guesses at most, got {len(guess)}")
    if guess and q.shape != (len(guess), vocabulary):
        shape = tuple(q.shape)
        raise ValueError(f"a draft gives {len(guess)} guesses of {vocabulary} chances, got {shape}")
    wrong = [token for token in guess if not 0 <= token < vocabulary]
    if wrong:
        raise ValueError(f"tokens are 0 to {vocabulary - 1} here, a draft guesses {wrong[0]}")


@dataclass(frozen=True)
class NGramDraft:
    """What followed when the text's last tokens last stood in it, the longest match first.

    Args:
        longest: how many of the last tokens are looked for at first.
        vocabulary: how many tokens there are.
    """

    vocabulary: int
    longest: int = 3

    def propose(self, tokens: Sequence[int], count: int, seed: int) -> Guess:
        """Nothing if not even the last token stood in the text before."""
        following = self.following(tokens)[:count]
        chances = torch.zeros(len(following), self.vocabulary)
        chances[range(len(following)), following] = 1.0
        return Guess(following, chances)

    def following(self, tokens: Sequence[int]) -> list[int]:
        tokens = list(tokens)
        for length in range(min(self.longest, len(tokens) - 1), 0, -1):
            pattern = tokens[-length:]
            for start in range(len(tokens) - length - 1, -1, -1):
                if tokens[start : start + length] == pattern:
                    return tokens[start + length :]
        return []


@dataclass(frozen=True)
class ModelDraft:
    """A smaller model of the same vocabulary, which writes its guesses one by one.

    Args:
        model: as in `generate_speculative`.
        settings: how it draws, the large model's settings as a rule; greedy if absent.
    """

    model: Model
    settings: SamplingSettings | None = None

    def propose(self, tokens: Sequence[int], count: int, seed: int) -> Guess:
        text, rows = list(tokens), []
        for _ in range(count):
            logits = self.model(torch.tensor([text]))[0, -1:]
            rows.append(chances(logits, text, self.settings)[0])
            text.append(one(rows[-1], uniform(seed, len(text), "draft")))
        return Guess(text[len(tokens) :], torch.stack(rows))


def main() -> None:
    from implementations.attention.vendor import attention_sdpa
    from implementations.models.decoder import SMOLLM2, Decoder
    from implementations.serving.kv_cache import CachedDecoder
    from implementations.sources.weights import smollm2_tokenizer
    from implementations.text.sampling import generate

    decoder, tokenizer = Decoder.from_smollm2(attention_sdpa), smollm2_tokenizer()
    prompt = tokenizer.encode("one two three four one two three four one two three").ids
    model = CachedDecoder(decoder, decoder.empty_cache(1, len(prompt) + 32))
    written = generate_speculative(model, NGramDraft(SMOLLM2.vocabulary), prompt, 32)
    alone = generate(model, torch.tensor([prompt]), 32)[0].tolist()
    print(repr(tokenizer.decode(written.tokens)))
    print(f"32 tokens in {written.passes} passes; the same as without: {written.tokens == alone}")
    print(f"{written.accepted} of {written.guessed} guesses accepted")


if __name__ == "__main__":
    main()
