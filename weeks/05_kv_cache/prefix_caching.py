"""How long does the first token of an answer take when everybody's prompt starts alike?

SmolLM2 gets questions that all follow the same long system prompt, here the first verses of the
Bible. The first request reads all of it. The others find its blocks by their digests and read their
own question only.

Expected: time to the first token falls by about the share of the prompt that is found; only whole
blocks are, so at most one block less a token of the common part is read again.

Run     uv run python weeks/05_kv_cache/prefix_caching.py
"""

import time
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import torch

from implementations.lab.findings import Finding, at_least, at_most
from implementations.lab.script import run
from implementations.models.decoder import SMOLLM2, Decoder
from implementations.serving.engine import Engine, Parameters
from implementations.sources.text import bible_verses
from implementations.sources.weights import smollm2_tokenizer

QUESTIONS = [
    "What was made on the first day?",
    "Who is Cain?",
    "How old was Adam?",
    "What did Noah build, and of what?",
]


@dataclass(frozen=True)
class Config:
    """Time to the first token with and without a known prefix."""

    system: int = 2000
    """tokens of the system prompt"""
    layers: int = 30
    """of SmolLM2, its first ones"""
    questions: int = 4
    """how many of the four"""
    page: int = 16
    """tokens a block"""


def first_token(engine: Engine, prompt: list[int]) -> tuple[float, int]:
    """Seconds until it is there, and how many tokens were read for it."""
    request, passes = engine.add(prompt, Parameters(1)), []
    start = time.perf_counter()
    plan = engine.scheduler.plan

    def counted():
        passes.append(plan())
        return passes[-1]

    engine.scheduler.plan = counted
    while not request.finish:
        engine.step()
    engine.scheduler.plan = plan
    seconds = time.perf_counter() - start
    return seconds, sum(end - begin for made in passes for _, begin, end in made.chunks)


def main(config: Config) -> list[Finding]:
    torch.manual_seed(0)
    if config.layers == SMOLLM2.layers:
        decoder = Decoder.from_smollm2()
    else:
        decoder = Decoder(replace(SMOLLM2, layers=config.layers)).eval()
    tokenizer = smollm2_tokenizer()
    verses = list(bible_verses("web").values())[:200]
    system = tokenizer.encode(" ".join(verses)).ids[: config.system]
    prompts = [
        [*system, *tokenizer.encode(f"\n{question}\n").ids]
        for question in QUESTIONS[: config.questions]
    ]
    blocks = len(prompts) + (config.system + 100) // config.page * 2
    sizes = {"blocks": blocks, "page": config.page, "batch": 4, "budget": 512}
    shared = Engine(decoder, **sizes)
    first_token(Engine(decoder, **sizes), system[: 3 * config.page])  # warm
    apart = [first_token(Engine(decoder, **sizes), prompt) for prompt in prompts[1:]]
    first, *later = [first_token(shared, prompt) for prompt in prompts]
    draw(first, later)
    least = max(len(prompt) for prompt in prompts) - config.system + config.page
    mean = sum(seconds for seconds, _ in later) / len(later)
    without = sum(seconds for seconds, _ in apart) / len(apart)
    return [
        Finding("tokens of a prompt", len(prompts[1])),
        Finding("the first request reads", first[1], "tokens"),
        Finding(
            "a later one reads at most",
            max(count for _, count in later),
            "tokens",
            expected=at_most(least),
            source="its question, and less than a block of the common part",
        ),
        Finding("first token without the cache", without, "s"),
        Finding("first token with it", mean, "s"),
        Finding(
            "the cache brings the first token sooner by", without / mean, "x", goal=at_least(10)
        ),
    ]


def draw(first: tuple[float, int], later: list[tuple[float, int]]) -> None:
    _, axes = plt.subplots(figsize=(6, 3.2))
    seconds = [first[0], *(seconds for seconds, _ in later)]
    bars = axes.bar(range(1, len(seconds) + 1), seconds)
    counts = [first[1], *(count for _, count in later)]
    axes.bar_label(bars, [f"{count} tokens read" for count in counts], fontsize=8)
    axes.set_xticks(range(1, len(seconds) + 1))
    axes.set(xlabel="request", ylabel="seconds to the first token")
    axes.set_title("The same long system prompt, again and again")


if __name__ == "__main__":
    run(main, Config(), quick=Config(system=120, layers=2, questions=2))
