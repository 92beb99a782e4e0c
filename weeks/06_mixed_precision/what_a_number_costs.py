"""What does each format give for its bits: how far, how dense, and how wrong?

A float's exponent bits buy range, its fraction bits buy density. The spacing of neighbours is a
staircase that rises with the number: relative to it, between epsilon/2 and epsilon, down to the
smallest normal number, and from there on a constant that is ever larger next to what it spaces.

Expected: a number drawn evenly on a logarithmic scale is off by at most u = epsilon / 2 of
itself; bf16 reaches as far as fp32 and fp16 does not.

Paper   IEEE 754-2019; Micikevicius et al. 2022, arXiv:2209.05433
Run     uv run python weeks/06_mixed_precision/what_a_number_costs.py
"""

import math
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch

from implementations.lab.findings import Finding, at_most, equals
from implementations.lab.script import run
from implementations.precision.formats import BF16, FORMATS, FP16, FP32, rounded


@dataclass(frozen=True)
class Config:
    """Round numbers in every format."""

    numbers: int = 400_000
    """drawn evenly on a logarithmic scale within each format's normal range"""


def main(config: Config) -> list[Finding]:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    findings = []
    _, axes = plt.subplots(figsize=(9, 4.6), layout="constrained")
    grid = torch.exp2(torch.linspace(-40, 40, 4001, dtype=torch.float64)).float()
    for source in FORMATS:
        low, high = math.log2(source.smallest_normal), math.log2(source.largest)
        exponent = torch.rand(config.numbers, generator=generator, dtype=torch.float64)
        exact = torch.exp2(low + (high - low) * exponent).float()
        exact = exact.clamp(source.smallest_normal, source.largest)
        error = ((rounded(exact, source).double() - exact) / exact).abs()
        unit = source.epsilon / 2
        if source is not FP32:  # whose numbers these are
            findings.append(
                Finding(
                    f"{source.name}: largest relative error, in units of epsilon / 2",
                    error.max().item() / unit,
                    expected=at_most(1.0),
                )
            )
            findings.append(Finding(f"{source.name}: mean relative error", error.mean().item()))
        findings.append(Finding(f"{source.name}: range in powers of two", high - low))
        inside = grid[(grid >= source.smallest) & (grid <= source.largest)]
        floor = torch.exp2(torch.floor(torch.log2(inside))).clamp(min=source.smallest_normal)
        spacing = floor * source.epsilon / inside
        axes.loglog(inside, spacing, label=f"{source.name}, {source.bits} bits", base=2)
    axes.set(xlabel="number", ylabel="spacing, relative to the number")
    axes.legend()
    axes.grid(alpha=0.3)
    reach = [f.smallest_normal for f in (BF16, FP32)]
    findings.append(
        Finding("bf16 begins where fp32 does", reach[0] == reach[1], expected=equals(True))
    )
    tiny = torch.tensor(1e-8)
    findings += [
        Finding(f"1e-8 in {f.name}", rounded(tiny, f).item(), expected=rule)
        for f, rule in ((FP16, equals(0.0)), (BF16, None))
    ]
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(numbers=2000))
