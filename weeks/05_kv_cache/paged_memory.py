"""How much of a cache's memory holds nothing?

Requests come one after another, each with a prompt and an answer whose length nobody knows before
it ends. A cache in one piece must be as long as the longest text may be. Cut into pages, a text
takes a page when it needs one, and wastes at most the rest of its last. The same requests go
through both: slabs of the longest text, and the block manager. After every step, over all texts:

    waste = 1 - tokens held / tokens that the memory given to texts could hold

Expected: pages of 16 waste under 4%, and about (page - 1) / 2 tokens a text for any page; slabs
waste 60 to 80%, as Kwon et al. measured of the systems before theirs. Lengths are log-normal with
the means that they report for ShareGPT (161 tokens in, 338 out), and a spread of 1.

Run     uv run python weeks/05_kv_cache/paged_memory.py
"""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from implementations.lab.findings import Finding, at_least, at_most, within
from implementations.lab.script import run
from implementations.serving.block_manager import BlockManager, OutOfBlocks, Text

KWON = "Kwon et al. 2023, arXiv:2309.06180"


@dataclass(frozen=True)
class Config:
    """A trace of requests through a memory of slabs and through one of pages."""

    requests: int = 400
    memory: int = 65536
    """tokens that fit"""
    longest: int = 2048
    """tokens of a text at most: what a slab has room for"""
    pages: tuple[int, ...] = (1, 4, 16, 64, 256)
    shown: int = 16
    """the page of the picture and of the claim"""
    prompt: float = 161.0
    """mean tokens of a prompt"""
    answer: float = 338.0
    """mean tokens of an answer"""


class Request(NamedTuple):
    """How many tokens come in and go out."""

    prompt: int
    answer: int


class Trace(NamedTuple):
    """What one form of memory did with the requests."""

    waste: float
    """of the memory given to texts, over all steps"""
    texts: float
    """in memory at once, on average"""
    steps: int
    picture: np.ndarray
    """the memory at one moment: 0 free, -1 wasted, i the i-th text"""
    remainder: float
    """empty places a text, over all steps"""


def requests(config: Config) -> list[Request]:
    random = np.random.default_rng(0)

    def lengths(mean: float, most: int) -> np.ndarray:
        drawn = random.lognormal(np.log(mean) - 0.5, 1.0, config.requests)
        return np.clip(drawn.round(), 1, most).astype(int)

    prompts = lengths(config.prompt, config.longest // 2)
    answers = lengths(config.answer, config.longest // 2)
    return [Request(*map(int, pair)) for pair in zip(prompts, answers, strict=True)]


def in_slabs(config: Config) -> Trace:
    """Every text gets a slab of the longest text's length when it comes."""
    waiting, running = deque(requests(config)), []
    slabs = config.memory // config.longest
    held = given = texts = steps = 0
    picture = np.zeros((slabs, config.longest), dtype=int)
    while waiting or running:
        while waiting and len(running) < slabs:
            request = waiting.popleft()
            running.append([request.prompt, request.prompt + request.answer])
        if steps == config.requests // 2:
            for row, (length, _) in enumerate(running):
                picture[row, :length], picture[row, length:] = row + 1, -1
        held += sum(length for length, _ in running)
        given += len(running) * config.longest
        texts, steps = texts + len(running), steps + 1
        running = [[length + 1, end] for length, end in running if length + 1 < end]
    return Trace(1 - held / given, texts / steps, steps, picture, (given - held) / texts)


def in_pages(config: Config, page: int) -> Trace:
    """Every text gets pages as it grows; if none is left, the text that came last waits again,
    and is read anew."""
    manager = BlockManager(config.memory // page, page)
    waiting = deque(enumerate(requests(config)))
    running: list[tuple[int, Request, Text, int]] = []
    held = given = texts = steps = 0
    picture = np.zeros((len(manager.references), page), dtype=int)

    def admit() -> None:
        while waiting:
            number, request = waiting[0]
            try:  # no two texts share a token: nothing is saved by sharing
                text, _ = manager.allocate([number] * request.prompt)
            except OutOfBlocks:
                return
            waiting.popleft()
            running.append((number, request, text, request.prompt + request.answer))

    while waiting or running:
        admit()
        if steps == config.requests // 2:
            for place, (*_, text, _) in enumerate(running):
                picture[text.table] = place + 1
                picture[text.table[-1], (len(text.tokens) - 1) % page + 1 :] = -1
        held += sum(len(text.tokens) for _, _, text, _ in running)
        given += sum(len(text.table) for _, _, text, _ in running) * page
        texts, steps = texts + len(running), steps + 1
        for entry in list(running):
            if entry not in running:
                continue
            number, _, text, end = entry
            if len(text.tokens) + 1 >= end:
                manager.free(text)
                running.remove(entry)
                continue
            while True:
                try:
                    manager.append(text, [number])
                    break
                except OutOfBlocks:
                    last = running.pop()
                    manager.free(last[2])
                    waiting.appendleft(last[:2])
                    if last is entry:
                        break
    return Trace(1 - held / given, texts / steps, steps, picture, (given - held) / texts)


def draw_memory(axes: Axes, picture: np.ndarray, title: str) -> None:
    """The memory as a carpet: white is free, black wasted, colours are texts."""
    carpet = np.ones((*picture.shape, 3))
    colours = plt.colormaps["tab20"](picture % 20)[..., :3]
    carpet[picture > 0] = colours[picture > 0]
    carpet[picture < 0] = 0.0
    flat = carpet.reshape(-1, 3)
    rows = 128
    axes.imshow(flat[: len(flat) // rows * rows].reshape(rows, -1, 3), aspect="auto")
    axes.set(title=title, xticks=[], yticks=[])


def main(config: Config) -> list[Finding]:
    slabs = in_slabs(config)
    paged = {page: in_pages(config, page) for page in config.pages}
    shown = paged[config.shown]
    _, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    draw_memory(left, slabs.picture, f"slabs of {config.longest:,}: {slabs.waste:.0%} wasted")
    draw_memory(middle, shown.picture, f"pages of {config.shown}: {shown.waste:.1%} wasted")
    right.loglog(
        config.pages, [100 * trace.waste for trace in paged.values()], "C1s-", label="pages"
    )
    right.axhline(100 * slabs.waste, color="C0", label="slabs")
    right.set_xticks(config.pages, [str(page) for page in config.pages])
    right.xaxis.minorticks_off()
    right.set(xlabel="tokens of a page", ylabel="% of the given memory wasted")
    right.legend()
    return [
        Finding(
            "slabs of the longest text waste",
            slabs.waste,
            expected=within(0.6, 0.85),
            source=f"{KWON}, figure 2: 61.8 to 79.6%",
        ),
        *(
            Finding(
                f"pages of {page} waste",
                trace.waste,
                expected=at_most(0.04) if page <= 16 else None,
                source=f"{KWON}, figure 2: 3.7%" if page == 16 else "",
            )
            for page, trace in paged.items()
        ),
        *(
            Finding(
                f"empty places of a text in pages of {page}, over (page - 1) / 2",
                trace.remainder / ((page - 1) / 2),
                expected=within(0.9, 1.1),
                source="a text ends anywhere in its last page",
            )
            for page, trace in paged.items()
            if 1 < page <= 64
        ),
        Finding("texts in memory at once, in slabs", slabs.texts),
        Finding(f"in pages of {config.shown}", shown.texts),
        Finding(
            "steps until all are answered, slabs over pages",
            slabs.steps / shown.steps,
            "x",
            expected=at_least(1.5),
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    run(main, Config(), quick=Config(requests=150, memory=32768))
