"""What does attention cost when the text gets longer?

A layer of attention does two kinds of work. The projections treat every token alone: their cost is
proportional to the length. The scores compare every token with every other: their cost, and the
memory that the equation as written needs for them, is proportional to its square.

Expected: fitted exponents of 1 and 2 in operations, and 2 in memory; in seconds, 2 for the scores
at large lengths, where they fill no cache.

Run     uv run python weeks/01_attention/attention_cost.py
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from implementations.attention.multi_head import MultiHeadAttention
from implementations.lab.findings import Finding, within
from implementations.lab.memory import peak_bytes
from implementations.lab.script import run
from implementations.lab.timing import time_interleaved

PARTS = ("projections", "scores")


@dataclass(frozen=True)
class Config:
    """Time, operations and memory of one attention layer by length."""

    lengths: tuple[int, ...] = (512, 768, 1024, 1536, 2048, 3072, 4096)
    """texts of so many tokens; exponents are fitted to the upper half"""
    width: int = 256
    heads: int = 4
    rounds: int = 7
    """timed rounds for each length"""
    device: str = "cpu"


def operations(function, *inputs: Tensor) -> int:
    """Floating-point operations of the call's matrix products."""
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


def exponent(lengths: list[int], costs: list[float]) -> float:
    """The slope of log cost against log length, over the upper half of the lengths."""
    half = len(lengths) // 2
    slope, _ = np.polyfit(np.log(lengths[half:]), np.log(costs[half:]), 1)
    return float(slope)


@torch.no_grad()
def measure(config: Config) -> dict[str, list[float]]:
    """Costs of the projections and of the scores at every length."""
    layer = MultiHeadAttention(config.width, config.heads).to(config.device)
    names = [f"{part} {cost}" for part in PARTS for cost in ("seconds", "operations", "bytes")]
    costs: dict[str, list[float]] = {name: [] for name in names}
    for length in tqdm(config.lengths, desc="lengths", unit="length"):
        x = torch.randn(1, length, config.width, device=config.device)
        inputs = {"projections": (x,), "scores": layer.project(x)}
        functions = {"projections": layer.project, "scores": layer.attention}
        for part in PARTS:
            function, arguments = functions[part], inputs[part]
            timings = time_interleaved({part: function}, *arguments, rounds=config.rounds)
            costs[f"{part} seconds"].append(timings.median(part))
            costs[f"{part} operations"].append(operations(function, *arguments))
            costs[f"{part} bytes"].append(peak_bytes(function, *arguments))
    return costs


def draw(lengths: tuple[int, ...], costs: dict[str, list[float]]) -> None:
    """Three panels on logarithmic axes, where a power is a straight line."""
    _, panels = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axes, cost in zip(panels, ("seconds", "operations", "bytes"), strict=True):
        for part, marker in zip(PARTS, "os", strict=True):
            values = costs[f"{part} {cost}"]
            slope = exponent(list(lengths), values)
            axes.loglog(lengths, values, marker=marker, label=f"{part}: length^{slope:.2f}")
        axes.set(title=cost, xlabel="length in tokens")
        axes.set_xticks(lengths, [str(length) for length in lengths], rotation=45, minor=False)
        axes.minorticks_off()
        axes.legend()
    panels[0].figure.suptitle("One attention layer: the part that grows with the square")


def main(config: Config) -> list[Finding]:
    torch.manual_seed(0)
    costs, lengths = measure(config), list(config.lengths)
    draw(config.lengths, costs)
    fit = {name: exponent(lengths, values) for name, values in costs.items()}
    share = costs["scores seconds"][-1] / sum(costs[f"{part} seconds"][-1] for part in PARTS)
    return [
        Finding(
            "operations of the scores grow with length to the power",
            fit["scores operations"],
            expected=within(1.99, 2.01),
            source="4 · length² · width",
        ),
        Finding(
            "operations of the projections, to the power",
            fit["projections operations"],
            expected=within(0.99, 1.01),
            source="6 · length · width²",
        ),
        Finding(
            "memory of the scores, to the power",
            fit["scores bytes"],
            expected=within(1.9, 2.1),
            source="several matrices of heads · length²",
        ),
        # Seconds are a goal, not an expectation: another program may be using the machine.
        Finding(
            "seconds of the scores, to the power", fit["scores seconds"], goal=within(1.9, 2.1)
        ),
        Finding("seconds of the projections, to the power", fit["projections seconds"]),
        Finding(f"share of the scores in the time at {lengths[-1]} tokens", share),
        Finding(
            f"memory of the equation as written at {lengths[-1]} tokens",
            costs["scores bytes"][-1] / 2**20,
            "MiB",
        ),
    ]


if __name__ == "__main__":
    run(main, Config(), quick=Config(lengths=(128, 192, 256, 384, 512), rounds=3))
