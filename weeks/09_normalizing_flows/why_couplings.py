"""What does a log-determinant cost, and what do couplings save?

A free map of d numbers has a Jacobian of d² entries, d passes backwards to fill, and d³ operations
for its determinant. A coupling's is triangular, and its log-determinant a sum of d/2 numbers that
the forward pass has at hand. Both are timed at growing d, and an exponent is fitted to the upper
half of the sizes.

Expected: both ways give the same number. For large d the determinant's time grows with d³ and the
coupling's, at a fixed width of its network, with d. Blocked and vectorised code is better the
larger its matrix, which pulls the first below 3; overhead that all sizes share pulls both down.

Paper   Rezende & Mohamed 2015, arXiv:1505.05770, section 3.1; Dinh et al. 2016, arXiv:1605.08803
Run     uv run python weeks/09_normalizing_flows/why_couplings.py
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from implementations.flows.affine_coupling import coupling_layers
from implementations.lab.findings import Finding, at_least, at_most, within
from implementations.lab.script import run
from implementations.lab.timing import time_interleaved

DENSE, WHOLE, COUPLED = "determinant alone", "dense Jacobian and determinant", "coupling"
ORDERS = {DENSE: 3, WHOLE: 3, COUPLED: 1}


@dataclass(frozen=True)
class Config:
    """Time log-determinants of growing maps."""

    smallest: int = 64
    """numbers in an example, at first"""
    doublings: int = 5
    """how often they double"""
    hidden: int = 64
    """width of the coupling's network"""
    rounds: int = 9
    """timed calls at each size"""


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """The slope of log time by log size, over the upper half of the sizes."""
    upper = len(sizes) // 2
    slope, _ = np.polyfit(np.log(sizes[upper:]), np.log(seconds[upper:]), 1)
    return float(slope)


def timed(size: int, config: Config) -> tuple[dict[str, float], float]:
    """Median seconds of each way, and by how much the two log-determinants differ."""
    torch.manual_seed(size)
    flow = coupling_layers(size, 2, config.hidden).double()
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.02)

    def jacobian(x: Tensor) -> Tensor:
        return torch.func.jacrev(lambda row: flow(row[None]).value[0])(x[0])

    x = torch.randn(1, size, dtype=torch.float64)
    dense = jacobian(x)
    ways = {
        DENSE: lambda x: torch.linalg.slogdet(dense).logabsdet,
        WHOLE: lambda x: torch.linalg.slogdet(jacobian(x)).logabsdet,
        COUPLED: lambda x: flow(x).log_det,
    }
    timings = time_interleaved(ways, x, rounds=config.rounds, warmup=2)
    difference = (ways[WHOLE](x) - ways[COUPLED](x)[0]).abs().item()
    return {name: timings.median(name) for name in ways}, difference


def draw(sizes: list[int], seconds: dict[str, list[float]]) -> None:
    _, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for colour, (name, times) in zip(("C1", "C3", "C0"), seconds.items(), strict=True):
        axes.loglog(sizes, times, "o-", color=colour, label=name)
        theory = [times[-1] * (size / sizes[-1]) ** ORDERS[name] for size in sizes]
        label = f"d{'³' if ORDERS[name] == 3 else ''}, through the last"
        axes.loglog(sizes, theory, ":", color=colour, alpha=0.6, label=label)
    axes.set(xlabel="numbers in an example, d", ylabel="seconds for one example")
    axes.set(
        title="The price of one log-determinant", ylim=(min(map(min, seconds.values())) / 3, None)
    )
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()


def main(config: Config) -> list[Finding]:
    torch.set_num_threads(1)  # one thread: otherwise more of them join in as matrices grow
    sizes = [config.smallest * 2**k for k in range(config.doublings + 1)]
    results = [timed(size, config) for size in tqdm(sizes, unit="size")]
    seconds = {name: [times[name] for times, _ in results] for name in ORDERS}
    draw(sizes, seconds)
    difference = max(difference for _, difference in results)
    claim = "largest difference between the dense and the coupling's log-determinant"
    findings = [Finding(claim, difference, "nats", expected=at_most(1e-9))]
    goals = {DENSE: within(2.4, 3.2), WHOLE: None, COUPLED: at_most(1.3)}
    for name, times in seconds.items():
        claim = f"{name}: time grows with d to the power"
        order = f"theory: {ORDERS[name]}"
        findings.append(Finding(claim, exponent(sizes, times), goal=goals[name], source=order))
    for name in (DENSE, WHOLE):
        ratio = seconds[name][-1] / seconds[COUPLED][-1]
        claim = f"{name}, times the coupling's seconds, d = {sizes[-1]:,}"
        findings.append(Finding(claim, ratio, "x", goal=at_least(1)))
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(smallest=16, doublings=3, hidden=16, rounds=2))
