"""What does a vision transformer know about order, and who tells it?

First, pictures whose patches are mixed, each in its own way, are shown to models that learned from
whole ones. Without positions a transformer is a function of the set of its patches, so its answers
must not change at all. With positions they should.

Second, models learn from pictures that are all mixed in one and the same way. A transformer with
learned positions starts out knowing no order, so this one is as good as the true one. A
convolutional network is told that neighbours belong together, and now they do not.

Expected: the first is a theorem. So is the second, for the transformer and in distribution: the
places of its table are drawn alike, and pictures are moved before they are mixed, so the two orders
differ as two seeds do.

Paper   Naseer et al. 2021, arXiv:2105.10497 (answers to shuffled patches, in large models)
Run     uv run python weeks/03_vision_transformers/shuffled_patches.py
"""

from dataclasses import dataclass, replace
from statistics import fmean

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from implementations.lab.findings import Finding, at_least, at_most, equals, over_seeds
from implementations.lab.script import run
from implementations.layers.patch_embedding import join_patches, split_patches
from implementations.models.picture_classifier import (
    ClassifierConfig,
    accuracy,
    pictures,
    train_or_load,
)

POSITIONS = ("none", "learned", "sinusoidal", "rotary")


@dataclass(frozen=True)
class Config:
    """Digits in patches of 7 x 7, sixteen to a picture."""

    steps: int = 1000
    """training steps of each model, 32 pictures each"""
    seeds: int = 2
    """how often each model is trained"""
    device: str = "cpu"


def mixed(pixels: Tensor, patch: int) -> Tensor:
    """Every picture's patches in an order of its own."""
    patches = split_patches(pixels, patch)
    order = torch.rand(patches.shape[:2], generator=torch.Generator().manual_seed(0)).argsort(1)
    shuffled = patches.gather(1, order[..., None].expand_as(patches))
    return join_patches(shuffled, patch, pixels.shape[-2] // patch)


def draw(pixels: Tensor, whole: dict[str, list[float]], parts: dict[str, list[float]]) -> None:
    """A digit and what a mixed one looks like; accuracies on both."""
    _, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4), layout="constrained", width_ratios=[1, 2.2]
    )
    pair = torch.cat([pixels[:1], mixed(pixels[:1], 7)], dim=-1)
    left.imshow(pair[0, 0].numpy(), cmap="gray_r")
    left.axvline(27.5, color="C3")
    left.set(xticks=[], yticks=[], title="a digit, and its patches mixed")
    for shift, (title, found) in enumerate({"whole": whole, "mixed": parts}.items()):
        heights = [fmean(values) for values in found.values()]
        places = [place + 0.4 * shift for place in range(len(found))]
        right.bar(places, heights, width=0.4, label=title, alpha=0.7)
        for place, values in zip(places, found.values(), strict=True):
            right.plot([place] * len(values), values, "k.")
    right.set_xticks([place + 0.2 for place in range(len(whole))], list(whole))
    right.set(ylabel="test digits named", ylim=(0, 1), xlabel="positions")
    right.set_title("Trained on whole digits")
    right.legend()
    right.grid(axis="y", alpha=0.3)


def main(config: Config) -> list[Finding]:
    # Matrices this small gain nothing from a second thread, and lose when it has to wait.
    torch.set_num_threads(1)
    base = ClassifierConfig(patch=7, steps=config.steps)
    _, test = pictures(base)
    in_parts = test._replace(pixels=mixed(test.pixels, base.patch))
    whole, parts, moved = {}, {}, 0
    for position in POSITIONS:
        runs = [replace(base, position=position, seed=seed) for seed in range(config.seeds)]
        models = [train_or_load(one, config.device).model for one in runs]
        both = list(zip(runs, models, strict=True))
        whole[position] = [accuracy(one, model, test) for one, model in both]
        parts[position] = [accuracy(one, model, in_parts) for one, model in both]
        if position == "none":
            moved = max(abs(a - b) for a, b in zip(whole["none"], parts["none"], strict=True))
    draw(test.pixels, whole, parts)

    source = "a transformer without positions sees a set"
    claim = "without positions: mixing every digit changes the share that is named by"
    findings = [Finding(claim, moved, expected=equals(0.0), source=source)]
    for position in POSITIONS:
        claim = f"positions {position}: whole test digits named"
        findings.append(Finding(claim, **over_seeds(whole[position])))
        if position != "none":
            claim = f"positions {position}: mixed test digits named"
            findings.append(Finding(claim, **over_seeds(parts[position])))
    for title, kind in {
        "learned positions": {"position": "learned"},
        "convolutional network": {"model": "convolutional"},
    }.items():
        right = []
        for shuffled in (False, True):
            runs = [
                replace(base, shuffled=shuffled, seed=seed, **kind) for seed in range(config.seeds)
            ]
            right.append(
                [accuracy(one, train_or_load(one, config.device).model, test) for one in runs]
            )
        claim = f"{title}: trained on digits all mixed in one way, named"
        findings.append(Finding(claim, **over_seeds(right[1])))
        lost = [a - b for a, b in zip(*right, strict=True)]
        goal = at_most(0.02) if title == "learned positions" else at_least(0.02)
        claim = f"{title}: what that order costs, next to the true one"
        findings.append(Finding(claim, goal=goal, **over_seeds(lost)))
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(steps=2, seeds=1))
