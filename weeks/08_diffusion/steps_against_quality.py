"""How many steps does a good picture need, and by which sampler?

One trained model, six ways from noise to data, from 5 to 1,000 steps; every way starts at the same
noise and is judged by the same metric. What is paid for is how often the network is asked: Heun
asks twice a step.

Expected: with many steps all ways make pictures that are about equally good. With few, those that
add no noise are ahead of those that do, DPM-Solver++ 2M first. Heun halves its steps to pay for its
second slope.

Paper   Song et al. 2020, arXiv:2010.02502; Lu et al. 2022, arXiv:2211.01095
Run     uv run python weeks/08_diffusion/steps_against_quality.py
"""

import time
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch

from implementations.generative.denoiser import to_unit
from implementations.generative.judge import candidate
from implementations.generative.samplers import SAMPLERS
from implementations.lab.findings import Finding, at_most
from implementations.lab.script import run


@dataclass(frozen=True)
class Config:
    """Make pictures by every sampler with few steps and with many."""

    device: str = "cpu"
    """cuda takes the real model; train_ddpm.py trains it, or this script does"""
    size: int = 0
    """pixels of a side; 0 for 14 on a CPU and 28 on a GPU"""
    training: int = 0
    """steps of training; 0 for 1,200 on a CPU and 6,000 on a GPU"""
    steps: tuple[int, ...] = (5, 10, 20, 50, 100)
    """of sampling; 250 1000 as well on a GPU"""
    count: int = 250
    """pictures of each"""
    judge_steps: int = 1000
    """of the training of the classifier that judges"""


def main(config: Config) -> list[Finding]:
    if config.device == "cpu":
        torch.set_num_threads(1)
    writer = candidate(
        config.device, config.count, config.judge_steps, size=config.size, steps=config.training
    )
    chance = writer.judge.kernel_floor(min(500, config.count))
    real = config.device != "cpu"
    if real:  # compiled before the clock runs
        writer.made(steps=1, compiled=True)
    distance, seconds, shown = {}, {}, {}
    for name in SAMPLERS:
        for steps in config.steps:
            started = time.perf_counter()
            made = writer.made(sampler=name, steps=steps, compiled=real)
            seconds[name, steps] = time.perf_counter() - started
            distance[name, steps] = writer.judge.verdict(made).kernel
            shown[name, steps] = made[:10]
    draw(config, distance, shown, chance)
    findings = [Finding("kernel distance, training against test digits: chance", chance)]
    for name, sampler in SAMPLERS.items():
        for steps in config.steps:
            asked = steps * sampler.evaluations
            claim = f"{name}, {steps} steps, {asked} questions: kernel distance over chance"
            findings.append(Finding(claim, distance[name, steps] / chance, "x"))
    for name, sampler in SAMPLERS.items():
        good = [steps for steps in config.steps if distance[name, steps] <= chance]
        asked = min(good) * sampler.evaluations if good else "never"
        findings.append(Finding(f"{name}: questions until no farther than chance", asked))
    most = config.steps[-1]
    apart = max(distance[name, most] for name in SAMPLERS) / chance
    findings += [
        Finding(f"with {most} steps the worst of all is at, over chance", apart, "x",
                goal=at_most(6.0)),
        Finding("a picture by dpm++ in the fewest steps takes",
                seconds["dpm++", config.steps[0]] / config.count * 1e3, "ms"),
        Finding("a picture by ddpm in the most steps takes",
                seconds["ddpm", most] / config.count * 1e3, "ms"),
    ]  # fmt: skip
    return findings


def draw(config: Config, distance: dict, shown: dict, chance: float) -> None:
    figure = plt.figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.1, 1))
    axes = left.subplots()
    for name, sampler in SAMPLERS.items():
        asked = [steps * sampler.evaluations for steps in config.steps]
        far = [max(distance[name, steps], chance / 10) for steps in config.steps]
        axes.loglog(asked, far, "o-", label=name)
    axes.axhline(chance, color="grey", linestyle=":", label="chance, between real digits")
    axes.set(xlabel="how often the network is asked", ylabel="kernel distance to test digits")
    axes.legend(fontsize=8)
    grid = right.subplots(len(SAMPLERS), 1)
    steps = config.steps[min(1, len(config.steps) - 1)]
    for axis, name in zip(grid, SAMPLERS, strict=True):
        row = 1 - to_unit(shown[name, steps])[:, 0]
        axis.imshow(torch.cat(list(row), 1).numpy(), cmap="gray", vmin=0, vmax=1)
        axis.set_title(f"{name}, {steps} steps", fontsize=8, loc="left", pad=2)
        axis.set_axis_off()


if __name__ == "__main__":
    few = Config(size=8, training=8, steps=(2, 5), count=60, judge_steps=30)
    run(main, Config(), quick=few)
