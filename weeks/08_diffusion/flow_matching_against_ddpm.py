"""Is flow matching another method, or the same one with other numbers?

Three networks of one shape and one length of training: one tells the noise on the cosine schedule
(DDPM), one tells v there, one tells the velocity on the straight line with times from a normal
number's sigmoid (flow matching). By the tables each can be sampled along every schedule.

Expected: along its own schedule flow matching makes good pictures in few steps of Euler, because
Euler on a straight line is DDIM. Given the same path and sampler the networks differ little: what
differs is which noise each was trained on most.

Paper   Ho et al. 2020, arXiv:2006.11239; Lipman et al. 2022, arXiv:2210.02747; Esser et al. 2024,
        arXiv:2403.03206
Run     uv run python weeks/08_diffusion/flow_matching_against_ddpm.py
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch

from implementations.generative.denoiser import to_unit
from implementations.generative.judge import candidate
from implementations.lab.findings import Finding, at_most
from implementations.lab.script import run

MODELS = {
    "DDPM": {"kind": "noise", "schedule": "cosine"},
    "v": {"kind": "v", "schedule": "cosine"},
    "flow matching": {"kind": "flow", "schedule": "straight", "times": "logit_normal"},
}
PATHS = ("cosine", "straight")


@dataclass(frozen=True)
class Config:
    """Train three networks alike but for their question and schedule; sample along two paths."""

    device: str = "cpu"
    """cuda trains real models"""
    model: str = "unet"
    """unet or transformer"""
    size: int = 0
    """pixels of a side; 0 for 14 on a CPU and 28 on a GPU"""
    training: int = 0
    """steps of each network; 0 for 600 on a CPU and 3,000 on a GPU"""
    steps: tuple[int, ...] = (5, 10, 50)
    """of Euler's method, that is of DDIM"""
    count: int = 250
    """pictures of each"""
    judge_steps: int = 1000
    """of the training of the classifier that judges"""


def main(config: Config) -> list[Finding]:
    if config.device == "cpu":
        torch.set_num_threads(1)
    steps = config.training or (600 if config.device == "cpu" else 3000)
    alike = {"model": config.model, "size": config.size, "steps": steps}
    writers = {
        name: candidate(config.device, config.count, config.judge_steps, **alike, **way)
        for name, way in MODELS.items()
    }
    judge = writers["v"].judge
    chance = judge.kernel_floor(min(500, config.count))
    parameters = sum(p.numel() for p in writers["v"].trained.model.parameters())
    findings = [Finding("parameters of each", parameters)]
    far, shown = {}, {}
    for name, writer in writers.items():
        findings.append(Finding(f"{name}: training takes", writer.trained.seconds, "s"))
        for path in PATHS:
            for steps in config.steps:
                made = writer.made(schedule=path, sampler="ddim", steps=steps)
                verdict = judge.verdict(made)
                far[name, path, steps] = verdict.kernel / chance
                shown[name, path, steps] = made[:20]
                what = f"{name} along {path}, {steps} steps"
                findings += [
                    Finding(f"{what}: kernel distance over chance", far[name, path, steps], "x"),
                    Finding(f"{what}: named with confidence over 0.9", verdict.confident),
                ]
    most = config.steps[-1]
    last = [far[name, "cosine", most] for name in MODELS]
    findings += [
        Finding(f"along cosine, {most} steps: worst over best model",
                max(last) / max(min(last), 1.0), "x", goal=at_most(3.0)),
        Finding(f"flow matching in {config.steps[0]} steps: straight over cosine path",
                far["flow matching", "straight", config.steps[0]]
                / max(far["flow matching", "cosine", config.steps[0]], 1.0), "x"),
    ]  # fmt: skip
    draw(config, far, shown)
    return findings


def draw(config: Config, far: dict, shown: dict) -> None:
    figure = plt.figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.3))
    axis = left.subplots()
    for index, name in enumerate(MODELS):
        for path, line in zip(PATHS, ("o-", "s--"), strict=True):
            values = [max(far[name, path, steps], 0.1) for steps in config.steps]
            axis.loglog(config.steps, values, line, color=f"C{index}", label=f"{name}, {path}")
    axis.axhline(1, color="grey", linestyle=":")
    axis.set(xlabel="steps of Euler", ylabel="kernel distance over chance")
    axis.legend(fontsize=7)
    few = config.steps[min(1, len(config.steps) - 1)]
    rows = [(name, path) for name in MODELS for path in PATHS]
    for grid, (name, path) in zip(right.subplots(len(rows), 1), rows, strict=True):
        row = 1 - to_unit(shown[name, path, few])[:, 0]
        grid.imshow(torch.cat(list(row), 1).numpy(), cmap="gray", vmin=0, vmax=1)
        grid.set_title(f"{name} along {path}, {few} steps", fontsize=8, loc="left", pad=2)
        grid.set_axis_off()


if __name__ == "__main__":
    few = Config(size=8, training=6, steps=(1, 2), count=60, judge_steps=30)
    run(main, Config(), quick=few)
