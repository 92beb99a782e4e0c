"""Why do products of narrow numbers need a wide sum?

A dot product of n rounded numbers, summed in the format itself or in float32. Rounding errors of
random sign grow as √n; where all terms are positive the sum soon is so large that a term is below
half its spacing, and the error grows as n: the sum stands still. Softmax's denominator and a norm's
mean square are such sums.

Expected: with random signs the relative error of a narrow sum grows with n to the power 1/2, and a
wide sum's does not grow; a bf16 sum of positive terms stops near 256 times one of them.

Paper   Higham 2002, Accuracy and Stability of Numerical Algorithms, chapter 4
Run     uv run python weeks/06_mixed_precision/accumulate_in_fp32.py
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from implementations.lab.findings import Finding, at_least, at_most, within
from implementations.lab.script import run
from implementations.precision.summation import sum_in_order


@dataclass(frozen=True)
class Config:
    """Sums of growing length."""

    longest: int = 4096
    """terms of the longest sum, a power of two"""
    rows: int = 256
    """sums of each length"""


def error(terms: Tensor) -> float:
    """Root mean square error of sums in order, over √n times a term's size: per √n."""
    exact = terms.double().sum(-1)
    apart = (sum_in_order(terms).double() - exact).square().mean().sqrt()
    return (apart / terms.double().square().sum(-1).mean().sqrt()).item()


def main(config: Config) -> list[Finding]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lengths = [2**k for k in range(6, config.longest.bit_length())]
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    curves: dict[str, list[float]] = {name: [] for name in kinds}
    standing = []
    for n in lengths:
        left, right = (torch.randn(config.rows, n).bfloat16().float() for _ in range(2))
        for name, dtype in kinds.items():
            curves[name].append(error((left * right).to(dtype)))
        positive = torch.rand(config.rows, n).bfloat16()
        exact = positive.double().sum(-1)
        standing.append(((sum_in_order(positive).double() - exact) / exact).mean().abs().item())
    _, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, values in curves.items():
        axes.loglog(lengths, values, "o-", base=2, label=f"random signs, summed in {name}")
    axes.loglog(lengths, standing, "s--", base=2, label="positive terms, summed in bf16")
    axes.set(xlabel="terms", ylabel="relative error")
    axes.legend()
    findings = []
    for name, values in curves.items():
        power, _ = np.polyfit(np.log(lengths), np.log(values), 1)
        claim = f"random signs, {name}: relative error grows with n to the power"
        # The total itself grows as √n and its spacing with it: error n · u / √n.
        findings.append(Finding(claim, float(power), expected=within(0.3, 0.7)))
    findings += [
        Finding(
            "a bf16 sum is wronger than an fp32 sum by",
            curves["bf16"][-1] / curves["fp32"][-1],
            "x",
            expected=at_least(1000),
        ),
        Finding(
            f"positive terms, {lengths[-1]} of them, bf16: share that is missing", standing[-1]
        ),
    ]
    scores = torch.randn(config.rows, config.longest)
    power = (scores - scores.amax(-1, keepdim=True)).exp()
    for name, dtype in kinds.items():
        shares = power / sum_in_order(power.to(dtype)).float()[:, None]
        rule = at_most(1e-4) if name == "fp32" else None
        claim = (
            f"softmax of {config.longest} scores, denominator in {name}: shares sum to one but for"
        )
        findings.append(Finding(claim, (shares.sum(-1) - 1).abs().mean().item(), expected=rule))
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(longest=1024, rows=128))
