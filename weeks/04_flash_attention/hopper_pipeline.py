"""What does each step of the pipeline on Hopper bring, and how much should it?

Attention's products, exponentials and copies are done by different units of a multiprocessor. One
after the other they take three times as long as the products alone. The ladder switches one overlap
on in turn: copies by a producer, two warpgroups side by side, two products in flight over the
softmax, programs that stay, equal work for each of them. The prediction adds up the cycles of the
units (implementations/attention/pipeline.py); it is a range, from two warpgroups that always do the
same thing at the same time to two that take turns. The measurement is of the same steps as kernels.

Expected: without any overlap but that of the copies, 2048 of 3456 cycles are products: a share of
0.59 of the matrix rate, 0.67 if the exponentials were all there is. Each step is worth its lines,
and the last is at least as fast as cuDNN.

Run     uv run python weeks/04_flash_attention/hopper_pipeline.py
        uv run python weeks/04_flash_attention/hopper_pipeline.py --device cuda
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from implementations.attention.pipeline import (
    COPY,
    DIM,
    KEYS,
    PRODUCTS,
    SIZE,
    STEPS,
    Costs,
    Line,
    kernel_cycles,
    simulate,
    useful_operations,
)
from implementations.attention.vendor import attention_sdpa
from implementations.attention_basic import attention_naive
from implementations.lab.compare import allowed, error
from implementations.lab.findings import Finding, at_least, at_most, within
from implementations.lab.script import run
from implementations.lab.timing import FLUSHES, L2_FLUSH_BYTES, time_interleaved

RECORDS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Config:
    """Steps of the pipeline, predicted and, on a Hopper GPU, measured; dim 128, bfloat16."""

    lengths: tuple[int, ...] = (4096, 16384)
    tokens: int = 16384
    """tokens in a batch, with 16 heads"""
    programs: int = 132
    """multiprocessors of the GPU that the prediction is for: an H100 or H200 has 132"""
    rounds: int = 15
    device: str = "cpu"


HEADS = 16
SLEEP = 500_000  # cycles that tell how long a cycle is: 0.3 ms


def cases(config: Config) -> dict[str, tuple[int, bool]]:
    """Length and whether causal, by name."""
    return {
        f"{'causal' if causal else 'full'}, {length} keys": (length, causal)
        for causal in (False, True)
        for length in config.lengths
    }


def predict(config: Config) -> dict[str, dict[str, tuple[float, float]]]:
    """Share of the matrix rate at worst and at best, by case and step."""
    shares: dict[str, dict[str, tuple[float, float]]] = {}
    for case, (length, causal) in cases(config).items():
        planes = HEADS * config.tokens // length
        useful = useful_operations(planes, length, causal) / (config.programs * PRODUCTS)
        shares[case] = {}
        for step in STEPS:
            worst, best = (
                useful / kernel_cycles(step, planes, length, causal, config.programs, in_step)
                for in_step in (True, False)
            )
            shares[case][step] = worst, best
    return shares


def predictions(shares: dict[str, dict[str, tuple[float, float]]]) -> list[Finding]:
    """The bound by hand, the same by simulation, and the ranges of whole launches."""
    costs = Costs.of(SIZE)
    products = 2 * costs.product
    in_turn = products + costs.exponentials + costs.maxima + costs.shrinking
    apart = abs(Line.of("copies ahead").block - in_turn)
    findings = [
        Finding("products of a block of 128 queries and 128 keys", products, "cycles"),
        Finding("its exponentials", costs.exponentials, "cycles"),
        Finding("its maxima, and shrinking the output", costs.maxima + costs.shrinking, "cycles"),
        Finding("copying its keys and values", 2 * COPY, "cycles"),
        Finding(
            "without overlap, products and exponentials alone: share of the matrix rate",
            products / (products + costs.exponentials),
            expected=within(0.66, 0.67),
        ),
        Finding(
            "cycles of a block with its softmax in turn: simulated, away from their sum by",
            apart,
            expected=at_most(1e-6),
        ),
    ]
    for case, steps in shares.items():
        for step, (worst, best) in steps.items():
            name = f"predicted, {case}, {step}"
            findings.append(Finding(f"{name}: share of the matrix rate, at most", best))
            if worst < best:
                findings.append(Finding(f"{name}: the same if warpgroups go in step", worst))
    return findings


def sdpa_cudnn(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """CuDNN's kernel and no other, as it is when gradients are wanted: with the log-sum-exp."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return attention_sdpa(query, key, value, causal=causal)


def forms(causal: bool) -> dict[str, Callable[..., Tensor]]:
    """The steps of the ladder as kernels."""
    from implementations.attention.flash_hopper import flash_attention_hopper
    from implementations.attention.pipeline_hopper import KERNELS, attention_step

    steps: dict[str, Callable[..., Tensor]] = {}
    for name in STEPS:
        if name in KERNELS:
            steps[name] = lambda q, k, v, s=KERNELS[name]: attention_step(s, q, k, v, causal=causal)
        else:
            steps[name] = lambda q, k, v: flash_attention_hopper(q, k, v, causal=causal)
    return steps


def worst_error() -> float:
    """Mean error of every step over what naive's own error allows it: at most 1."""
    found = []
    for causal in (False, True):
        query, key, value = (torch.randn(2, 5, 1152, DIM, device="cuda") for _ in range(3))
        inputs = [x.bfloat16() for x in (4 * query, key, value)]
        exact = attention_naive(*(x.double() for x in inputs), causal=causal)
        limit = allowed(attention_naive(*inputs, causal=causal), exact)
        for step in forms(causal).values():
            seen = error(step(*inputs), exact)
            found += [seen.mean / limit.mean, seen.largest / limit.largest]
    return max(found)


def hertz(function: Callable, inputs: list[Tensor], rounds: int = 5) -> float:
    """Cycles a second right after a call that was timed as `time_interleaved` times it.

    A GPU under load lowers its clock, and more for one kernel than for another.
    """
    rates = []
    for _ in range(rounds):
        for _ in range(FLUSHES):
            torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda").zero_()
        function(*inputs)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(SLEEP)
        end.record()
        torch.cuda.synchronize()
        rates.append(SLEEP / start.elapsed_time(end) * 1e3)
    return statistics.median(rates)


def measure(config: Config) -> tuple[list[Finding], dict[str, dict[str, float]]]:
    """Correctness first, then every step and cuDNN in turns; shares of the matrix rate by case."""
    from implementations.attention.flash_hopper import multiprocessors
    from implementations.attention.pipeline_hopper import COPIES, attention_step

    programs = multiprocessors(torch.device(config.device))
    findings = [
        Finding("multiprocessors", programs),
        Finding(
            "worst error of a step, in what naive's own allows it", worst_error(),
            expected=at_most(1.0),
        ),
    ]  # fmt: skip
    shares: dict[str, dict[str, float]] = {}
    for case, (length, causal) in cases(config).items():
        shape = (config.tokens // length, HEADS, length, DIM)
        inputs = [torch.randn(shape, device=config.device).bfloat16() for _ in range(3)]
        planes = shape[0] * HEADS
        useful = useful_operations(planes, length, causal)
        with_gradient = inputs[0].clone().requires_grad_()
        calls = forms(causal) | {
            "cuDNN": lambda q, k, v, g=with_gradient, c=causal: sdpa_cudnn(g, k, v, c),
            "copies": lambda q, k, v, c=causal: attention_step(COPIES, q, k, v, causal=c),
        }
        timings = time_interleaved(calls, *inputs, rounds=config.rounds)
        shares[case] = {}
        for name, call in calls.items():
            clock = hertz(call, inputs)
            seconds = timings.median(name)
            if name == "copies":
                blocks = useful / (4 * SIZE * KEYS * DIM) + planes * length / SIZE / 2 * causal
                bytes_read = (blocks * 2 * KEYS + planes * length) * DIM * 2
                findings.append(
                    Finding(
                        f"{case}: copies alone, of each multiprocessor",
                        bytes_read / (seconds * clock * programs),
                        "bytes/cycle",
                    )
                )
                continue
            shares[case][name] = useful / (seconds * clock * programs * PRODUCTS)
            label = f"{case}, {name}"
            findings += [
                Finding(f"{label}: speed", useful / seconds / 1e12, "TFLOP/s"),
                Finding(f"{label}: clock", clock / 1e9, "GHz"),
                Finding(f"{label}: share of the matrix rate", shares[case][name]),
            ]
            if name != "cuDNN":
                goal = at_least(1.0) if name == "in pairs" else None
                ratio, spread = timings.ratio(name, "cuDNN"), timings.spread(name, "cuDNN")
                label += ", times cuDNN's speed"
                findings.append(Finding(label, ratio, "x", goal=goal, spread=spread))
    return findings, shares


def recorded(config: Config) -> tuple[str, dict[str, dict[str, float]]]:
    """The measured shares of a record made on a GPU, and its name; none if there is no record."""
    for path in sorted(RECORDS.glob(f"{Path(__file__).stem}.*.json")):
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
        found = {entry["claim"]: entry["measured"] for entry in record["findings"]}
        shares = {
            case: {
                step: found[claim]
                for step in (*STEPS, "cuDNN")
                if (claim := f"{case}, {step}: share of the matrix rate") in found
            }
            for case in cases(config)
        }
        return f"recorded on an {record['device']}, {record['date']}", shares
    return "", {}


COLOURS = {"both": "C7", "producer": "C7", "first": "C0", "second": "C1"}
UNITS = ("exponentials", "products", "copies")
SHOWN = 7000  # cycles


def draw_timeline(axes: Axes, step: str) -> None:
    """What the units of a multiprocessor do for a while, in the middle of a tile."""
    block = Line.of(step).block
    begin = 8 * block
    for unit, who, start, stop in simulate(step, [24])[1]:
        row = UNITS.index("exponentials" if unit == "arithmetic" else unit)
        start, stop = max(start - begin, 0), min(stop - begin, SHOWN)
        if start < stop:
            axes.barh(row, stop - start, left=start, height=0.8, color=COLOURS[who], linewidth=0)
    axes.set_yticks(range(3), ["softmax", "products", "copies"], fontsize=7)
    axes.set_xlim(0, SHOWN)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title(step, loc="left", fontsize=9, pad=2)


def draw(
    config: Config,
    predicted: dict[str, dict[str, tuple[float, float]]],
    measured: dict[str, dict[str, float]],
    source: str,
) -> None:
    """Left the timelines, right the ranges and the points of each case."""
    figure = plt.figure(figsize=(13, 6.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.25])
    drawn = list(STEPS)[:4]
    panels = left.subplots(len(drawn), 1, sharex=True)
    for axes, step in zip(panels, drawn, strict=True):
        draw_timeline(axes, step)
    panels[-1].set_xlabel("cycles", fontsize=8)
    left.suptitle("what the units do, simulated: one warpgroup blue, the other orange", fontsize=10)
    grid = right.subplots(2, len(config.lengths), sharex=True, sharey=True, squeeze=False)
    for axes, (case, steps) in zip(grid.flat, predicted.items(), strict=True):
        for place, (worst, best) in enumerate(steps.values()):
            low = min(worst, best - 0.006)  # a range of nothing is a line
            axes.bar(place, best - low, bottom=low, color="0.8", width=0.7)
        points = measured.get(case, {})
        if points:
            axes.plot(range(len(steps)), [points[step] for step in steps], "ko-", markersize=4)
            axes.axhline(points["cuDNN"], color="C3", linestyle="--", linewidth=1)
            axes.text(-0.4, points["cuDNN"] + 0.015, "cuDNN", color="C3", fontsize=8)
        axes.set_title(case, fontsize=9)
        axes.set_xticks(range(len(steps)), list(steps), rotation=35, ha="right", fontsize=8)
        axes.set_ylim(0, 1)
    for axes in grid[:, 0]:
        axes.set_ylabel("share of the matrix rate", fontsize=8)
    points = f"points: measured ({source})" if source else "nothing measured yet"
    right.suptitle(f"bars: predicted, in step to taking turns; {points}", fontsize=10)


def main(config: Config) -> list[Finding]:
    torch.manual_seed(0)
    predicted = predict(config)
    findings = predictions(predicted)
    if config.device == "cpu":
        source, measured = recorded(config)
        findings.append(Finding("measurements drawn beside the predictions", source or "none"))
    else:
        new, measured = measure(config)
        findings, source = findings + new, torch.cuda.get_device_name(config.device)
    draw(config, predicted, measured, source)
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(lengths=(4096,), rounds=3))
