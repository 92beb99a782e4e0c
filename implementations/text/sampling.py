"""Sampling: from logits, a number for every token, to the next token.

    greedy               argmax(logits)
    temperature          logits / t                                                 t -> 0 is greedy
    top-k                -inf where logit < the k-th largest logit
    top-p (nucleus)      -inf where the mass of the likelier tokens is p already
    min-p                -inf where probability < p · largest probability
    repetition penalty   tokens seen before: logit / penalty if positive, logit · penalty if not
    sample               a draw from softmax(logits)

Every function computes in float32 or wider, and what it returns stays that wide: rounded to
bfloat16 after each step, neighbouring logits of a vocabulary would become ties.

Paper   Holtzman et al. 2020, arXiv:1904.09751 (top-p); Fan et al. 2018, arXiv:1805.04833 (top-k);
        Nguyen et al. 2024, arXiv:2407.01082 (min-p); Keskar et al. 2019, arXiv:1909.05858 (penalty)
Shapes  logits [..., vocabulary]    tokens [batch, token]
Run     uv run python implementations/text/sampling.py
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

Logits = Float[Tensor, "*batch vocabulary"]
Model = Callable[[Tensor], Tensor]  # tokens [batch, token] -> logits [batch, token, vocabulary]


def greedy(logits: Logits) -> Int[Tensor, "*batch"]:
    """The likeliest token, the first of equals.

    Raises:
        ValueError: as `widened`.
    """
    return widened(logits).argmax(-1)


def sample(logits: Logits, generator: torch.Generator) -> Int[Tensor, "*batch"]:
    """A token drawn from softmax(logits) for every row; all rows share the generator's stream.

    Raises:
        ValueError: as `widened`.
    """
    probability = widened(logits).softmax(-1)
    rows = probability.reshape(-1, logits.shape[-1])
    return rows.multinomial(1, generator=generator).reshape(logits.shape[:-1])


def temperature(logits: Logits, t: float) -> Logits:
    """logits / t: below 1 the likely tokens become likelier, above 1 the others do.

    Raises:
        ValueError: t is not positive and finite, or as `widened`.
    """
    if not 0 < t < math.inf:
        raise ValueError(f"a temperature is positive and finite, got {t}: for 0 use greedy")
    return widened(logits) / t


def top_k(logits: Logits, k: int) -> Logits:
    """Only the k largest logits, and what ties with the k-th: dropping some of equals would be
    arbitrary. A k beyond the vocabulary keeps everything, as in transformers.

    Raises:
        ValueError: k is below 1, or as `widened`.
    """
    if k < 1:
        raise ValueError(f"top-k keeps at least one token, got k = {k}")
    logits = widened(logits)
    smallest_kept = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def top_p(logits: Logits, p: float) -> Logits:
    """The nucleus: the fewest tokens whose probabilities sum to p or more, the likeliest first.

    The token that crosses p belongs to it, so the likeliest always stays. Of equals at the edge the
    first stay; p = 1 keeps everything.

    Raises:
        ValueError: p is outside (0, 1], or as `widened`.
    """
    check_share("top-p", p)
    logits = widened(logits)
    if p == 1:  # a running sum in float32 reaches 1 before the tail is counted
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probability = ordered.softmax(-1)
    mass_before = probability.cumsum(-1) - probability
    beyond = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, mass_before >= p)
    return logits.masked_fill(beyond, -torch.inf)


def min_p(logits: Logits, p: float) -> Logits:
    """Only tokens at least p times as likely as the likeliest: a nucleus that widens where the
    model is unsure. Taking logarithms, the sum in the softmax cancels.

    Raises:
        ValueError: p is outside (0, 1], or as `widened`.
    """
    check_share("min-p", p)
    logits = widened(logits)
    least = logits.amax(-1, keepdim=True) + math.log(p)
    return logits.masked_fill(logits < least, -torch.inf)


def repetition_penalty(
    logits: Logits, previous_tokens: Int[Tensor, "*batch previous"], penalty: float
) -> Logits:
    """Tokens that occurred before, once or often, become less likely for a penalty above 1.

    The paper divides every such logit, which would make one below zero likelier; those are
    multiplied instead, as transformers does.

    Raises:
        ValueError: the penalty is not positive and finite, a token is outside the vocabulary, or as
            `widened`.
    """
    if not 0 < penalty < math.inf:
        raise ValueError(f"a repetition penalty is positive and finite, got {penalty}")
    outside = (previous_tokens < 0) | (previous_tokens >= logits.shape[-1])
    if outside.any():
        wrong = previous_tokens[outside][0].item()
        raise ValueError(f"tokens are 0 to {logits.shape[-1] - 1} here, got {wrong}")
    logits = widened(logits)
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, previous_tokens.long(), True)
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalised, logits)


@dataclass(frozen=True)
class SamplingSettings:
    """How to change logits before a token is drawn; the defaults change nothing."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0


def processed(
    logits: Logits, previous_tokens: Int[Tensor, "*batch previous"], settings: SamplingSettings
) -> Logits:
    """The logits after penalty, temperature, top-k, top-p and min-p, in transformers' order.

    Temperature comes before the filters, so that p is a share of the distribution that is drawn
    from: a nucleus chosen at t = 1 and then heated would hold the same tokens at every temperature.

    Raises:
        ValueError: as the five functions.
    """
    logits = repetition_penalty(logits, previous_tokens, settings.repetition_penalty)
    logits = temperature(logits, settings.temperature)
    filters = (top_k, settings.top_k), (top_p, settings.top_p), (min_p, settings.min_p)
    for keep, value in filters:
        logits = logits if value is None else keep(logits, value)
    return logits


@torch.no_grad()
def generate(
    model: Model,
    tokens: Int[Tensor, "batch prompt"],
    count: int,
    settings: SamplingSettings | None = None,
    generators: Sequence[torch.Generator] | None = None,
    stop: int | None = None,
) -> Int[Tensor, "batch total"]:
    """The prompts, equally long, with up to `count` tokens after each. Every step hands the whole
    text to the model, which reads all of it again unless it is a `CachedDecoder`.

    Args:
        model: maps tokens [batch, token] to logits [batch, token, vocabulary].
        settings: changes the logits first, greedy or not.
        generators: one for every row, so that a row draws the same alone and in any batch; greedy
            if absent.
        stop: a row ends with this token and is filled up with it while others go on.

    Raises:
        ValueError: an empty prompt, a negative count, not one generator a row, or as `processed`.
    """
    check_prompt(tokens, count)
    if generators is not None and len(generators) != len(tokens):
        raise ValueError(f"{len(tokens)} rows need a generator each, got {len(generators)}")
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for _ in range(count):
        if ended.all():
            break
        logits = processed(model(tokens)[:, -1], tokens, settings or SamplingSettings())
        if generators is None:
            chosen = greedy(logits)
        else:
            pairs = zip(logits, generators, strict=True)
            chosen = torch.stack([sample(row, generator) for row, generator in pairs])
        if stop is not None:
            chosen = chosen.masked_fill(ended, stop)
            ended = ended | (chosen == stop)
        tokens = torch.cat((tokens, chosen[:, None].to(tokens.dtype)), -1)
    return tokens


def widened(logits: Logits) -> Logits:
    """The logits in float32 or wider.

    Raises:
        ValueError: the vocabulary is empty, or a row has NaN, +inf or nothing but -inf, so that its
            softmax is not a distribution.
    """
    if not logits.shape[-1]:
        raise ValueError(f"logits need a vocabulary, got the shape {tuple(logits.shape)}")
    largest = logits.amax(-1)  # one number tells all three: NaN, inf or -inf
    if not largest.isfinite().all():
        wrong = largest[~largest.isfinite()][0].item()
        raise ValueError(f"a row's largest logit must be finite, got {wrong}")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def check_share(name: str, p: float) -> None:
    if not 0 < p <= 1:
        raise ValueError(f"{name} is above 0 and at most 1, got {p}")


def check_prompt(tokens: Int[Tensor, "batch prompt"], count: int) -> None:
    """What `generate` and `beam_search` ask of their input."""
    if not tokens.shape[-1]:
        raise ValueError(f"a prompt has at least one token, got the shape {tuple(tokens.shape)}")
    if count < 0:
        raise ValueError(f"count is how many tokens to add, got {count}")


def main() -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03]).log()
    seen = torch.tensor([0, 0])
    for name, result in {
        "as they are": logits,
        "temperature 0.5": temperature(logits, 0.5),
        "temperature 2": temperature(logits, 2.0),
        "top-k 2": top_k(logits, 2),
        "top-p 0.8": top_p(logits, 0.8),
        "min-p 0.2": min_p(logits, 0.2),
        "first seen, 1.5": repetition_penalty(logits, seen, 1.5),
    }.items():
        print(f"{name:16}" + "".join(f"{p:7.3f}" for p in result.softmax(-1)))
    draws = sample(logits.expand(100_000, -1), torch.Generator().manual_seed(0))
    print("100,000 draws   " + "".join(f"{n / 1e5:7.3f}" for n in draws.bincount().tolist()))


if __name__ == "__main__":
    main()
