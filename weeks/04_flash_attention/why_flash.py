"""Why is attention slow and large, when it computes so little?

The equation as written makes matrices of queries times keys and carries each of them to memory and
back, several times. FlashAttention computes the same numbers in tiles that stay in a small memory,
and carries none of them. Here both are counted: the memory held at once, forward and backward; the
bytes moved by the forward; and, with the machine's own two ceilings, what those bytes allow.

Expected, for n tokens of dim d, and tiles of B rows, four of which fit in a small memory of
M = 4 B d numbers: the memory held grows with n instead of n². The numbers moved are
2 n d + n + 2 n² d / B, so about 8 n² d² / M: four times the small memory, a quarter of the traffic.
The equation moves a multiple of n², whatever the memory. No cache is counted: a form whose
neighbours read the same keys at the same time can stand above its roof.

Run     uv run python weeks/04_flash_attention/why_flash.py
        uv run python weeks/04_flash_attention/why_flash.py --device cuda --heads 16
        --tile 128 --memory 4096 --rate-size 8192
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor
from tqdm import tqdm

from implementations.attention.flash import Traffic, flash_attention
from implementations.attention_basic import attention_naive
from implementations.lab.findings import Finding, at_least, equals, within
from implementations.lab.memory import moved_bytes, peak_bytes
from implementations.lab.script import run
from implementations.lab.timing import time_interleaved


@dataclass(frozen=True)
class Config:
    """Memory held, bytes moved and the roofline of attention, as written and in tiles."""

    lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    """texts of so many tokens; exponents are fitted to the upper half"""
    heads: int = 1
    dim: int = 64
    tile: int = 64
    """rows of a tile where bytes are counted by length, and for the roofline: the kernel's own"""
    tiles: tuple[int, ...] = (16, 32, 64, 128)
    """rows of a tile where bytes are counted by small memory"""
    memory: int = 8
    """MiB that the longest text may take, forward and backward"""
    roof_length: int = 4096
    """tokens where speed is measured: matrices that no cache holds"""
    rate_size: int = 1024
    """rows of the square matrices that measure the machine's own rates"""
    rounds: int = 9
    device: str = "cpu"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    def draw(self, length: int) -> list[Tensor]:
        shape = (1, self.heads, length, self.dim)
        return [torch.randn(shape, dtype=self.dtype, device=self.device) for _ in range(3)]


Attention = Callable[..., Tensor]
STYLES = {"as written": "C0o-", "in tiles": "C1s-"}  # formulas are black and dashed


def tiled(config: Config) -> Attention:
    """The readable form on a CPU, our kernel on a GPU."""
    if config.device == "cpu":
        return partial(flash_attention, query_tile=config.tile, key_tile=config.tile)
    from implementations.attention.flash_triton import flash_attention_triton

    return flash_attention_triton


def peak(attention: Attention, inputs: list[Tensor]) -> int:
    """Bytes held at once by a forward and a backward, beyond the inputs."""

    def both(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        output = attention(*leaves)
        return torch.autograd.grad(output, leaves, torch.ones_like(output))

    if inputs[0].is_cuda:
        both(*inputs)  # cuBLAS takes its workspace at the first call, and keeps it
    return peak_bytes(both, *inputs)


def moved_by_tiles(config: Config, length: int, tile: int) -> int:
    """Bytes that the forward in tiles carries, as the readable form counts them."""
    traffic = Traffic()
    options = {"query_tile": tile, "key_tile": tile, "traffic": traffic}
    flash_attention(*config.draw(length), **options)
    return traffic.moved


def formula(config: Config, length: int, tile: int) -> float:
    """2 n d + n + 2 n² d / B: query and output, the log-sum-exp, all keys for each query tile."""
    element = config.dtype.itemsize
    each = 2 * length * config.dim + 2 * math.ceil(length / tile) * length * config.dim
    return config.heads * (element * each + 4 * length)


def exponent(sizes: list[int], costs: list[float]) -> float:
    """The slope of log cost against log size, over the upper half of the sizes."""
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(costs[half:]), 1)[0])


def longest(config: Config, costs: list[float], degree: int) -> int:
    """The most tokens whose peak fits in the budget, by a polynomial through the peaks."""
    fit = np.polyfit(config.lengths, costs, degree)
    fit[-1] -= config.memory * 2**20
    return int(max(np.roots(fit).real))


def rates(config: Config) -> tuple[float, float]:
    """The machine's FLOP/s in a matrix product and bytes/s in a copy."""
    shape = config.rate_size, config.rate_size
    square = torch.randn(shape, dtype=config.dtype, device=config.device)
    large = torch.randn(64 * shape[0] * shape[1], dtype=config.dtype, device=config.device)
    product = time_interleaved({"product": lambda x: x @ x}, square, rounds=config.rounds)
    copy = time_interleaved({"copy": torch.clone}, large, rounds=config.rounds)
    flops = 2 * config.rate_size**3 / product.median("product")
    return flops, 2 * large.nbytes / copy.median("copy")


def plot_lines(axes: Axes, sizes: tuple[int, ...], lines: dict[str, list[float]], **labels):
    """Logarithmic axes, where a power is a straight line."""
    for name, values in lines.items():
        axes.loglog(sizes, values, STYLES.get(name, "k--"), label=name)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.xaxis.minorticks_off()
    axes.set(**labels)
    axes.legend()


def plot_roof(axes: Axes, flops: float, bandwidth: float, points: dict[str, tuple[float, float]]):
    """What a byte's worth of operations allows, and what was reached."""
    intensity = np.geomspace(1, 4 * flops / bandwidth, 100)
    axes.loglog(intensity, np.minimum(flops, intensity * bandwidth) / 1e9, "k-", label="roof")
    for name, (x, y) in points.items():
        axes.loglog(x, y / 1e9, STYLES[name].removesuffix("-"), markersize=9, label=name)
        axes.axvline(x, color="0.8", zorder=0)
    axes.set(title="roofline", xlabel="operations a byte moved", ylabel="GFLOP/s")
    axes.legend()


def main(config: Config) -> list[Finding]:
    torch.manual_seed(0)
    flash, lengths = tiled(config), list(config.lengths)
    held: dict[str, list[float]] = {"as written": [], "in tiles": []}
    moved: dict[str, list[float]] = {"as written": [], "in tiles": [], "formula": []}
    for length in tqdm(lengths, desc="lengths", unit="length"):
        inputs = config.draw(length)
        held["as written"].append(peak(attention_naive, inputs))
        held["in tiles"].append(peak(flash, inputs))
        moved["as written"].append(moved_bytes(attention_naive, *inputs))
        moved["in tiles"].append(moved_by_tiles(config, length, config.tile))
        moved["formula"].append(formula(config, length, config.tile))
    small = {tile: 4 * tile * config.dim for tile in config.tiles}
    by_memory = [moved_by_tiles(config, lengths[-1], tile) for tile in config.tiles]
    paper = [
        config.heads * config.dtype.itemsize * 8 * (lengths[-1] * config.dim) ** 2 / numbers
        for numbers in small.values()
    ]

    inputs = config.draw(config.roof_length)
    forms = {"as written": attention_naive, "in tiles": flash}
    timings = time_interleaved(forms, *inputs, rounds=config.rounds)
    operations = 4 * config.heads * config.roof_length**2 * config.dim
    bytes_moved = {
        "as written": moved_bytes(attention_naive, *inputs),
        "in tiles": moved_by_tiles(config, config.roof_length, config.tile),
    }
    intensity = {name: operations / count for name, count in bytes_moved.items()}
    flops, bandwidth = rates(config)
    texts = {
        "as written": longest(config, held["as written"], 2),
        "in tiles": longest(config, held["in tiles"], 1),
    }
    used = {name: peak(forms[name], config.draw(texts[name])) / 2**20 for name in forms}

    _, panels = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    tokens = {"xlabel": "length in tokens", "ylabel": "bytes"}
    plot_lines(panels[0, 0], config.lengths, held, title="held at once, with backward", **tokens)
    plot_lines(panels[0, 1], config.lengths, moved, title="moved by the forward", **tokens)
    sweep = {"in tiles": by_memory, "paper: 8 n² d² / M": paper}
    title = f"moved at {lengths[-1]:,} tokens"
    plot_lines(
        panels[1, 0],
        (*small.values(),),
        sweep,
        title=title,
        xlabel="small memory M",
        ylabel="bytes",
    )
    reached = {name: (intensity[name], operations / timings.median(name)) for name in forms}
    plot_roof(panels[1, 1], flops, bandwidth, reached)
    return [
        Finding(
            "memory held as written grows with length to the power",
            exponent(lengths, held["as written"]),
            expected=within(1.9, 2.05),
            source="matrices of length²",
        ),
        Finding(
            "memory held in tiles grows with length to the power",
            exponent(lengths, held["in tiles"]),
            expected=within(0.8, 1.05),
            source="arXiv:2205.14135, theorem 1",
        ),
        Finding(
            f"memory held at {lengths[-1]} tokens, as written over in tiles",
            held["as written"][-1] / held["in tiles"][-1],
            "x",
        ),
        *(
            Finding(f"longest text in {config.memory} MiB, {name}", texts[name], "tokens")
            for name in forms
        ),
        *(
            Finding(
                f"which takes, {name}",
                used[name],
                "MiB",
                expected=within(0.9 * config.memory, 1.02 * config.memory),
                source="the fitted line or parabola is right beyond its points",
            )
            for name in forms
        ),
        Finding(
            "bytes moved in tiles are those of the formula",
            moved["in tiles"] == moved["formula"],
            expected=equals(True),
            source="2 n d + n + 2 n² d / B",
        ),
        Finding(
            "bytes moved in tiles grow with the small memory to the power",
            exponent([*small.values()], by_memory),
            expected=within(-1.0, -0.9),
            source="arXiv:2205.14135, theorem 2: n² d² / M",
        ),
        Finding(
            "bytes moved as written grow with length to the power",
            exponent(lengths, moved["as written"]),
            expected=within(1.9, 2.05),
            source="matrices of length²",
        ),
        Finding(
            f"bytes moved at {lengths[-1]} tokens, as written over in tiles",
            moved["as written"][-1] / moved["in tiles"][-1],
            "x",
            expected=at_least(1.0),
        ),
        Finding("operations a byte that this machine balances", flops / bandwidth, "FLOP/B"),
        *(Finding(f"operations a byte, {name}", intensity[name], "FLOP/B") for name in forms),
        *(
            Finding(
                f"share of what its bytes allow that was reached, {name}",
                reached[name][1] / min(flops, intensity[name] * bandwidth),
            )
            for name in forms
        ),
        Finding(
            "in tiles, times the speed as written",
            timings.ratio("in tiles", "as written"),
            "x",
            spread=timings.spread("in tiles", "as written"),
        ),
    ]


if __name__ == "__main__":
    quick = Config(
        lengths=(256, 512, 1024),
        tiles=(32, 64, 128),
        memory=1,
        roof_length=256,
        rate_size=256,
        rounds=3,
    )
    run(main, Config(), quick=quick)
