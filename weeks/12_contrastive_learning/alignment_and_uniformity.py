"""What do temperature and batch size do to the embeddings?

SimCLR is trained at four temperatures, and with batches that are smaller and larger, and each time
test pictures are embedded: how close are two views of one (alignment, 0 is best), how evenly is the
sphere used (uniformity, low is best), and how good are the features for a vote of the nearest
neighbours?

Expected: a colder softmax looks at the nearest negatives alone and pushes them hardest, so from
temperature 1 down to 0.1 the sphere is used more evenly, and views of one picture lie less close:
the two are traded for each other. Reported: the same for the batch size, and what it is worth to
the features.

Data    OpenMoji, CC BY-SA 4.0
Paper   Wang & Isola 2020, arXiv:2005.10242; temperature: Wang & Liu 2020, arXiv:2012.09740
Run     uv run python weeks/12_contrastive_learning/alignment_and_uniformity.py
"""

from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import numpy as np
import torch

from implementations.contrastive.augmentation import two_views
from implementations.contrastive.geometry import (
    alignment,
    uniformity,
    uniformity_of_the_sphere,
)
from implementations.contrastive.named_pictures import as_floats, split_pictures
from implementations.contrastive.probes import nearest_neighbours
from implementations.contrastive.trained import STRONG, SimCLRConfig, train_or_load
from implementations.lab.findings import Finding, at_least, over_seeds
from implementations.lab.script import run

MEASURES = ("alignment", "uniformity", "accuracy")
SHAPE = {"width": 48, "layers": 2, "dim": 32}
NEVER_TRAINED = 1 << 20  # a step: views that no training has seen


@dataclass(frozen=True)
class Config:
    """Train SimCLR at several temperatures and batch sizes, and look at the sphere."""

    temperatures: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0)
    """at a batch of 128"""
    batches: tuple[int, ...] = (32, 256)
    """at a temperature of 0.2"""
    steps: int = 150
    """updates of each model"""
    seeds: int = 2
    """how often each model is trained"""
    batch: int = 128
    """pictures of a batch where the temperature is varied"""
    pictures: int | None = None
    """how many there are; all unless given"""


def measured(config: SimCLRConfig) -> tuple[float, float, float]:
    """Alignment and uniformity of test embeddings, and accuracy of neighbours by the features."""
    model = train_or_load(config)
    train, test = split_pictures(count=config.pictures)
    shown, asked = as_floats(train), as_floats(test)
    with torch.no_grad():
        views = [model(x) for x in two_views(asked, STRONG, seed=0, step=NEVER_TRAINED)]
        features = [model.features(x) for x in (shown, asked)]
        whole = model(asked)
    score = nearest_neighbours(features[0], train.category, features[1], test.category)
    return alignment(*views), uniformity(whole), score


def main(config: Config) -> list[Finding]:
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    base = SimCLRConfig(**SHAPE, steps=config.steps, batch=config.batch, pictures=config.pictures)
    plans = {f"temperature {t}": replace(base, temperature=t) for t in config.temperatures}
    plans |= {f"batch {b}": replace(base, batch=b) for b in config.batches}
    found = {
        name: np.array([measured(replace(plan, seed=seed)) for seed in range(config.seeds)])
        for name, plan in plans.items()
    }
    draw(found, len(config.temperatures))
    findings = [Finding("uniformity of the sphere itself", uniformity_of_the_sphere(base.dim))]
    for name, values in found.items():
        for column, measure in enumerate(MEASURES):
            findings.append(Finding(f"{name}: {measure}", **over_seeds(values[:, column])))
    warm, cold = (found[f"temperature {t}"].mean(0) for t in (1.0, 0.1))
    rule = at_least(0.0) if config.steps >= 100 else None  # a few steps promise nothing
    source = "Wang & Liu 2020, section 4" if rule else ""
    for column, claim in ((1, "0.1 is more uniform than 1 by"), (0, "0.1 is less aligned by")):
        change = (warm - cold)[column].item() * (1 if column else -1)
        findings.append(Finding(f"temperature {claim}", change, expected=rule, source=source))
    return findings


def draw(found: dict[str, np.ndarray], temperatures: int) -> None:
    """Each model in the plane of alignment and uniformity, its accuracy beside it."""
    _, panels = plt.subplots(
        1, 2, figsize=(11, 4.4), layout="constrained", sharex=True, sharey=True
    )
    names = list(found)
    for axes, group in zip(panels, (names[:temperatures], names[temperatures:]), strict=True):
        means = np.array([found[name].mean(0) for name in group])
        axes.plot(means[:, 0], means[:, 1], color="gray", alpha=0.5)
        for name, mean in zip(group, means, strict=True):
            values = found[name]
            axes.plot(values[:, 0], values[:, 1], "o", color="C0", alpha=0.5)
            label = f"{name.split()[1]}: {mean[2]:.2f}"
            axes.annotate(label, mean[:2], xytext=(6, 4), textcoords="offset points")
        axes.set(xlabel="alignment (0 is best)", ylabel="uniformity (low is best)")
        axes.set_title(f"{group[0].split()[0].capitalize()}: accuracy of neighbours")
        axes.grid(alpha=0.3)
        axes.margins(0.2)


if __name__ == "__main__":
    quick = Config(steps=3, seeds=1, temperatures=(0.1, 1.0), batches=(8,), batch=16, pictures=80)
    run(main, Config(), quick=quick)
