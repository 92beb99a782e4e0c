"""What does each step of the pipeline on Hopper bring, and how much should it?

Attention's products, exponentials and copies are done by different units of a multiprocessor. One
after the other they take three times as long as the products alone. The ladder switches one overlap
on in turn: copies by a producer, two warpgroups side by side, two products in flight over the
softmax, programs that stay, equal work for each of them. The prediction adds up the cycles of the
units (implementations/attention/pipeline.py); it is a range, from two warpgroups that always do the
same thing at the same time to two that take turns. The measurement is of the same steps as kernels.

Expected: without any overlap but that of the copies, 2048 of 3456 cycles are products: a share of
0.59 of the matrix rate, 0.67 if the exponentials were all there is. No step is above its bound, and
the last is at least as fast as cuDNN.

Run     uv run python weeks/04_flash_attention/hopper_pipeline.py
        uv run python weeks/04_flash_attention/hopper_pipeline.py --device cuda
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from implementations.attention.pipeline import (
    COPY,
    COPY_LATENCY,
    DIM,
    KEYS,
    PRODUCTS,
    SIZE,
    STEPS,
    Costs,
    Line,
    copied_bytes,
    kernel_cycles,
    lost_in_a_block,
    simulate,
    useful_operations,
)
from implementations.attention.vendor import attention_sdpa
from implementations.attention_basic import attention_naive
from implementations.lab.compare import allowed, error
from implementations.lab.findings import Finding, at_least, at_most, within
from implementations.lab.script import run
from implementations.lab.timing import time_interleaved

RECORDS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Config:
    """Steps of the pipeline, predicted and, on a Hopper GPU, measured; dim 128, bfloat16."""

    lengths: tuple[int, ...] = (4096, 16384)
    tokens: int = 16384
    """tokens in a batch, with 16 heads"""
    programs: int = 132
    """multiprocessors of the GPU that is predicted: an H100 or H200 has 132; on a GPU, its own"""
    rounds: int = 15
    device: str = "cpu"


Shares = dict[str, dict[str, tuple[float, float]]]
"""of the matrix rate, at worst and at best, by case and step"""
HEADS = 16
CYCLES = 500_000  # 0.3 ms


def cases(config: Config) -> dict[str, tuple[int, bool]]:
    """Length and whether causal, by name."""
    return {
        f"{'causal' if causal else 'full'}, {length} keys": (length, causal)
        for causal in (False, True)
        for length in config.lengths
    }


def predict(config: Config, delay: float = 0.0) -> Shares:
    """Bounds of whole launches, from cycles; with a delay in every block, expectations."""
    shares: Shares = {}
    for case, (length, causal) in cases(config).items():
        planes = HEADS * config.tokens // length
        useful = useful_operations(planes, length, causal) / (config.programs * PRODUCTS)
        shares[case] = {}
        for step in STEPS:
            worst, best = (
                useful
                / kernel_cycles(step, planes, length, causal, config.programs, in_step, delay)
                for in_step in (True, False)
            )
            shares[case][step] = worst, best
    return shares


def predictions(shares: Shares) -> list[Finding]:
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


def tick(*inputs: Tensor) -> None:
    """Rest for so many cycles: as one of the timed functions it tells how long a cycle is now.

    A GPU under load lowers its clock, so the clock is that of the same rounds.
    """
    torch.cuda._sleep(CYCLES)


def measure(config: Config, predicted: Shares) -> tuple[list[Finding], dict[str, dict[str, float]]]:
    """Correctness first, then every step and cuDNN in turns; shares of the matrix rate by case."""
    from implementations.attention.pipeline_hopper import COPIES, attention_step

    findings = [
        Finding("multiprocessors", config.programs),
        Finding(
            "worst error of a step, in what naive's own allows it", worst_error(),
            expected=at_most(1.0),
        ),
    ]  # fmt: skip
    shares = {}
    for case, (length, causal) in cases(config).items():
        shape = (config.tokens // length, HEADS, length, DIM)
        inputs = [torch.randn(shape, device=config.device).bfloat16() for _ in range(3)]
        with_gradient = inputs[0].clone().requires_grad_()
        calls = forms(causal) | {
            "cuDNN": lambda q, k, v, g=with_gradient, c=causal: sdpa_cudnn(g, k, v, c),
            "copies": lambda q, k, v, c=causal: attention_step(COPIES, q, k, v, causal=c),
            "clock": tick,
        }
        timings = time_interleaved(calls, *inputs, rounds=config.rounds)
        hertz = CYCLES / timings.median("clock")
        cycles = {name: timings.median(name) * hertz for name in calls}
        planes = shape[0] * HEADS
        useful = useful_operations(planes, length, causal)
        shares[case] = {
            name: useful / (cycles[name] * config.programs * PRODUCTS) for name in (*STEPS, "cuDNN")
        }
        rate = copied_bytes(planes, length, causal) / (cycles["copies"] * config.programs)
        findings += [
            Finding(f"{case}: clock", hertz / 1e9, "GHz"),
            Finding(f"{case}: copies alone, of each multiprocessor", rate, "bytes/cycle"),
        ]
        for name, share in shares[case].items():
            # The bound of the first step holds a latency that was assumed; the others' do not.
            bounded = name in STEPS and name != "in turn"
            bound = at_most(predicted[case][name][1]) if bounded else None
            claim = f"{case}, {name}: share of the matrix rate"
            findings.append(Finding(claim, share, expected=bound))
        for name in ("in pairs", "cuDNN"):
            speed = useful / timings.median(name) / 1e12
            findings.append(Finding(f"{case}, {name}: speed", speed, "TFLOP/s"))
        findings.append(
            Finding(
                f"{case}, in pairs: times cuDNN's speed",
                timings.ratio("in pairs", "cuDNN"),
                "x",
                goal=at_least(1.0),
                spread=timings.spread("in pairs", "cuDNN"),
            )
        )
    delay = lost(config, shares)
    findings.append(Finding("lost in each block of the second step", delay, "cycles"))
    expected = predict(config, delay)
    for step in list(STEPS)[2:]:
        inside = sum(
            low <= shares[case][step] <= high
            for case, steps in expected.items()
            for low, high in [steps[step]]
        )
        claim = f"{step}: cases in the range that this loss predicts, of {len(expected)}"
        findings.append(Finding(claim, inside))
    return findings + waiting(config), shares, delay


def lost(config: Config, shares: dict[str, dict[str, float]]) -> float:
    """Cycles beyond the prediction in each block of the second step, full and longest."""
    length = max(config.lengths)
    planes = HEADS * config.tokens // length
    share = shares[f"full, {length} keys"]["copies ahead"]
    cycles = useful_operations(planes, length, False) / (share * config.programs * PRODUCTS)
    return lost_in_a_block(cycles, planes, length, False, config.programs)


def waiting(config: Config) -> list[Finding]:
    """How long a program waits for a copy that nothing hides; the first step with that."""
    from implementations.attention.pipeline_hopper import COPIES_IN_TURN, attention_step

    length = max(config.lengths)
    shape = (config.tokens // length, HEADS, length, DIM)
    inputs = [torch.randn(shape, device=config.device).bfloat16() for _ in range(3)]
    calls = {"copies": lambda *x: attention_step(COPIES_IN_TURN, *x), "clock": tick}
    timings = time_interleaved(calls, *inputs, rounds=config.rounds)
    cycles = timings.median("copies") * CYCLES / timings.median("clock")
    wait = cycles / (2 * length / KEYS)
    in_turn = Line.of("copies ahead").block + 2 * wait
    return [
        Finding("wait for a copy that nothing hides", wait, "cycles"),
        Finding("the same, assumed in the prediction", COPY + COPY_LATENCY, "cycles"),
        Finding(
            "a block in turn with that wait: share of the matrix rate",
            2 * Costs.of(SIZE).product / in_turn,
        ),
    ]


def recorded(config: Config) -> tuple[str, dict[str, dict[str, float]], float]:
    """A record made on a GPU: its name, shares and lost cycles; nothing if none has the cases."""
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
        if all(len(points) == len(STEPS) + 1 for points in shares.values()):
            return f"recorded on an {record['device']}", shares, lost(config, shares)
    return "", {}, 0.0


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
    predicted: Shares,
    expected: Shares,
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
    left.suptitle("the units, taking turns: one warpgroup blue, the other orange", fontsize=10)
    grid = right.subplots(2, len(config.lengths), sharex=True, sharey=True, squeeze=False)
    for axes, (case, steps) in zip(grid.flat, predicted.items(), strict=True):
        draw_ranges(axes, steps, -0.2 if measured else 0, "0.8")
        if measured:
            draw_ranges(axes, expected[case], 0.2, "C2")
            points = [measured[case][step] for step in steps]
            axes.plot(range(len(steps)), points, "ko-", markersize=4, linewidth=1)
            axes.axhline(measured[case]["cuDNN"], color="C3", linestyle="--", linewidth=1)
            axes.text(-0.4, measured[case]["cuDNN"] + 0.015, "cuDNN", color="C3", fontsize=8)
        axes.set_title(case, fontsize=9)
        axes.set_xticks(range(len(steps)), list(steps), rotation=35, ha="right", fontsize=8)
        axes.set_ylim(0, 1)
    for axes in grid[:, 0]:
        axes.set_ylabel("share of the matrix rate", fontsize=8)
    title = "grey: predicted, from always in step to taking turns; "
    if measured:
        title += f"points: measured, {source}\n"
        title += "green: predicted with what each block of 'copies ahead' was seen to lose"
    right.suptitle(title if measured else title + "nothing measured yet", fontsize=10)


def draw_ranges(
    axes: Axes, steps: dict[str, tuple[float, float]], shift: float, colour: str
) -> None:
    """A bar from the worst to the best of each step; a range of nothing is a line."""
    for place, (worst, best) in enumerate(steps.values()):
        low = min(worst, best - 0.008)
        axes.bar(place + shift, best - low, bottom=low, color=colour, width=0.36)


def main(config: Config) -> list[Finding]:
    torch.manual_seed(0)
    if config.device == "cpu":
        predicted = predict(config)
        source, measured, delay = recorded(config)
        findings = predictions(predicted)
        findings.append(Finding("measurements drawn beside the predictions", source or "none"))
    else:
        from implementations.attention.hopper_tiles import multiprocessors

        config = replace(config, programs=multiprocessors(torch.device(config.device)))
        predicted = predict(config)
        findings, measured, delay = measure(config, predicted)
        source = f"on an {torch.cuda.get_device_name(config.device)}"
    draw(config, predicted, predict(config, delay), measured, source)
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(lengths=(4096,), rounds=3))
