"""What does it cost to wait for the longest text of a batch?

The same requests arrive at the same times at two servers with the same model and memory. The static
one fills a batch, writes until its last text ends, and takes the next batch. The continuous one
lets a request in as soon as there is a place. The clock is the sum of the measured passes.

Expected: answers differ in length, so a static batch runs with few texts most of the time: it needs
more passes for the same tokens, and a short request that comes late waits for a long one.

Run     uv run python weeks/05_kv_cache/continuous_batching.py
"""

import time
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch

from implementations.lab.findings import Finding, at_least, equals
from implementations.lab.script import run
from implementations.models.decoder import Decoder, DecoderConfig
from implementations.serving.engine import Engine, Parameters


@dataclass(frozen=True)
class Config:
    """Static against continuous batching."""

    requests: int = 64
    """how many arrive"""
    batch: int = 8
    """how many run at once"""
    load: float = 1.2
    """arriving work, in what a batch that is always full could do"""
    width: int = 256
    """of a small decoder of four layers with random weights"""


@dataclass
class Served:
    """What one server did."""

    texts: list[list[int]]
    latency: np.ndarray
    """seconds from arrival to the last token"""
    passes: int
    seconds: float


def engine_of(decoder: Decoder, batch: int) -> Engine:
    return Engine(decoder, blocks=16 * batch, page=8, batch=batch, budget=64 + batch)


def serve(engine: Engine, work: list, arrivals: np.ndarray, static: bool) -> Served:
    """All requests; a static server lets them in when it is empty, a batch at a time."""
    clock, passes, queued, running = 0.0, 0, list(range(len(work))), {}
    texts, latency = [[] for _ in work], np.zeros(len(work))
    while queued or running:
        there = [i for i in queued if arrivals[i] <= clock]
        if not there and not running:
            clock = arrivals[queued[0]]
            continue
        if static:
            there = [] if running else there[: engine.scheduler.batch]
        for i in there:
            queued.remove(i)
            running[engine.add(*work[i])] = i
        start = time.perf_counter()
        engine.step()
        clock, passes = clock + time.perf_counter() - start, passes + 1
        for request in [request for request in running if request.finish]:
            i = running.pop(request)
            texts[i], latency[i] = request.tokens, clock - arrivals[i]
    return Served(texts, latency, passes, clock - arrivals[0])


def main(config: Config) -> list[Finding]:
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    shape = DecoderConfig(2048, config.width, 4, 4, 2 * config.width, positions=256)
    decoder = Decoder(shape).eval()
    prompts = [random.integers(2048, size=n).tolist() for n in random.integers(4, 33, 1000)]
    # Many short answers and a few long ones.
    answers = np.minimum(1 + random.geometric(1 / 20, config.requests), 90).tolist()
    wanted = [Parameters(answer) for answer in answers]
    work = list(zip(prompts, wanted, strict=False))
    full = work[: config.batch]
    serve(engine_of(decoder, config.batch), full, np.zeros(len(full)), False)  # warm
    alone = serve(engine_of(decoder, config.batch), full, np.zeros(len(full)), False)
    gap = alone.seconds / alone.passes * np.mean(answers) / config.batch / config.load
    arrivals = np.cumsum(random.exponential(gap, config.requests))
    served = {
        name: serve(engine_of(decoder, config.batch), work, arrivals, name == "static")
        for name in ("static", "continuous")
    }
    static, continuous = served.values()
    draw(served)
    tokens = sum(answers)
    findings = [
        Finding(
            "the static server needs, times the continuous one's passes,",
            static.passes / continuous.passes,
            "x",
            expected=at_least(1.0),
            source="a place that is free is used",
        ),
        Finding(
            "requests that get the same text from both",
            sum(a == b for a, b in zip(static.texts, continuous.texts, strict=True)),
            expected=equals(config.requests),
        ),
        Finding(
            "throughput, continuous over static",
            float(static.seconds / continuous.seconds),
            "x",
            goal=at_least(1.5),
        ),
    ]
    for name, one in served.items():
        findings.append(Finding(f"{name}: throughput", tokens / one.seconds, "tokens/s"))
        findings.append(Finding(f"{name}: tokens a pass", tokens / one.passes))
        for share in (50, 95):
            seconds = float(np.percentile(one.latency, share))
            findings.append(Finding(f"{name}: latency, percentile {share}", seconds, "s"))
    return findings


def draw(served: dict[str, Served]) -> None:
    _, axes = plt.subplots(figsize=(6, 3.6))
    for name, one in served.items():
        axes.step(np.sort(one.latency), np.linspace(0, 1, len(one.latency)), label=name)
    axes.set(xlabel="seconds from arrival to last token", ylabel="share of requests")
    axes.set_title("The same arrivals, static and continuous batches")
    axes.legend()


if __name__ == "__main__":
    run(main, Config(), quick=Config(requests=12, batch=4, width=32))
