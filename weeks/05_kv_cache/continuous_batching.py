"""What does it cost to wait for the longest text of a batch?

The same requests arrive at the same times at two servers with the same model and memory. The static
one fills a batch, writes until its last text ends, and takes the next batch. The continuous one
lets a request in as soon as there is a place. The clock is the sum of the measured passes. Both
serve in turn, with other prompts each time, so that none is known from before.

Expected: answers differ in length, so a static batch runs with few texts most of the time: it needs
more passes for the same tokens, and a short request that comes late waits for a long one. On a GPU
the model is of SmolLM2's shape in bfloat16, with kernels and CUDA graphs; its weights are random
here too, and near ties let some texts part.

Run     uv run python weeks/05_kv_cache/continuous_batching.py
        uv run python weeks/05_kv_cache/continuous_batching.py --device cuda --requests 512
        --batch 64
"""

import statistics
import time
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch

from implementations.lab.findings import Finding, at_least, equals
from implementations.lab.script import run
from implementations.lab.timing import over_rounds
from implementations.models.decoder import SMOLLM2, Decoder, DecoderConfig
from implementations.serving.engine import Engine, Parameters

VOCABULARY = 2048  # tokens that prompts are made of


@dataclass(frozen=True)
class Config:
    """Static against continuous batching."""

    device: str = "cpu"
    requests: int = 64
    """how many arrive"""
    batch: int = 8
    """how many run at once"""
    load: float = 1.2
    """arriving work, in what a batch that is always full could do"""
    width: int = 256
    """of a small decoder of four layers with random weights, on a CPU"""
    rounds: int = 5
    """how often both serve"""


@dataclass
class Served:
    """What one server did."""

    texts: list[list[int]]
    latency: np.ndarray
    """seconds from arrival to the last token"""
    passes: int
    seconds: float


def engine_of(config: Config) -> Engine:
    """An engine with room for a batch; in float64 on a CPU, where no near tie turns."""
    batch = config.batch
    sizes = {"blocks": 16 * batch, "page": 8, "batch": batch, "budget": 64 + batch, "longest": 128}
    torch.manual_seed(0)
    if config.device == "cpu":
        shape = DecoderConfig(VOCABULARY, config.width, 4, 4, 2 * config.width, positions=256)
        return Engine(Decoder(shape).double().eval(), **sizes)
    from implementations.attention.paged_triton import attention_paged_triton
    from implementations.models.decoder_triton import decoder_triton
    from implementations.serving.paged_cache_triton import reader_triton

    decoder = decoder_triton(SMOLLM2).to(config.device, torch.bfloat16).eval()
    kernels = {"attention": attention_paged_triton, "reader": reader_triton}
    return Engine(decoder, **sizes, **kernels, graphs=True)


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
    return Served(texts, latency, passes, float(clock - arrivals[0]))


def main(config: Config) -> list[Finding]:
    random = np.random.default_rng(0)
    # Many short answers and a few long ones.
    answers = np.minimum(1 + random.geometric(1 / 20, config.requests), 90).tolist()
    lengths = random.integers(4, 33, config.requests)

    def work() -> list:
        prompts = [random.integers(VOCABULARY, size=length).tolist() for length in lengths]
        return list(zip(prompts, map(Parameters, answers), strict=True))

    engines = {name: engine_of(config) for name in ("static", "continuous")}
    for _ in range(2):  # the first compiles
        full = work()[: config.batch]
        alone = serve(engines["continuous"], full, np.zeros(len(full)), False)
    serve(engines["static"], full, np.zeros(len(full)), True)
    gap = alone.seconds / alone.passes * np.mean(answers) / config.batch / config.load
    arrivals = np.cumsum(random.exponential(gap, config.requests))
    served: dict[str, list[Served]] = {name: [] for name in engines}
    for turn in range(config.rounds):
        now = work()
        for name in list(engines)[:: 1 if turn % 2 else -1]:
            served[name].append(serve(engines[name], now, arrivals, name == "static"))
    draw(served)
    pairs = list(zip(served["static"], served["continuous"], strict=True))
    gains = [static.seconds / continuous.seconds for static, continuous in pairs]
    same = [a == b for pair in pairs for a, b in zip(*(one.texts for one in pair), strict=True)]
    findings = [
        Finding(
            "the static server needs, times the continuous one's passes,",
            statistics.median(static.passes / continuous.passes for static, continuous in pairs),
            "x",
            expected=at_least(1.0),
            source="a place that is free is used",
        ),
        Finding(
            "requests that get the same text from both",
            sum(same),
            f"of {len(same):,}",
            expected=equals(len(same)) if config.device == "cpu" else None,
        ),
        Finding(
            "throughput, continuous over static",
            unit="x",
            goal=at_least(1.5),
            **over_rounds(gains),
        ),
    ]
    tokens = sum(answers)
    for name, turns in served.items():
        rate = statistics.median(tokens / one.seconds for one in turns)
        each = statistics.median(tokens / one.passes for one in turns)
        findings.append(Finding(f"{name}: throughput", rate, "tokens/s"))
        findings.append(Finding(f"{name}: tokens a pass", each))
        for share in (50, 95):
            seconds = float(np.percentile(np.concatenate([one.latency for one in turns]), share))
            findings.append(Finding(f"{name}: latency, percentile {share}", seconds, "s"))
    return findings


def draw(served: dict[str, list[Served]]) -> None:
    _, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, turns in served.items():
        latency = np.sort(np.concatenate([one.latency for one in turns]))
        axes.step(latency, np.linspace(0, 1, len(latency)), label=name)
    axes.set(xlabel="seconds from arrival to last token", ylabel="share of requests")
    axes.set_title("The same arrivals, static and continuous batches")
    axes.legend()


if __name__ == "__main__":
    run(main, Config(), quick=Config(requests=8, batch=4, width=16, rounds=1))
