"""What does guidance buy, and what does it cost?

One model that knows labels, and knows how to do without, is asked for each digit with scales from 0
(the label is ignored) over 1 (as in the data) to 8 (far beyond it).

Expected: with the scale rises the share of digits that a classifier names as asked; recall, the
share of real digits within what was made, falls. In the exact mixture (implementations/generative/
guidance.py) both can be seen without a network.

Paper   Ho & Salimans 2022, arXiv:2207.12598
Run     uv run python weeks/08_diffusion/guidance.py
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch

from implementations.generative.denoiser import to_unit
from implementations.generative.judge import candidate
from implementations.lab.findings import Finding, at_least
from implementations.lab.script import run


@dataclass(frozen=True)
class Config:
    """Make digits by their label, with more and more emphasis on it."""

    device: str = "cpu"
    """cuda takes the real model; train_ddpm.py trains it, or this script does"""
    size: int = 0
    """pixels of a side; 0 for 14 on a CPU and 28 on a GPU"""
    training: int = 0
    """steps of training; 0 for 1,200 on a CPU and 6,000 on a GPU"""
    scales: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 8.0)
    count: int = 250
    """pictures of each scale"""
    sampling: int = 25
    """steps of DPM-Solver++ 2M"""
    judge_steps: int = 1000
    """of the training of the classifier that judges"""


def main(config: Config) -> list[Finding]:
    if config.device == "cpu":
        torch.set_num_threads(1)
    writer = candidate(
        config.device, config.count, config.judge_steps, size=config.size, steps=config.training
    )
    judge = writer.judge
    made = {scale: writer.made(scale=scale, steps=config.sampling) for scale in config.scales}
    named = {scale: judge.accuracy(pixels, writer.labels) for scale, pixels in made.items()}
    verdicts = {scale: judge.verdict(pixels) for scale, pixels in made.items()}
    findings = []
    for scale in config.scales:
        verdict = verdicts[scale]
        findings += [
            Finding(f"scale {scale:g}: named as asked", named[scale]),
            Finding(f"scale {scale:g}: precision", verdict.precision),
            Finding(f"scale {scale:g}: recall", verdict.recall),
            Finding(f"scale {scale:g}: kernel distance", verdict.kernel),
        ]
    first, last = 1.0, config.scales[-1]
    gained, lost = named[last] - named[0.0], verdicts[first].recall - verdicts[last].recall
    best = min(config.scales, key=lambda scale: verdicts[scale].kernel)
    findings += [
        Finding("from no label to the largest scale, so many more are named as asked", gained,
                goal=at_least(0.5)),
        Finding("from scale 1 to the largest, recall lost", lost, goal=at_least(0.0)),
        Finding("nearest to the test digits is scale", f"{best:g}"),
    ]  # fmt: skip
    _, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    rows = torch.cat([torch.cat(list(to_unit(made[s][:20, 0])), 1) for s in config.scales])
    axes[0].imshow(1 - rows.numpy(), cmap="gray", vmin=0, vmax=1)
    places = [judge.size * (index + 0.5) for index in range(len(config.scales))]
    axes[0].set_yticks(places, [f"scale {scale:g}" for scale in config.scales])
    axes[0].set(xticks=[], title="the same noise and labels")
    for name, values in {
        "named as asked": [named[s] for s in config.scales],
        "precision": [verdicts[s].precision for s in config.scales],
        "recall": [verdicts[s].recall for s in config.scales],
    }.items():
        axes[1].plot(config.scales, values, "o-", label=name)
    axes[1].set(xlabel="scale", ylim=(0, 1.05), title="fidelity and diversity")
    axes[1].legend()
    return findings


if __name__ == "__main__":
    few = Config(size=8, training=8, scales=(0.0, 1.0, 4.0), count=60, sampling=3, judge_steps=30)
    run(main, Config(), quick=few)
