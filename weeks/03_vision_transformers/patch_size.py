"""How large should a patch be?

The same transformer learns the same digits in patches of 28, 14, 7 and 4 pixels: sentences of 1, 4,
16 and 49 words. Counted and timed is what a picture costs in a training step, and measured what the
accuracy gains. A patch of 28 is the whole picture: there is nothing to attend to, and what is left
is a multilayer perceptron.

Expected: n = (28 / patch)² words cost n in the linear layers and n² in attention, so halving the
patch costs about four times as much here, where sentences are short. Hoped for: smaller patches
name more, also after the few steps that all are given alike.

Paper   Dosovitskiy et al. 2020, arXiv:2010.11929, section 4.1: cost is inverse to the square of the
        patch; Beyer et al. 2022, arXiv:2212.08013 (one model, all patch sizes)
Run     uv run python weeks/03_vision_transformers/patch_size.py
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator
from torch import Tensor, nn

from implementations.lab.findings import Finding, at_least, over_seeds, within
from implementations.lab.script import run
from implementations.lab.timing import time_interleaved
from implementations.models.picture_classifier import (
    ClassifierConfig,
    accuracy,
    loss,
    pictures,
    train_or_load,
    untrained,
)


@dataclass(frozen=True)
class Config:
    """MNIST-5k in patches of several sizes."""

    patches: tuple[int, ...] = (28, 14, 7, 4)
    """pixels of a patch's side, divisors of 28, the largest first"""
    steps: int = 1000
    """training steps of each model, 32 pictures each"""
    seeds: int = 2
    """how often each model is trained"""
    rounds: int = 10
    """timed training steps of each"""
    device: str = "cpu"


def multiplications(config: ClassifierConfig) -> int:
    """What one picture costs forward: linear layers, scores and averages, and the embedding."""
    words = (config.size // config.patch) ** 2
    linear = 4 * config.width**2 + 2 * config.width * config.hidden
    block = words * linear + 2 * words**2 * config.width
    return config.layers * block + words * config.patch**2 * config.width


def gradient(model: nn.Module) -> Callable[[Tensor, Tensor], None]:
    """Forward and backward of one batch."""

    def step(pixels: Tensor, labels: Tensor) -> None:
        model.zero_grad()
        loss(model, (pixels, labels))[0].backward()

    return step


def draw(patches: tuple[int, ...], right: Tensor, seconds: dict[int, float]) -> None:
    """Accuracy against cost, a dot for each patch."""
    _, (left, panel) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    words = [(28 // patch) ** 2 for patch in patches]
    cost = [1e3 * seconds[patch] / 32 for patch in patches]
    for axes, x in ((left, words), (panel, cost)):
        axes.semilogx(x, right.mean(0).tolist(), "o-")
        axes.plot(x, right.T.numpy(), "k.", alpha=0.5)
        for place, height, patch in zip(x, right.mean(0).tolist(), patches, strict=True):
            axes.annotate(
                f"{patch} x {patch}",
                (place, height),
                textcoords="offset points",
                xytext=(8, 6),
            )
        axes.set(ylabel="test digits named", ylim=(None, 1.0))
        axes.margins(x=0.2)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.set(xlabel="words in a picture", title="Smaller patches, longer sentences")
    panel.set(xlabel="milliseconds a picture, forward and backward", title="What that costs")


def main(config: Config) -> list[Finding]:
    if any(28 % patch for patch in config.patches):
        raise ValueError(f"patches divide 28, got {config.patches}")
    # Matrices this small gain nothing from a second thread, and lose when it has to wait.
    torch.set_num_threads(1)
    settings = {
        patch: ClassifierConfig(patch=patch, steps=config.steps) for patch in config.patches
    }
    known, test = pictures(next(iter(settings.values())))
    batch = [tensor[:: len(tensor) // 32][:32].to(config.device) for tensor in known]
    steps = {
        str(patch): gradient(untrained(one).to(config.device)) for patch, one in settings.items()
    }
    timings = time_interleaved(steps, *batch, rounds=config.rounds)
    seconds = {patch: timings.median(str(patch)) for patch in config.patches}

    right = torch.zeros(config.seeds, len(config.patches))
    for column, one in enumerate(settings.values()):
        for seed in range(config.seeds):
            run_of = replace(one, seed=seed)
            model = train_or_load(run_of, config.device).model
            right[seed, column] = accuracy(run_of, model, test)
    draw(config.patches, right, seconds)

    findings = []
    for patch, column in zip(config.patches, right.T, strict=True):
        claim = f"patches of {patch}: test digits named"
        findings.append(Finding(claim, **over_seeds(column)))
        claim = f"patches of {patch}: multiplications a picture, forward"
        findings.append(Finding(claim, multiplications(settings[patch])))
    source = "Dosovitskiy et al. 2020, section 4.1"
    for coarse, fine in pairwise(config.patches):
        longer = (coarse / fine) ** 2
        more = multiplications(settings[fine]) / multiplications(settings[coarse])
        claim = f"patches of {fine} instead of {coarse}: {longer:.2f} times the words multiply"
        # The embedding of all pixels costs the same in any patches: less than in proportion to the
        # words by that, and more by attention, whose cost is quadratic.
        rule = within(longer / 2, longer**2)
        findings.append(Finding(claim, more, "x as often", expected=rule, source=source))
        claim = f"patches of {fine} instead of {coarse}: a training step takes"
        ratio, noise = timings.ratio(str(coarse), str(fine)), timings.spread(str(coarse), str(fine))
        findings.append(Finding(claim, ratio, "x as long", spread=noise))
    gain = right[:, -1].mean() - right[:, 0].mean()
    claim = f"patches of {config.patches[-1]} name more than patches of {config.patches[0]} by"
    findings.append(Finding(claim, gain.item(), goal=at_least(0.0)))
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(patches=(28, 14, 7), steps=6, seeds=1, rounds=3))
