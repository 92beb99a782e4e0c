"""Beam search: the most probable continuation, sought by keeping a few at a time.

    log p(y) = Σ_n log p(y_n | prompt, y_1 ... y_{n-1})
    score(y) = log p(y) / length(y)^penalty

Every step extends each of the running beams by every token and keeps the best. With as many beams
as there are continuations the search is exhaustive; one beam is greedy decoding.

Paper   Wu et al. 2016, arXiv:1609.08144, section 7, for ranking by length; the division by a power
        of the length is transformers' form
Shapes  tokens [batch, prompt]    result [batch, beam, token]
Run     uv run python implementations/text/beam_search.py
"""

from typing import NamedTuple

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from implementations.text.sampling import Model, check_prompt, widened


class Beams(NamedTuple):
    """Texts with the prompt in front, the best first. Where there are fewer texts than places, a
    place has the log probability and score -inf, and its tokens mean nothing."""

    tokens: Int[Tensor, "batch beam token"]
    log_probability: Float[Tensor, "batch beam"]
    score: Float[Tensor, "batch beam"]


@torch.no_grad()
def beam_search(
    model: Model,
    tokens: Int[Tensor, "batch prompt"],
    beams: int,
    count: int,
    stop: int | None = None,
    length_penalty: float = 0.0,
) -> Beams:
    """The best `beams` continuations found, of `count` tokens or up to the stop token.

    An ended text moves to the result and frees its beam: at most one in `vocabulary` candidates of
    a beam ends, so among 2 · beams candidates enough go on. The search is over when nothing that
    runs can still enter the result. With `early_stopping="never"`, transformers has these rules.
    Equal scores come in no particular order.

    Args:
        model: maps tokens [batch, token] to logits [batch, token, vocabulary].
        stop: ends a text, counts in its length and probability, and fills it up to the longest.
        length_penalty: 0 ranks by probability, which falls with every token and so prefers short
            texts; 1 ranks by mean log probability.

    Raises:
        ValueError: an empty prompt, a negative count, beams below 1, a negative or infinite
            length_penalty, or logits without a distribution.
    """
    check_prompt(tokens, count)
    if beams < 1:
        raise ValueError(f"a search needs at least one beam, got {beams}")
    if not 0 <= length_penalty < torch.inf:
        raise ValueError(f"a length penalty is at least 0 and finite, got {length_penalty}")
    running = start(tokens, beams)
    end = -1 if stop is None else stop  # no token is -1
    finished = running if count == 0 else without(running, torch.ones_like(running.score).bool())
    for length in range(1, count + 1):
        candidates = extended(model, running, 2 * beams)
        ends = (candidates.tokens[..., -1] == end) | (length == count)
        running = best(without(candidates, ends), beams)
        ended = first(without(candidates, ~ends), beams)
        ended = ended._replace(score=ended.log_probability / length**length_penalty)
        filled = pad(finished.tokens, (0, 1), value=end)
        finished = best(joined(finished._replace(tokens=filled), ended), beams)
        # A log probability only falls, and the greatest length divides it by the most.
        reachable = running.log_probability[:, 0] / count**length_penalty
        if (reachable <= finished.score[:, -1]).all():
            break
    return finished


def start(tokens: Int[Tensor, "batch prompt"], beams: int) -> Beams:
    """The prompt in every beam. Only the first counts: equal beams would stay equal for ever."""
    log_probability = torch.full((len(tokens), beams), -torch.inf, device=tokens.device)
    log_probability[:, 0] = 0.0
    repeated = repeat(tokens, "batch token -> batch beam token", beam=beams)
    return Beams(repeated, log_probability, log_probability)


def extended(model: Model, running: Beams, count: int) -> Beams:
    """The `count` best ways to continue any of the beams by one token."""
    logits = model(running.tokens.flatten(0, 1))[:, -1]
    step = widened(logits).log_softmax(-1).unflatten(0, running.score.shape)
    total = (running.log_probability[..., None] + step).flatten(1)
    log_probability, index = total.topk(min(count, total.shape[-1]))
    parent = running.tokens.take_along_dim(index[..., None] // logits.shape[-1], 1)
    token = (index % logits.shape[-1])[..., None].to(parent.dtype)
    return Beams(torch.cat((parent, token), -1), log_probability, log_probability)


def best(beams: Beams, count: int) -> Beams:
    """The `count` beams of the highest score, the best first."""
    index = beams.score.topk(count).indices
    tokens = beams.tokens.take_along_dim(index[..., None], 1)
    return Beams(tokens, *(x.take_along_dim(index, 1) for x in beams[1:]))


def first(beams: Beams, count: int) -> Beams:
    return Beams(*(x[:, :count] for x in beams))


def joined(left: Beams, right: Beams) -> Beams:
    return Beams(*(torch.cat(pair, 1) for pair in zip(left, right, strict=True)))


def without(beams: Beams, removed: Bool[Tensor, "batch beam"]) -> Beams:
    """The same places, those removed at -inf."""
    kept = (x.masked_fill(removed, -torch.inf) for x in beams[1:])
    return Beams(beams.tokens, *kept)


def main() -> None:
    words, table = ["The", "old", "fox", "man", "house", "ran"], torch.eye(6)
    table[0] = torch.tensor([0.0, 0.5, 0.4, 0.1, 0.0, 0.0])
    table[1] = torch.tensor([0.0, 0.0, 0.0, 0.5, 0.5, 0.0])
    table[2] = torch.tensor([0.0, 0.0, 0.1, 0.0, 0.0, 0.9])
    print("The -> old .5, fox .4;  old -> man .5, house .5;  fox -> ran .9")
    for beams, name in ((1, "greedy"), (2, "two beams")):
        found = beam_search(lambda tokens: table[tokens].log(), torch.tensor([[0]]), beams, 2)
        text = " ".join(words[i] for i in found.tokens[0, 0])
        print(f"  {name:11}{text:15}p = {found.log_probability[0, 0].exp():.2f}")


if __name__ == "__main__":
    main()
