"""What do positions add to attention, and what happens beyond the length of training?

Attention takes its tokens as a set. Five readers, small causal transformers alike in everything but
the positions they are told, train on the same verses in windows of one length and are then tested
on other verses, in windows up to eight times as long.

Expected: without positions "dog bites man" is "man bites dog". Rotary scores depend on the distance
and not on the place, yet longer windows hold distances that training never showed: there sinusoids
and rotary lose their way, a learned table has no rows, and ALiBi goes on.

Paper   Press et al. 2021, arXiv:2108.12409, figure 1
Run     uv run python weeks/01_attention/positional_encodings.py
"""

from dataclasses import dataclass
from itertools import product
from math import nan

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from implementations.attention.multi_head import MultiHeadAttention
from implementations.attention.positions import (
    LearnedPositions,
    alibi_bias,
    rotate_half_split,
    sinusoidal_positions,
)
from implementations.lab.compare import error
from implementations.lab.findings import Expectation, Finding, at_least, at_most, equals
from implementations.lab.script import run
from implementations.layers.block import Block
from implementations.layers.feed_forward import FeedForward
from implementations.layers.layer_norm import LayerNorm
from implementations.sources.text import bible_verses

ENCODINGS = ("no positions", "sinusoidal", "learned", "rotary", "ALiBi")
COLOURS = dict(zip(ENCODINGS, ("gray", "C0", "C2", "C1", "C3"), strict=True))
HEADS = 4
MULTIPLES = (0.25, 0.5, 1, 2, 4, 8)  # test lengths, in lengths of training
RISE = 0.02  # nats a character, 2 % in perplexity: nothing less is called a rise


@dataclass(frozen=True)
class Config:
    """Train five tiny language models that differ in their positions only."""

    length: int = 64
    """characters in a training window"""
    width: int = 64
    """size of a character's vector"""
    steps: int = 500
    """training steps of each model"""
    seeds: int = 3
    """how often each model is trained"""


class Reader(nn.Module):
    """Two blocks that predict the next token, told in one of five ways where tokens stand."""

    def __init__(self, encoding: str, tokens: int, width: int, length: int):
        super().__init__()
        self.encoding = encoding
        rotate = rotate_half_split if encoding == "rotary" else None
        self.embed, self.predict = nn.Embedding(tokens, width), nn.Linear(width, tokens)
        self.blocks, self.norm = nn.ModuleList(), LayerNorm(width)
        for _ in range(2):
            parts = MultiHeadAttention(width, HEADS, rotate=rotate), FeedForward(width, 4 * width)
            self.blocks.append(Block(*parts, lambda: LayerNorm(width)))
        if encoding == "learned":  # drawn last, so that a seed gives all readers the same weights
            self.table = LearnedPositions(length, width)
            nn.init.normal_(
                self.table.table
            )  # as large as the tokens' vectors, or none would see it

    def forward(
        self, tokens: Int[Tensor, "batch token"], causal: bool = True
    ) -> Float[Tensor, "batch token next"]:
        x, mask, length = self.embed(tokens), None, tokens.shape[1]
        if self.encoding == "sinusoidal":
            x = x + sinusoidal_positions(length, x.shape[-1], dtype=x.dtype)
        if self.encoding == "learned":
            x = self.table(x)
        if self.encoding == "ALiBi":
            mask = alibi_bias(HEADS, length, length, x.dtype)
        for block in self.blocks:
            x = block(x, causal=causal, mask=mask)
        return self.predict(self.norm(x))


def order(encoding: str, causal: bool, expected: Expectation, source: str = "") -> Finding:
    """How far any word's output moves when the words change places, in an untrained reader."""
    torch.manual_seed(0)
    reader, words = Reader(encoding, 3, 64, 3).double(), torch.tensor([[0, 1, 2]])
    moved = error(reader(words.flip(1), causal).flip(1), reader(words, causal)).largest
    claim = f'{encoding}{", causal mask" * causal}: "dog bites man" turned round moves outputs by'
    return Finding(claim, moved, expected=expected, source=source)


def scores_by_place(places: Int[Tensor, " place"], distance: int) -> dict[str, Tensor]:
    """Scores [pair, place] of 4 random queries with keys that stand `distance` before them."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 1, 64, dtype=torch.float64).expand(-1, -1, len(places), -1)
    table = sinusoidal_positions(int(places.max()) + 1, 64, dtype=torch.float64)
    added = (query + table[places]) * (key + table[places - distance])
    rotate = rotate_half_split
    turned = rotate(query, places) * rotate(key, places - distance)
    return {"sinusoidal": added.sum(-1) / 64**0.5, "rotary": turned.sum(-1) / 64**0.5}


def train(reader: Reader, text: Int[Tensor, " token"], config: Config, bar: tqdm) -> None:
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, config.steps)
    for _ in range(config.steps):
        start = torch.randint(len(text) - config.length, (16, 1))
        window = text[start + torch.arange(config.length + 1)]
        loss = cross_entropy(reader(window[:, :-1]).mT, window[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        bar.set_postfix(positions=reader.encoding, loss=f"{loss.item():.2f}", refresh=False)
        bar.update()


@torch.no_grad()
def loss_per_token(reader: Reader, text: Int[Tensor, " token"], length: int) -> float:
    """Mean loss over the text, cut into windows of this length; NaN if the reader refuses them."""
    windows = text.unfold(0, length + 1, length).chunk(4)  # a window's last target begins the next
    try:
        losses = [cross_entropy(reader(tokens[:, :-1]).mT, tokens[:, 1:]) for tokens in windows]
    except ValueError:
        return nan
    return torch.stack(losses).mean().item()


def train_and_test(config: Config) -> dict[str, Float[Tensor, "seed multiple"]]:
    """Every reader's losses on the end of the Bible, after training on what comes before it."""
    text = "\n".join(bible_verses("web").values())
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([number[character] for character in text])
    end = 16 * MULTIPLES[-1] * config.length + 1  # 16 of the longest windows
    losses = {encoding: torch.zeros(config.seeds, len(MULTIPLES)) for encoding in COLOURS}
    with tqdm(total=len(COLOURS) * config.seeds * config.steps, unit="step") as bar:
        for encoding, seed in product(COLOURS, range(config.seeds)):
            torch.manual_seed(seed)
            reader = Reader(encoding, len(number), config.width, config.length)
            torch.manual_seed(seed)  # the learned table was drawn too; now all see the same windows
            train(reader, tokens[:-end], config, bar)
            for i, multiple in enumerate(MULTIPLES):
                length = int(multiple * config.length)
                losses[encoding][seed, i] = loss_per_token(reader, tokens[-end:], length)
    return losses


def beyond_training(losses: dict[str, Tensor], config: Config) -> list[Finding]:
    """Loss at the training length, and its rise at 2 and 8 times that, as far as a reader goes."""
    at = {multiple: i for i, multiple in enumerate(MULTIPLES)}
    read = [m for m in MULTIPLES if losses["learned"][:, at[m]].isfinite().all()]
    longest = int(read[-1] * config.length)
    claim = "learned: the longest test window it reads"
    findings = [Finding(claim, longest, "characters", expected=equals(config.length))]
    rules = {("ALiBi", 2): at_most(RISE), ("ALiBi", 8): at_most(RISE)}
    rules |= {("sinusoidal", 8): at_least(RISE), ("rotary", 8): at_least(RISE)}
    for name, multiple in product(ENCODINGS, (1, 2, 8)):
        values, claim = losses[name][:, at[multiple]], f"{name}: loss at the training length"
        if multiple > 1:
            values = values - losses[name][:, at[1]]
            claim = f"{name}: loss rises at {multiple} x the training length by"
        if name != "learned" or multiple == 1:
            mean, rule = values.mean().item(), rules.get((name, multiple))
            noise = {"spread": values.std().item()} if config.seeds > 1 else {}
            source = "Press et al. 2021, figure 1" if rule else ""
            finding = Finding(claim, mean, "nats", rule, seeds=config.seeds, source=source, **noise)
            findings.append(finding)
    return findings


def draw(losses: dict[str, Tensor], scores: dict[str, Tensor], length: int) -> None:
    """Losses by test length, and how one pair's score changes on its way through a text."""
    _, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    lengths = [int(multiple * length) for multiple in MULTIPLES]
    for encoding, loss in losses.items():
        left.plot(lengths, loss.mean(0), "o-", color=COLOURS[encoding], label=encoding)
        low, high = loss.amin(0), loss.amax(0)
        left.fill_between(lengths, low, high, color=COLOURS[encoding], alpha=0.2, linewidth=0)
    left.axvline(length, color="black", linestyle=":", label="length of training")
    left.set_xscale("log", base=2)
    left.set_xticks(lengths, map(str, lengths))
    left.set(xlabel="characters in a test window", ylabel="loss per character, nats")
    left.set_title(f"Train short, test long: mean and range over seeds ({len(loss)})")
    for encoding, score in scores.items():
        change = score[0, :256] - score[0, 0]
        right.plot(change, color=COLOURS[encoding], label=encoding)
    right.set(xlabel="place of the key", ylabel="change of the score")
    right.set_title("A query and a key, 5 tokens apart, moved through a text")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()


def main(config: Config) -> list[Finding]:
    # Matrices this small gain nothing from a second thread, and lose 20 times when it has to wait.
    torch.set_num_threads(1)
    moves, stays = at_least(0.01), at_most(1e-12)
    findings = [
        order("no positions", False, stays, "attention of a set"),
        *(order(encoding, False, moves) for encoding in ("sinusoidal", "learned", "rotary")),
        order("ALiBi", False, stays, "read backwards, a distance is the same"),
        order("ALiBi", True, moves),
        order("no positions", True, moves, "Haviv et al. 2022, arXiv:2203.16634"),
    ]
    scores = scores_by_place(torch.arange(5, 5006), distance=5)
    for encoding, score in scores.items():
        change = (score - score[:, :1]).abs().max().item()
        claim = f"{encoding}: scores of pairs 5 apart, moved by up to 5,000 places, change by"
        # An angle of p radians is known to p eps / 2, which is 6e-13 for p = 5000.
        expected = at_most(1e-11) if encoding == "rotary" else None
        findings.append(Finding(claim, change, expected=expected, source="Su et al. 2021"))
    losses = train_and_test(config)
    draw(losses, scores, config.length)
    return findings + beyond_training(losses, config)


if __name__ == "__main__":
    run(main, Config(), quick=Config(length=24, width=48, steps=80, seeds=1))
