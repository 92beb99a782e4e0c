"""Why does a model break when its first token leaves the window?

Passages of the World English Bible, read by SmolLM2 in three ways: every token sees all before it;
only the last `window` tokens; or as many, of which the first few of the text are kept for ever.
Both windows hold the same number of keys and lose the same distant words, so what lies between
their losses is not knowledge of the text: it is the place where attention rests.

Expected: above the bottom layers the first token draws far more than its share; the loss of
the plain window jumps where the first token leaves; four kept tokens repair most of that jump.

Paper   Xiao et al. 2023, arXiv:2309.17453, figure 2 and table 2
Run     uv run python weeks/02_transformers/attention_sinks.py
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from implementations.attention.streaming import attention_streaming
from implementations.attention_basic import attention_naive, attention_weights
from implementations.lab.findings import Expectation, Finding, at_least, at_most
from implementations.lab.script import run
from implementations.models.decoder import Decoder
from implementations.sources.text import bible_verses
from implementations.sources.weights import smollm2_tokenizer

PAPER = "Xiao et al. 2023"


@dataclass(frozen=True)
class Config:
    """Full attention, a sliding window, and one that keeps the first tokens, on the same text."""

    first_verses: tuple[int, ...] = (8001001, 17001001, 44001001)
    """where each passage starts: Ruth, Esther and Acts, 1:1"""
    tokens: int = 640
    """length of a passage"""
    window: int = 128
    """keys that a query sees, its own and the sinks included"""
    sinks: tuple[int, ...] = (1, 4)
    """how many of the first tokens are kept"""


def passages(config: Config) -> list[Int[Tensor, "1 token"]]:
    """The first tokens of the text from each verse on."""
    verses, tokenizer = bible_verses("web"), smollm2_tokenizer()
    if unknown := set(config.first_verses) - verses.keys():
        raise ValueError(f"there is no verse {min(unknown)}: 8001001 is Ruth 1:1")
    if config.window >= config.tokens:
        raise ValueError(f"nothing leaves a window of {config.window} in {config.tokens} tokens")
    numbers, found = list(verses), []
    for verse in config.first_verses:
        start = numbers.index(verse)
        text = " ".join(verses[number] for number in numbers[start : start + config.tokens // 5])
        found.append(torch.tensor([tokenizer.encode(text).ids[: config.tokens]]))
    return found


@torch.no_grad()
def losses(
    decoder: Decoder, tokens: Int[Tensor, "1 token"], attention: Callable[..., Tensor]
) -> Float[Tensor, " query"]:
    """What each token but the last pays for the one after it, in nats."""
    for block in decoder.blocks:
        block.attention.attention = attention
    return torch.nn.functional.cross_entropy(
        decoder(tokens)[0, :-1], tokens[0, 1:], reduction="none"
    )


@torch.no_grad()
def first_token_mass(
    decoder: Decoder, tokens: Int[Tensor, "1 token"]
) -> Float[Tensor, "layer head"]:
    """The share of attention that the queries of the second half give to the first token."""
    x, mass = decoder.embedding(tokens), []
    for block in decoder.blocks:
        query, key, _ = block.attention.project(block.attention_norm(x))
        weights = attention_weights(query, key, causal=True)
        mass.append(weights[0, :, tokens.shape[1] // 2 :, 0].mean(-1))
        x = block(x, causal=True)
    return torch.stack(mass)


def smooth(values: Float[Tensor, " query"], width: int) -> np.ndarray:
    """Means of `width` neighbours, for the eye."""
    return np.convolve(values.numpy(), np.full(width, 1 / width), mode="valid")


def draw(
    mass: Float[Tensor, "layer head"], loss: dict[str, Float[Tensor, " query"]], config: Config
) -> None:
    """Where the attention goes, and what the loss does when it can no longer go there."""
    _, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    layers = range(len(mass))
    left.plot(layers, mass, ".", color="0.75")
    left.plot(layers, mass.mean(-1), "o-", label="mean of the layer's heads")
    left.plot([], [], ".", color="0.75", label="a head")
    even = 2 * math.log(2) / config.tokens  # the mean of 1 / p over the second half
    left.axhline(even, color="0.4", linestyle=":", label="if spread evenly")
    left.set(title="attention to the first token", xlabel="layer", ylabel="share", ylim=(0, 1))
    left.legend()
    width = max(config.tokens // 16, 1)
    for (name, values), style in zip(loss.items(), cycle(("-", "-", "-", "--"))):
        means = smooth(values, width)
        right.plot(np.arange(len(means)) + width / 2, means, style, label=name)
    right.axvline(config.window, color="0.4", linestyle=":", label="the first token leaves")
    title = f"loss by position, means of {width} tokens"
    right.set(title=title, xlabel="position", ylabel="nats a token")
    right.set_ylim(top=1.35 * right.get_ylim()[1])  # room for the legend
    right.legend(loc="upper right")


def main(config: Config) -> list[Finding]:
    decoder, texts = Decoder.from_smollm2(), passages(config)
    window = config.window
    readings = {"everything": attention_naive}
    for sinks in (0, *config.sinks):
        name = f"{window} keys, {sinks} of them the first" if sinks else f"the last {window} keys"
        readings[name] = partial(attention_streaming, window=window - sinks, sinks=sinks)
    mass, loss = [], {name: [] for name in readings}
    for tokens in tqdm(texts, desc="passages", unit="passage"):
        mass.append(first_token_mass(decoder, tokens))
        for name, attention in readings.items():
            loss[name].append(losses(decoder, tokens, attention))
    mean_mass = torch.stack(mass).mean(0)
    by_position = {name: torch.stack(rows) for name, rows in loss.items()}  # [passage, query]
    draw(mean_mass, {name: rows.mean(0) for name, rows in by_position.items()}, config)

    # A query at position `window` is the first that no longer sees the first token.
    late = [rows[:, window:].mean(-1) for rows in by_position.values()]
    return [*resting(mean_mass.mean(-1)), *breaking(late, config)]


def resting(by_layer: Float[Tensor, " layer"]) -> list[Finding]:
    """How much attention the first token draws."""
    starts = (by_layer > 0.2).int().argmax().item()
    return [
        Finding(
            "share of attention on the first token, layers 0 and 1",
            by_layer[:2].mean().item(),
            expected=at_most(0.05),
            source=PAPER,
        ),
        Finding(
            "the same, mean of the layers above",
            by_layer[2:].mean().item(),
            expected=at_least(0.2),
            source=PAPER,
        ),
        Finding("the first layer that rests there with over a fifth", starts),
        Finding(f"the most: layer {by_layer.argmax().item()}, a share of", by_layer.max().item()),
    ]


def breaking(late: list[Float[Tensor, " passage"]], config: Config) -> list[Finding]:
    """What the windows cost, once the first token would have left them."""
    full, plain, *kept = late
    findings = [
        per_passage("loss of full attention, where a window has lost the first token", full),
        per_passage(
            f"what it costs to see only the last {config.window} keys", plain - full, at_least(0.5)
        ),
    ]
    for sinks, rows in zip(config.sinks, kept, strict=True):
        name = f"{config.window} keys, {sinks} of them the first"
        findings += [
            per_passage(f"what it costs to see {name}", rows - full),
            Finding(
                f"share of the damage that keeping {sinks} repairs",
                ((plain - rows).mean() / (plain - full).mean()).item(),
                expected=at_least(0.6) if sinks >= 4 else None,
                source=PAPER if sinks >= 4 else "",
            ),
        ]
    return findings


def per_passage(
    claim: str, values: Float[Tensor, " passage"], expected: Expectation | None = None
) -> Finding:
    """Mean over the passages, and their spread."""
    several = len(values) > 1
    return Finding(
        claim,
        values.mean().item(),
        "nats",
        expected=expected,
        spread=values.std().item() if several else None,
        seeds=len(values) if several else None,
        repeated="passages",
        source=PAPER if expected else "",
    )


if __name__ == "__main__":
    run(main, Config(), quick=Config((8001001,), tokens=128, window=40, sinks=(4,)))
