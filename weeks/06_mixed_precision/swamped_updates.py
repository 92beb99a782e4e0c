"""Why do bfloat16 weights stop learning, and what makes them go on?

A learning rate of 1e-4 asks a weight near 1 for steps of 1e-4; bf16's next number is 0.0078 away,
and rounding to nearest gives the old one back, each time. A least-squares problem is trained by
AdamW with weights kept in four ways, next to a run in float32.

Expected: weights rounded to the nearest stop far from the solution; a float32 master, Kahan's
second bf16 number and stochastic rounding go on to where bf16 ends.

Paper   Zamirai et al. 2020, arXiv:2010.06192
Run     uv run python weeks/06_mixed_precision/swamped_updates.py
"""

from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import torch

from implementations.lab.findings import Finding, at_least, over_seeds
from implementations.lab.script import run
from implementations.optimizers.adamw import init as adamw_init
from implementations.optimizers.adamw import step as adamw_step
from implementations.precision.narrow_weights import KEEPERS, init, step


@dataclass(frozen=True)
class Config:
    """Train one linear layer with narrow weights."""

    steps: int = 3000
    inputs: int = 64
    learning_rate: float = 2e-4
    """the step that Adam takes at first, for weights between -1 and 1"""
    seeds: int = 3


def losses(name: str, seed: int, config: Config) -> list[float]:
    """The distance to the solution, root mean square, after each step."""
    generator = torch.Generator().manual_seed(seed)
    random = partial(torch.randn, generator=generator)
    solution = random(config.inputs).clamp(-1, 1)
    weight = [(solution + 0.25 * random(config.inputs)).bfloat16()]
    rate = {"learning_rate": config.learning_rate, "weight_decay": 0.0}
    update = partial(adamw_step, **rate)
    if name == "float32":
        weight, state = [weight[0].float()], adamw_init([weight[0].float()])
    else:
        state = init(weight, KEEPERS[name], adamw_init)
    trace = []
    for _ in range(config.steps):
        x = random(32, config.inputs)
        gradient = [x.T @ (x @ (weight[0].float() - solution)) / len(x)]
        if name == "float32":
            weight, state = update(weight, gradient, state)
        else:
            weight, state = step(weight, gradient, state, KEEPERS[name], update, generator)
        trace.append((weight[0].float() - solution).square().mean().sqrt().item())
    return trace


def main(config: Config) -> list[Finding]:
    torch.set_num_threads(1)
    names = ["float32", *KEEPERS]
    curves = {name: [losses(name, s, config) for s in range(config.seeds)] for name in names}
    _, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, runs in curves.items():
        axes.semilogy(torch.tensor(runs).mean(0), label=name)
    axes.set(xlabel="step", ylabel="distance to the solution, root mean square")
    axes.legend()
    findings = [
        Finding(f"{name}: distance at the end", **over_seeds(run[-1] for run in runs))
        for name, runs in curves.items()
    ]
    for name in list(KEEPERS)[1:]:
        pairs = zip(curves["nearest"], curves[name], strict=True)
        better = over_seeds(a[-1] / b[-1] for a, b in pairs)
        findings.append(
            Finding(
                f"nearest ends farther away than {name} by",
                **better,
                unit="x",
                expected=at_least(1.2),
            )
        )
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(steps=600, seeds=1, learning_rate=5e-4))
