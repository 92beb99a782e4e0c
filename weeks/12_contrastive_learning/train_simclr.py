"""What does an encoder learn from pictures without a single label?

The same small vision transformer four times over: with random weights, trained by SimCLR on
OpenMoji's pictures alone, trained with the labels (its ten categories), and not at all, the probes
reading pixels. Each time its features are frozen, and a linear probe and the nearest neighbours
tell the category of pictures from families never seen.

Hoped for: SimCLR's features beat random ones under both probes, as Chen et al. found with a million
photographs, and come near the supervised ones. Reported beside them: how pixels do, which for
drawings in few plain colours are not a weak baseline.

Data    OpenMoji, CC BY-SA 4.0
Paper   Chen et al. 2020, arXiv:2002.05709
Run     uv run python weeks/12_contrastive_learning/train_simclr.py
"""

from dataclasses import dataclass
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from implementations.contrastive.augmentation import augment
from implementations.contrastive.distinct import DistinctRows
from implementations.contrastive.named_pictures import as_floats, split_pictures
from implementations.contrastive.probes import linear_probe, nearest_neighbours
from implementations.contrastive.trained import STRONG, SimCLRConfig, train_or_load, untrained
from implementations.lab.findings import Finding, at_least, over_seeds
from implementations.lab.script import run
from implementations.training.fit import fit

PROBES = {"linear probe": linear_probe, "nearest neighbours": nearest_neighbours}
KINDS = ("pixels", "random weights", "SimCLR", "supervised")


@dataclass(frozen=True)
class Config:
    """Train one encoder without labels and one with them, and probe both."""

    steps: int = 400
    """updates of each model"""
    seeds: int = 3
    """how often each model is trained"""
    batch: int = 128
    """pictures of a batch, each seen twice by SimCLR"""
    patch: int = 8
    """side of a patch in pixels; 4 costs four times as much"""
    width: int = 64
    layers: int = 4
    pictures: int | None = None
    """how many there are; all unless given"""
    device: str = "cpu"

    def of(self, seed: int) -> SimCLRConfig:
        sizes = {"patch": self.patch, "width": self.width, "layers": self.layers}
        sizes |= {"steps": self.steps, "batch": self.batch, "pictures": self.pictures}
        return SimCLRConfig(**sizes, seed=seed)


def supervised(config: Config, seed: int, pixels: Tensor, labels: Tensor, families: Tensor):
    """The same encoder, trained with the same pictures, changes and steps to name categories."""
    encoder = untrained(config.of(seed)).encoder
    model = nn.Sequential(encoder, nn.Linear(config.width, int(labels.max()) + 1))
    model, rows = model.to(config.device), DistinctRows(families, batch=config.batch, seed=seed)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen = rows(step)
        return augment(pixels[chosen], STRONG, seed=seed, step=step), labels[chosen]

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, int]:
        return cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[0])

    fit(model, batch, loss, steps=config.steps, learning_rate=1e-3, title="supervised")
    return encoder


def main(config: Config) -> list[Finding]:
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    train, test = split_pictures(count=config.pictures)
    pixels, asked = as_floats(train), as_floats(test)
    found = {(probe, kind): [] for probe, kind in product(PROBES, KINDS)}
    for seed in range(config.seeds):
        encoders = {
            "pixels": nn.Flatten(),
            "random weights": untrained(config.of(seed)).encoder,
            "SimCLR": train_or_load(config.of(seed), device=config.device).encoder,
            "supervised": supervised(config, seed, pixels, train.category, train.family),
        }
        for (kind, encoder), (name, probe) in product(encoders.items(), PROBES.items()):
            with torch.no_grad():
                features = [encoder.cpu().eval()(x) for x in (pixels, asked)]
            score = probe(features[0], train.category, features[1], test.category)
            found[name, kind].append(score)
    draw(found, common := torch.bincount(test.category).max().item() / len(test.codes))
    findings = [Finding("the commonest category", common)]
    for (probe, kind), scores in found.items():
        known = scores[:1] if kind == "pixels" else scores  # pixels know no seed
        findings.append(Finding(f"{kind}: {probe}", **over_seeds(known)))
    for probe in PROBES:
        mean = {kind: float(np.mean(found[probe, kind])) for kind in KINDS}
        gain = mean["SimCLR"] - mean["random weights"]
        claim = f"SimCLR over random weights, {probe}"
        findings.append(Finding(claim, gain, goal=at_least(0.0), source="Chen et al. 2020"))
        gap = mean["SimCLR"] - mean["supervised"]
        claim = f"SimCLR over supervised, {probe}"
        findings.append(Finding(claim, gap, goal=at_least(-0.05)))
    return findings


def draw(found: dict[tuple[str, str], list[float]], common: float) -> None:
    """A dot for each seed."""
    _, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for probe, marker, shift in zip(PROBES, "os", (-0.08, 0.08), strict=True):
        for place, kind in enumerate(KINDS):
            scores = found[probe, kind]
            label = probe if place == 0 else None
            colour = "C0" if marker == "o" else "C1"
            axes.plot([place + shift] * len(scores), scores, marker, color=colour, label=label)
    axes.axhline(common, color="black", linestyle=":", label="the commonest category")
    axes.set_xticks(range(len(KINDS)), KINDS)
    axes.set(
        ylabel="accuracy", ylim=(0, 1), title="Ten categories of OpenMoji from frozen features"
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


if __name__ == "__main__":
    quick = Config(steps=4, seeds=1, batch=16, layers=1, width=16, pictures=80)
    run(main, Config(), quick=quick)
