"""Why does a model read tokens, and what does it not see because of them?

A token costs the same work whatever it holds, so the more bytes it holds, the longer the text that
a model can read. But what is inside a token is hidden: "strawberry" comes as one or as three
numbers, none of which is a letter. Two vocabularies of byte pairs are compared: one learned here
from the World English Bible, and SmolLM2's, learned from the web. What they were learned from
decides what is cheap to say.

Expected: a token holds at least one byte, and exactly one where nothing was learned (digits; every
script in which the Bible's letters do not occur). Every merge makes the text that it was learned
from shorter. Every text is decoded to itself.

Paper   Sennrich et al. 2016, arXiv:1508.07909; scripts: Petrov et al. 2023, arXiv:2305.15425
Run     uv run python weeks/02_transformers/why_tokens.py
"""

from dataclasses import dataclass
from itertools import pairwise

import matplotlib.pyplot as plt
from tqdm import tqdm

from implementations.lab.findings import Finding, at_least, equals, within
from implementations.lab.script import run
from implementations.sources.text import bible_verses
from implementations.text.byte_pair_encoding import BytePairEncoding, train

WORDS = ("strawberry", " strawberry", " Strawberry", " nevertheless", "12345")
# One sentence in five scripts; before it, other things that a model reads.
SCRIPTS = {
    "English": "The water is cold today, and the children are playing by the river.",
    "Greek": "Το νερό είναι κρύο σήμερα και τα παιδιά παίζουν δίπλα στο ποτάμι.",
    "Russian": "Вода сегодня холодная, и дети играют у реки.",
    "Hindi": "आज पानी ठंडा है और बच्चे नदी के किनारे खेल रहे हैं।",
    "Chinese": "今天水很冷，孩子们在河边玩耍。",
}
SAMPLES = {
    "prose": "The old man walked down to the harbour every morning, bought a newspaper that he "
    "never read, and sat on the same bench until the fishing boats came back.",
    "code": "def mean(values: list[float]) -> float:\n    if not values:\n"
    '        raise ValueError("no values")\n    return sum(values) / len(values)\n',
    "digits": "31415926535897932384626433832795",
    **SCRIPTS,
}


@dataclass(frozen=True)
class Config:
    """What two vocabularies make of words, code, digits and five scripts."""

    tokens: int = 8192
    """of the vocabulary learned from the Bible; a power of two"""
    verses: int = 31_102
    """of the Bible; the last tenth is kept out of learning"""


def bytes_a_token(encoding: BytePairEncoding, text: str) -> float:
    return len(text.encode()) / len(encoding.encode(text))


def compression(encoding: BytePairEncoding, texts: dict[str, str]) -> dict[int, dict[str, float]]:
    """Bytes a token of each text, for vocabularies of 256, 512, 1,024 ... tokens.

    Learning fewer merges gives the first of the many, so one training serves the whole curve.
    """
    doublings = range((len(encoding.merges) + 256).bit_length() - 8)
    sizes = tqdm([256 * 2**i for i in doublings], desc="vocabularies")
    smaller = {size: BytePairEncoding(encoding.merges[: size - 256]) for size in sizes}
    return {
        size: {name: bytes_a_token(one, text) for name, text in texts.items()}
        for size, one in smaller.items()
    }


def print_words(vocabularies: dict[str, BytePairEncoding]) -> None:
    """Words cut where their tokens end, and the numbers that a model sees in their place."""
    print(f"\n{'what we see':16}{'vocabulary':14}{'its tokens':24}what the model sees")
    for word in WORDS:
        for name, encoding in vocabularies.items():
            ids = encoding.encode(word)
            cut = "|".join(encoding.decode([i]) for i in ids)
            print(f"{word!r:16}{name:14}{cut:24}{' '.join(map(str, ids))}")


def print_rates(rates: dict[str, dict[str, float]]) -> None:
    print(f"\n{'bytes a token':16}" + "".join(f"{sample:>9}" for sample in SAMPLES))
    for name, values in rates.items():
        print(f"  {name:14}" + "".join(f"{value:9.2f}" for value in values.values()))
    print()


def draw(curve: dict[int, dict[str, float]], rates: dict[str, dict[str, float]]) -> None:
    """Left: what a larger vocabulary is worth. Right: whom a vocabulary serves."""
    _, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for name, marker in zip(next(iter(curve.values())), "os", strict=True):
        left.plot(
            list(curve), [point[name] for point in curve.values()], marker, ls="-", label=name
        )
    left.set_xscale("log", base=2)
    left.set_xticks(list(curve), [f"{size:,}" for size in curve])
    left.set(title="Byte pairs learned from the Bible", xlabel="tokens in the vocabulary")
    left.set(ylabel="bytes a token", ylim=(0, None))
    left.legend()
    for offset, (name, values) in zip((-0.2, 0.2), rates.items(), strict=True):
        right.bar([i + offset for i in range(len(values))], values.values(), 0.4, label=name)
    right.axhline(1, color="black", linewidth=0.8, linestyle="--")
    right.set_xticks(range(len(SAMPLES)), SAMPLES)
    right.set(title="Whom a vocabulary serves (dashed: single bytes)", ylabel="bytes a token")
    right.legend()


def main(config: Config) -> list[Finding]:
    if config.tokens < 512 or config.tokens & (config.tokens - 1):
        raise ValueError(f"the tokens are a power of two from 512 on, got {config.tokens}")
    verses = list(bible_verses("web").values())[: config.verses]
    kept = max(1, len(verses) // 10)
    texts = {"the text it was learned from": "\n".join(verses[:-kept])}
    texts["the text after it"] = later = "\n".join(verses[-kept:])
    bible = train(texts["the text it was learned from"], config.tokens - 256)
    smollm2 = BytePairEncoding.from_smollm2()
    vocabularies = {"the Bible's": bible, "SmolLM2's": smollm2}

    print_words(vocabularies)
    rates = {
        name: {sample: bytes_a_token(encoding, text) for sample, text in SAMPLES.items()}
        for name, encoding in vocabularies.items()
    }
    print_rates(rates)
    curve = compression(bible, texts)
    draw(curve, rates)

    everything = [*SAMPLES.values(), *texts.values()]
    wrong = sum(e.decode(e.encode(t)) != t for t in everything for e in vocabularies.values())
    seen = [smollm2.decode([i]) for i in smollm2.encode(" strawberry")]
    needed = {name: len(smollm2.encode(text)) for name, text in SCRIPTS.items()}
    dearest = max(needed, key=needed.get)
    foreign = [rates["the Bible's"][name] for name in list(SCRIPTS)[1:]]
    own = [point["the text it was learned from"] for point in curve.values()]
    return [
        Finding("texts that are not decoded to themselves", wrong, expected=equals(0)),
        Finding("tokens that SmolLM2 reads for the letters of ' strawberry'", len(seen)),
        Finding("of these, tokens that are the letter r", seen.count("r")),
        Finding(
            "fewest bytes a token, over all samples and both vocabularies",
            min(rate for values in rates.values() for rate in values.values()),
        ),
        Finding(
            "digits in a token of SmolLM2's",
            rates["SmolLM2's"]["digits"],
            expected=equals(1.0),
            source="every digit is a piece of its own",
        ),
        Finding(
            "most bytes a token that the Bible's has for a script it never saw",
            max(foreign),
            expected=within(1.0, 1.05),
            source="only its spaces and commas can have been learned",
        ),
        Finding(
            f"for one sentence SmolLM2 needs in {dearest}",
            needed[dearest] / needed["English"],
            "x the tokens of English",
        ),
        Finding(
            "least gain of twice the vocabulary on the text it was learned from",
            min(more - fewer for fewer, more in pairwise(own)),
            "bytes a token",
            expected=at_least(0.0),
            source="every merge makes that text shorter",
        ),
        Finding(
            f"{config.tokens:,} tokens hold on the text they were learned from", own[-1], "bytes"
        ),
        Finding("on the text after it", bytes_a_token(bible, later), "bytes"),
        Finding(
            f"SmolLM2's {len(smollm2.tokens):,} on that", bytes_a_token(smollm2, later), "bytes"
        ),
    ]


if __name__ == "__main__":
    run(main, Config(), quick=Config(tokens=1024, verses=3000))
