"""What do the heads of a real model look at?

All 72 heads of MiniLM read one passage of the World English Bible. For each: how spread out its
attention is (entropy), and how much of it goes to the token before, to the first token [CLS] and to
the separator [SEP]. The figure shows every head; an HTML page, which needs no network, lets you
open each one.

Expected: rows are distributions, so no entropy exceeds log2 of the length. Clark et al. 2019 found
in BERT heads that follow the previous token and heads that rest on [SEP] or [CLS]; whether MiniLM,
distilled to 6 layers, keeps them is measured here.

Paper   Clark et al. 2019, arXiv:1906.04341
Run     uv run python weeks/01_attention/what_heads_look_at.py
"""

import math
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from circuitsvis.attention import attention_heads
from jaxtyping import Float
from torch import Tensor

from implementations.attention_basic import attention_weights
from implementations.lab.files import cache_folder, write_atomically
from implementations.lab.findings import Finding
from implementations.lab.pictures import draw_matrix
from implementations.lab.script import run
from implementations.models.encoder import Encoder
from implementations.sources.text import bible_verses
from implementations.sources.weights import minilm_tokenizer

SUBJECTS = ("entropy", "previous", "first", "separator")


@dataclass(frozen=True)
class Config:
    """Every attention head of MiniLM on one passage."""

    first_verse: int = 21003001
    """where the passage starts: book, chapter and verse; this is Ecclesiastes 3:1"""
    verses: int = 4
    """how many verses to read"""


@torch.no_grad()
def all_heads(encoder: Encoder, ids: list[int]) -> Float[Tensor, "layer head query key"]:
    """The attention weights of every head on one text."""
    hidden = encoder.hidden_states(torch.tensor([ids]))
    projected = (
        block.attention.project(x) for block, x in zip(encoder.blocks, hidden[:-1], strict=True)
    )
    return torch.cat([attention_weights(query, key) for query, key, _ in projected])


def describe(weights: Float[Tensor, "layer head query key"]) -> dict[str, Tensor]:
    """For each head: mean entropy of its rows in bits, and mean mass on three special keys."""
    return {
        "entropy": torch.special.entr(weights).sum(-1).mean(-1) / math.log(2),
        "previous": weights.diagonal(-1, -2, -1).mean(-1),
        "first": weights[..., 0].mean(-1),
        "separator": weights[..., -1].mean(-1),
    }


def draw(weights: Float[Tensor, "layer head query key"], mass: dict[str, Tensor]) -> None:
    """A grid of all heads, a row of the grid for each layer."""
    layers, heads = weights.shape[:2]
    figure, grid = plt.subplots(layers, heads, figsize=(1.25 * heads, 1.42 * layers))
    for layer in range(layers):
        for head in range(heads):
            axes = grid[layer, head]
            draw_matrix(axes, weights[layer, head].sqrt().numpy())
            axes.set(xticks=[], yticks=[])
            entropy = mass["entropy"][layer, head]
            axes.set_title(f"{layer}.{head}   {entropy:.1f} bits", fontsize=7, pad=2)
    figure.suptitle("MiniLM's 72 heads: rows look at columns (layer.head, mean entropy; √weight)")
    figure.tight_layout(rect=(0, 0, 1, 0.97), pad=0.4)


def strongest(mass: Float[Tensor, "layer head"], name: str) -> Finding:
    """The head with the largest mass on one kind of key."""
    layer, head = divmod(int(mass.argmax()), mass.shape[1])
    claim = f"most attention to {name}: layer {layer}, head {head}, a share of"
    return Finding(claim, mass.max().item(), source="Clark et al. 2019")


def main(config: Config) -> list[Finding]:
    verses = bible_verses("web")
    numbers = list(verses)
    if config.first_verse not in verses or config.verses < 1:
        raise ValueError(f"no passage of {config.verses} verses starts at {config.first_verse}")
    start = numbers.index(config.first_verse)
    text = " ".join(verses[number] for number in numbers[start : start + config.verses])
    encoded, encoder = minilm_tokenizer().encode(text), Encoder.from_minilm()
    weights = all_heads(encoder, encoded.ids)
    mass = describe(weights)
    draw(weights, mass)

    names = [f"{layer}.{head}" for layer in range(6) for head in range(12)]
    page = attention_heads(weights.flatten(0, 1), encoded.tokens, names).local_src
    viewer = cache_folder("figures", "01_attention") / "what_heads_look_at.html"
    print("viewer", write_atomically(viewer, f"<!doctype html><meta charset='utf-8'>{page}"))
    print(f"{len(encoded.tokens)} tokens: {text[:80]}…")

    resting = mass["first"] + mass["separator"]
    by_layer = resting.mean(-1)
    return [
        Finding(
            "largest entropy of a head, in units of log2(length)",
            mass["entropy"].max().item() / math.log2(len(encoded.tokens)),
        ),
        Finding("smallest entropy of a head", mass["entropy"].min().item(), "bits"),
        strongest(mass["previous"], "the previous token"),
        strongest(mass["first"], "[CLS]"),
        strongest(mass["separator"], "[SEP]"),
        Finding(
            "heads that rest on [CLS] and [SEP] with over half their weight",
            (resting > 0.5).sum().item(),
            "of 72",
        ),
        Finding(
            f"mass on [CLS] and [SEP] in layer {by_layer.argmax()}, the most of any layer",
            by_layer.max().item(),
        ),
    ]


if __name__ == "__main__":
    run(main, Config(), quick=Config(verses=1))
