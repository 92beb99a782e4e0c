"""Can a transformer of a million parameters learn King James's English in five minutes?

The encoder reads a verse of the World English Bible, the decoder writes the verse of the King James
Version. Verses that were never seen are scored against what can be had more cheaply:

    blind     the same decoder, trained as long, with nothing to read: it knows the language alone
    copying   the next token is one that follows the last one in the modern verse, or any token of
              it, or one of a table of pairs or of single tokens, mixed in the best proportion
    as it is  the modern verse itself, in words wrong

A smaller task shows that the source is read: spelling a word backwards. What letter to write is no
matter of language, so each must be looked up, and the attention to the word is an anti-diagonal.

Expected: reading a word, the model spells it backwards better than without one. Whether a
translation is learned within minutes is measured here.

Run     uv run python weeks/02_transformers/king_james.py
"""

import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor
from tqdm import trange

from implementations.attention.vendor import attention_sdpa
from implementations.attention_basic import attention_naive, attention_weights
from implementations.lab.findings import Finding, at_least, at_most
from implementations.lab.pictures import draw_matrix
from implementations.lab.script import run
from implementations.models.encoder import pad
from implementations.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from implementations.sources.text import bible_verses
from implementations.text.byte_pair_encoding import BytePairEncoding, train

Row = tuple[list[int], list[int]]  # what is read, what is to be written
EVERY = 100  # steps between two looks at the held-out rows
PICTURED = "They have ears, but they don’t hear"  # Psalm 115:6 is held out, by default


@dataclass(frozen=True)
class Config:
    """Modern English to King James, verse by verse; and words spelled backwards."""

    longest: int = 100
    """letters of the longest verse, in both translations"""
    merges: int = 1000
    """size of the vocabulary beyond the 256 bytes"""
    width: int = 128
    layers: int = 2
    """of each stack"""
    steps: int = 1000
    """of training on verses"""
    letters: int = 12
    """of the longest word to spell backwards"""
    reversal_steps: int = 600
    batch: int = 64
    learning_rate: float = 3e-3
    dropout: float = 0.1
    seed: int = 0


class Task(NamedTuple):
    """Rows to learn from and rows to be asked about, over `vocabulary` tokens, start and stop."""

    vocabulary: int
    learn: list[Row]
    ask: list[Row]

    @property
    def start(self) -> int:
        return self.vocabulary

    @property
    def stop(self) -> int:
        return self.vocabulary + 1

    def batch(self, rows: list[Row], blind: bool = False) -> tuple[Tensor, ...]:
        """What is read, where it is real, what was written, and what comes next (-100: nothing)."""
        source, mask = pad([[self.stop] if blind else read for read, _ in rows])
        written, _ = pad([[self.start, *write] for _, write in rows])
        following, real = pad([[*write, self.stop] for _, write in rows])
        return source, mask, written, following.masked_fill(~real, -100)


class Learned(NamedTuple):
    """A trained model and its curve: held-out loss and share of right tokens by step."""

    model: EncoderDecoder
    curve: dict[int, tuple[float, float]]

    @property
    def last(self) -> tuple[float, float]:
        return self.curve[max(self.curve)]


def verses(config: Config) -> tuple[BytePairEncoding, list[tuple[str, str]], Task]:
    """Every twentieth short verse is held out, unless it also stands, word for word, elsewhere."""
    modern, old = bible_verses("web"), bible_verses("kjv")
    pairs = [(tidy(modern[verse]), tidy(old.get(verse, ""))) for verse in modern]
    pairs = [pair for pair in pairs if all(0 < len(text) <= config.longest for text in pair)]
    learn, ask = [pair for i, pair in enumerate(pairs) if i % 20], pairs[::20]
    seen = {text for pair in learn for text in pair}
    ask = [pair for pair in ask if not seen & set(pair)]
    if not (learn and ask):
        raise ValueError(f"too few verses have {config.longest} letters or less to learn from")
    encoding = train("\n".join(text for pair in learn for text in pair), config.merges)

    def rows(pairs: list[tuple[str, str]]) -> list[Row]:
        # The space tells the word that begins a verse as the same word within one.
        return [tuple(encoding.encode(" " + text) for text in pair) for pair in pairs]

    return encoding, ask, Task(len(encoding.tokens), rows(learn), rows(ask))


def tidy(text: str) -> str:
    """One kind of apostrophe and of space; no brackets, which mark what the translators added."""
    return " ".join(re.sub(r"[\[\]]", "", text.replace("`", "’")).split())


def backwards(config: Config) -> Task:
    """The words of the World English Bible, and 300 of them that are held out."""
    text = " ".join(bible_verses("web").values()).lower()
    words = sorted({w for w in re.findall("[a-z]+", text) if 2 <= len(w) <= config.letters})
    if len(words) <= 300:
        raise ValueError(f"only {len(words)} words have {config.letters} letters or less")
    random.Random(config.seed).shuffle(words)
    spelled = [[ord(letter) - ord("a") for letter in word] for word in words]
    rows = [(letters, letters[::-1]) for letters in spelled]
    return Task(26, rows[300:], rows[:300])


def fit(task: Task, config: Config, name: str, steps: int, blind: bool = False, **sizes) -> Learned:
    """AdamW, warm-up and cosine; the held-out rows are only looked at."""
    torch.manual_seed(config.seed)
    settings = EncoderDecoderConfig(task.vocabulary + 2, norm_first=True, heads=4, **sizes)
    model = EncoderDecoder(settings, attention_sdpa)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98))
    rows, curve = shuffled(task.learn, config), {}
    for step in (progress := trange(steps, desc=name)):
        rate = min(1, (step + 1) / 0.1 / steps) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = config.learning_rate * rate
        batch = task.batch(next(rows), blind)
        loss, _ = score(model, *batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % EVERY == 0 or step == steps - 1:
            with torch.no_grad():
                held_out = score(model.eval(), *task.batch(task.ask, blind))
            model.train()
            curve[step + 1] = tuple(number.item() for number in held_out)
            progress.set_postfix(loss=f"{loss:.2f}", held_out=f"{held_out[0]:.2f}")
    return Learned(model.eval(), curve)


def shuffled(rows: list[Row], config: Config) -> Iterator[list[Row]]:
    """Batches without end; every row comes once before any comes again."""
    generator, waiting = random.Random(config.seed), []
    while True:
        while len(waiting) < config.batch:
            waiting += generator.sample(rows, len(rows))
        yield waiting[: config.batch]
        del waiting[: config.batch]


def score(model: EncoderDecoder, source, mask, written, following) -> tuple[Tensor, Tensor]:
    """Nats a token, and the share of tokens that were the likeliest."""
    logits, real = model(source, written, mask), following >= 0
    loss = torch.nn.functional.cross_entropy(logits[real], following[real])
    return loss, (logits.argmax(-1) == following)[real].float().mean()


def copying(task: Task) -> float:
    """Nats a token of the best mixture of four guesses, its proportions found by EM.

    They are found on the held-out verses themselves: three numbers in the baseline's favour.
    """
    singles, pairs, firsts = Counter(), Counter(), Counter()
    for _, write in task.learn:
        singles.update([*write, task.stop])
        pairs.update(pairwise([task.start, *write, task.stop]))
        firsts.update([task.start, *write])
    rows = []
    for read, write in task.ask:
        around = [task.start, *read, task.stop]
        for last, token in pairwise([task.start, *write, task.stop]):
            single = (singles[token] + 1) / (singles.total() + task.vocabulary + 1)
            pair = pairs[last, token] / firsts[last] if firsts[last] else single
            anywhere = around[1:].count(token) / len(around[1:])
            follows = [after for before, after in pairwise(around) if before == last]
            following = follows.count(token) / len(follows) if follows else anywhere
            rows.append([following, anywhere, pair, single])
    guesses, mixture = torch.tensor(rows), torch.full((4,), 0.25)
    for _ in range(100):
        mixture = (guesses * mixture / (guesses @ mixture)[:, None]).mean(0)
    return -(guesses @ mixture).log().mean().item()


def words_wrong(texts: Sequence[str], wanted: Sequence[str]) -> float:
    """Words to insert, delete or replace (Levenshtein), for each word that is wanted."""
    total = 0
    for text, target in zip(texts, wanted, strict=True):
        row, goal = list(range(len(target.split()) + 1)), target.split()
        for i, word in enumerate(text.split(), 1):
            above, row = row, [i]
            for j, other in enumerate(goal, 1):
                row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (word != other)))
        total += row[-1]
    return total / sum(len(target.split()) for target in wanted)


def looks_at(model: EncoderDecoder, task: Task, row: Row) -> Tensor:
    """Cross-attention of the last layer [written, read], the mean of its heads."""
    seen, cross = [], model.decoder[-1].cross_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        seen.append(attention_weights(query, key, **options))
        return attention_naive(query, key, value, **options)

    usual, cross.attention = cross.attention, watched
    with torch.no_grad():
        score(model, *task.batch([row]))
    cross.attention = usual
    return seen[0][0].mean(0)


def draw_look(axes: Axes, weights: Tensor, read: list[str], write: list[str], title: str) -> None:
    draw_matrix(axes, weights)
    axes.set_xticks(range(len(read)), read, rotation=90, parse_math=False)
    axes.set_yticks(range(len(write)), write, parse_math=False)
    axes.set(title=title, xlabel="reads", ylabel="writes")


def translate(learned: Learned, task: Task, longest: int) -> list[list[int]]:
    """What the model writes for the held-out rows."""
    source, mask, *_ = task.batch(task.ask)
    return learned.model.translate(source, task.start, task.stop, longest, mask)


def draw(spelling: Learned, words: Task, lines: dict[str, Learned | float], look: tuple) -> None:
    """Held-out loss by step; who looks at whom, in a verse and in a word."""
    left, middle, right = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")[1]
    for name, line in lines.items():
        if isinstance(line, Learned):
            left.plot(list(line.curve), [loss for loss, _ in line.curve.values()], label=name)
        else:
            left.axhline(line, color="grey", linestyle="--", label=name)
    left.set(title="Verses never seen", xlabel="step", ylabel="nats a token")
    left.legend()
    draw_look(middle, *look, "Modern English to King James")
    read, write = words.ask[0]
    letters = [chr(ord("a") + letter) for letter in read]
    weights = looks_at(spelling.model, words, (read, write))
    draw_look(right, weights, letters, [*letters[::-1], "(stop)"], "Backwards")


def main(config: Config) -> list[Finding]:
    if min(config.steps, config.reversal_steps) < 1:
        raise ValueError("train for one step at least")
    words, (encoding, texts, task) = backwards(config), verses(config)
    sizes = {"width": 64, "hidden": 256, "layers": 1}
    spelling = fit(words, config, "backwards", config.reversal_steps, **sizes)
    sizes = {"width": config.width, "hidden": 4 * config.width, "layers": config.layers}
    sizes["dropout"] = config.dropout
    reading = fit(task, config, "verses", config.steps, **sizes)
    blind = fit(task, config, "blind", config.steps, blind=True, **sizes)
    copied, best_blind = copying(task), min(loss for loss, _ in blind.curve.values())

    longest = max(len(write) for _, write in task.learn)
    written = [encoding.decode(ids).strip() for ids in translate(reading, task, longest)]
    modern, old = zip(*texts, strict=True)
    for i in range(0, len(texts), max(1, len(texts) // 6)):
        print(f"\n  read   {modern[i]}\n  wrote  {written[i]}\n  1769   {old[i]}")
    print()
    pictured = next((i for i, text in enumerate(modern) if PICTURED in text), 0)
    read, write = ([encoding.decode([i]) for i in ids] for ids in task.ask[pictured])
    look = looks_at(reading.model, task, task.ask[pictured]), read, [*write, "(stop)"]
    lines = {"reading the modern verse": reading, "blind": blind, "copying, at its best": copied}
    draw(spelling, words, lines, look)

    spelled = translate(spelling, words, config.letters + 1)
    whole = [ids == write for ids, (_, write) in zip(spelled, words.ask, strict=True)]
    letters = Counter(token for _, write in words.ask for token in [*write, words.stop])
    count = sum(parameter.numel() for parameter in reading.model.parameters())
    as_it_is = words_wrong(modern, old)
    return [
        Finding(
            "words never seen, backwards: letters right",
            spelling.last[1],
            expected=at_least(max(letters.values()) / letters.total()),
            source="always the commonest letter",
        ),
        Finding("words spelled backwards without a mistake", sum(whole) / len(whole)),
        Finding("parameters of the model for verses", count),
        Finding("verses never seen", len(texts)),
        Finding("copying, mixed at its best", copied, "nats a token"),
        Finding("the decoder blind, at its best moment", best_blind, "nats a token"),
        Finding(
            "the decoder reading the modern verse",
            reading.last[0],
            "nats a token",
            expected=at_most(math.log(task.vocabulary + 1)),
            source="a die with a face for each token",
        ),
        Finding(
            "reading saves, next to the better of the two",
            min(copied, best_blind) - reading.last[0],
            "nats a token",
            goal=at_least(0.0),
        ),
        Finding("tokens right, blind", blind.last[1]),
        Finding("tokens right, reading", reading.last[1]),
        Finding("words wrong, the modern verse as it is", as_it_is),
        Finding("words wrong, translated", words_wrong(written, old), goal=at_most(as_it_is)),
    ]


if __name__ == "__main__":
    run(
        main,
        Config(),
        quick=Config(
            longest=50, merges=200, width=32, layers=1, steps=20, letters=6, reversal_steps=120
        ),
    )
