"""Can a metric of pictures be trusted?

Before a metric judges a model it is judged itself, on pictures whose quality is known: real digits,
the same with more and more done to them, and training digits handed in as if they were made. Each
metric is drawn again and again from random halves, for its spread, and its floor is what it says of
two halves of real digits.

Expected: every metric ranks real over slightly damaged over badly damaged. The Frechet distance of
few pictures is too large, the kernel distance is not. None of the four sees a copy: training
digits recited from memory are to them as good as real ones. The count of copies does. Recall sees a
missing class, and precision does not; blur costs both.

Paper   Bińkowski et al. 2018, arXiv:1801.01401; Kynkäänniemi et al. 2019, arXiv:1904.06991
Run     uv run python weeks/08_diffusion/can_a_metric_be_trusted.py
"""

import statistics
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from implementations.generative.judge import Judge
from implementations.generative.metrics import (
    frechet_distance,
    kernel_distance,
    precision_and_recall,
)
from implementations.lab.findings import Finding, at_least, at_most, equals
from implementations.lab.script import run

NAMES = ("Frechet", "kernel", "precision", "recall")


@dataclass(frozen=True)
class Config:
    """Judge the metrics on digits that are real, damaged, missing or copied."""

    size: int = 28
    """pixels of a side"""
    judge_steps: int = 1000
    """of the training of the classifier whose features are compared"""
    draws: int = 20
    """random halves for each number"""
    half: int = 500
    """digits on either side"""


def damaged(pixels: Tensor, noise: float, blur: int) -> Tensor:
    """Noise on the pixels, then some rounds of a mean over 3 x 3."""
    generator = torch.Generator().manual_seed(1)
    pixels = pixels + noise * torch.randn(pixels.shape, generator=generator)
    for _ in range(blur):
        pixels = avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
    return pixels.clamp(-1, 1)


def measured(judge: Judge, made: Tensor, config: Config) -> dict[str, list[float]]:
    """Each metric between random halves of the test digits and of what was made."""
    generator, features = torch.Generator().manual_seed(0), judge.features(made)
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(config.draws):
        real, other = (
            part[torch.randperm(len(part), generator=generator)[: config.half]]
            for part in (judge.real, features)
        )
        coverage = precision_and_recall(real, other)
        numbers = (frechet_distance(real, other), kernel_distance(real, other), *coverage)
        for name, number in zip(NAMES, numbers, strict=True):
            found[name].append(number)
    return found


def floors(judge: Judge, config: Config) -> dict[str, list[float]]:
    """Each metric between two halves of the test digits that share no digit."""
    generator, half = torch.Generator().manual_seed(0), min(config.half, len(judge.real) // 2)
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(config.draws):
        a, b = judge.real[torch.randperm(len(judge.real), generator=generator)].split(half)[:2]
        for name, number in zip(
            NAMES,
            (frechet_distance(a, b), kernel_distance(a, b), *precision_and_recall(a, b)),
            strict=True,
        ):
            found[name].append(number)
    return found


def sets(judge: Judge) -> dict[str, Tensor]:
    """Training digits in all conditions; none of them is among the test digits."""
    real, labels = judge.train.pixels, judge.train.labels
    return {
        "real": real,
        "a little noise": damaged(real, 0.15, 0),
        "much noise": damaged(real, 0.6, 0),
        "a little blur": damaged(real, 0.0, 1),
        "much blur": damaged(real, 0.0, 3),
        "no 4 and no 7": real[(labels != 4) & (labels != 7)],
    }


def main(config: Config) -> list[Finding]:
    torch.set_num_threads(1)
    judge = Judge(config.size, config.judge_steps)
    floor = floors(judge, config)
    found = {name: measured(judge, made, config) for name, made in sets(judge).items()}
    mean = {
        name: {metric: statistics.fmean(numbers) for metric, numbers in row.items()}
        for name, row in found.items()
    }
    findings = [
        Finding(f"two halves of test digits: {metric}", statistics.fmean(numbers),
                spread=statistics.stdev(numbers), seeds=config.draws, repeated="draws")
        for metric, numbers in floor.items()
    ]  # fmt: skip
    for name, row in found.items():
        findings += [
            Finding(f"{name}: {metric}", mean[name][metric], spread=statistics.stdev(numbers),
                    seeds=config.draws, repeated="draws")
            for metric, numbers in row.items()
        ]  # fmt: skip
    for metric in ("Frechet", "kernel"):
        for damage in ("noise", "blur"):
            low, middle, high = (
                mean[name][metric] for name in ("real", f"a little {damage}", f"much {damage}")
            )
            findings.append(
                Finding(f"{metric} ranks real, a little {damage}, much {damage}",
                        low < middle < high, expected=equals(True))
            )  # fmt: skip
    # Halves of the same digits are not independent, so a mean has no smaller deviation.
    deviation = {metric: statistics.stdev(floor[metric]) for metric in NAMES}
    chance = {metric: statistics.fmean(floor[metric]) for metric in NAMES}
    off = {metric: abs(chance[metric]) / deviation[metric] for metric in ("Frechet", "kernel")}
    # Training digits recited from memory are the row "real": as many in a draw as in a half.
    worse = {
        metric: (mean["real"][metric] - chance[metric]) / deviation[metric] for metric in NAMES
    }
    worse |= {metric: -worse[metric] for metric in ("precision", "recall")}
    lost = {
        (name, metric): mean["real"][metric] - mean[name][metric]
        for name in ("much blur", "no 4 and no 7")
        for metric in ("precision", "recall")
    }
    copies = judge.floor(2 * config.half)
    honest = judge.verdict(judge.test.pixels)
    findings += [
        Finding("halves: the kernel distance is from 0, in deviations of a draw", off["kernel"],
                expected=at_most(1.5), source="unbiased"),
        Finding("halves: the Frechet distance is from 0, in deviations of a draw", off["Frechet"],
                expected=at_least(1.5), source="of few points it is too large"),
        *(Finding(f"{name} costs {metric}", value) for (name, metric), value in lost.items()),
        *(Finding(f"recited training digits: {metric} worse than of test halves, in deviations",
                  value, expected=at_most(1.5), source="a sample of the same digits")
          for metric, value in worse.items()),
        Finding("recited training digits: counted as copies", copies.copied,
                expected=at_least(0.99)),
        Finding("test digits: counted as copies", honest.copied, expected=at_most(0.06),
                source="by its definition 0.05"),
    ]  # fmt: skip
    draw(sets(judge), found, floor)
    return findings


def draw(made: dict[str, Tensor], found: dict, floor: dict) -> None:
    figure = plt.figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.5))
    for axis, (name, pixels) in zip(left.subplots(len(made), 1), made.items(), strict=True):
        some = pixels[torch.linspace(0, len(pixels) - 1, 10).long(), 0]
        axis.imshow(torch.cat(list(some), 1).numpy(), cmap="gray_r", vmin=-1, vmax=1)
        axis.set_title(name, fontsize=8, loc="left", pad=2)
        axis.set_axis_off()
    for axis, metric in zip(right.subplots(2, 2).flat, NAMES, strict=True):
        axis.boxplot([found[name][metric] for name in made], tick_labels=list(made))
        axis.axhline(statistics.fmean(floor[metric]), color="grey", linestyle=":")
        axis.set_title(f"{metric}; dotted: two halves of test digits", fontsize=8)
        axis.tick_params(axis="x", rotation=30, labelsize=7)
        if metric in ("Frechet", "kernel"):
            axis.set_yscale("symlog", linthresh=max(1e-3, 2 * statistics.stdev(floor[metric])))


if __name__ == "__main__":
    run(main, Config(), quick=Config(size=8, judge_steps=60, draws=4, half=250))
