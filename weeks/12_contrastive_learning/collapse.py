"""What keeps embeddings from all becoming the same vector?

Two views of a picture should agree, and nothing agrees better than a constant. One encoder is
trained with five losses: views agree and nothing else; SimSiam, which predicts one view from the
other and takes the target as given; SimSiam without that; InfoNCE, with its negatives; and
agreement plus uniformity, which are the negatives by themselves. The effective rank of the test
pictures' embeddings is watched all the way.

Expected: agreement alone collapses to a rank of 1, and so does SimSiam without its stop-gradient;
InfoNCE and uniformity, which push pictures apart, do not. Reported: SimSiam, which pushes nothing.

Data    OpenMoji, CC BY-SA 4.0
Paper   Chen & He 2020, arXiv:2011.10566; Wang & Isola 2020, arXiv:2005.10242
Run     uv run python weeks/12_contrastive_learning/collapse.py
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

from implementations.contrastive.geometry import effective_rank
from implementations.contrastive.info_nce import nt_xent
from implementations.contrastive.named_pictures import as_floats, split_pictures
from implementations.contrastive.probes import nearest_neighbours
from implementations.contrastive.simclr import SimCLR, view_loss
from implementations.contrastive.trained import SimCLRConfig, batches, untrained
from implementations.contrastive.without_negatives import (
    SimSiam,
    align_and_spread,
    positives_only,
)
from implementations.lab.findings import Finding, at_least, at_most, over_seeds
from implementations.lab.script import run
from implementations.training.fit import fit

DIM = 32
LOSSES: dict[str, Callable[[], Callable[[Tensor, Tensor], Tensor]]] = {
    "agreement alone": lambda: positives_only,
    "SimSiam, no stop": lambda: SimSiam(DIM, DIM // 2, stop=False),
    "SimSiam": lambda: SimSiam(DIM, DIM // 2),
    "InfoNCE": lambda: partial(nt_xent, temperature=0.2),
    "agreement and uniformity": lambda: align_and_spread,
}
COLLAPSE, SPREAD = LOSSES.keys() & {"agreement alone", "SimSiam, no stop"}, 4.0


@dataclass(frozen=True)
class Config:
    """Train one encoder with and without negatives and watch the rank."""

    steps: int = 150
    """updates of each model"""
    seeds: int = 2
    """how often each model is trained"""
    batch: int = 128
    """pictures of a batch, each seen twice"""
    points: int = 10
    """how often the rank is measured on the way"""
    pictures: int | None = None
    """how many there are; all unless given"""


class Watched(nn.Module):
    """A model and its loss, whose predictor is trained too."""

    def __init__(self, model: SimCLR, loss: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.model, self.loss = model, loss


def main(config: Config) -> list[Finding]:
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    train, test = split_pictures(count=config.pictures)
    shown, asked = as_floats(train), as_floats(test)
    every = max(1, config.steps // config.points)
    curves: dict[str, list[list[float]]] = {name: [] for name in LOSSES}
    scores: dict[str, list[float]] = {name: [] for name in LOSSES}
    for name, make in LOSSES.items():
        for seed in range(config.seeds):
            sizes = {"width": 48, "layers": 2, "dim": DIM, "pictures": config.pictures}
            plan = SimCLRConfig(**sizes, batch=config.batch, steps=config.steps, seed=seed)
            watched, curve = Watched(untrained(plan), make()), []
            model = watched.model

            def watch(step: int, model: SimCLR = model, curve: list[float] = curve) -> None:
                if step % every == 0:
                    with torch.no_grad():
                        curve.append(effective_rank(model(asked)))

            fit(
                watched,
                batches(plan, None),
                lambda both, batch: view_loss(both.model, batch, both.loss),
                steps=config.steps,
                learning_rate=2e-3,
                watch=watch,
                title=name,
            )
            with torch.no_grad():
                features = [model.features(x) for x in (shown, asked)]
            curves[name].append(curve)
            scores[name].append(
                nearest_neighbours(features[0], train.category, features[1], test.category)
            )
    draw(curves, every)
    findings = []
    for name in LOSSES:
        last = np.array(curves[name])[:, -1]
        rule, source = None, ""
        if config.steps >= 100:  # a few steps promise nothing
            rule = at_most(1.5) if name in COLLAPSE else at_least(SPREAD)
            rule = None if name == "SimSiam" else rule
            source = "Chen & He 2020, figure 2" if name in COLLAPSE else "Wang & Isola 2020"
        source = source if rule else ""
        claim = f"{name}: effective rank of {DIM}"
        findings.append(Finding(claim, expected=rule, source=source, **over_seeds(last)))
        findings.append(Finding(f"{name}: neighbours right", float(np.mean(scores[name]))))
    common = torch.bincount(test.category).max().item() / len(test.codes)
    return [*findings, Finding("the commonest category", common)]


def draw(curves: dict[str, list[list[float]]], every: int) -> None:
    """Effective rank while training, a line for each seed."""
    _, axes = plt.subplots(figsize=(8.5, 4.4), layout="constrained")
    for colour, (name, ranks) in zip(("C3", "C1", "C4", "C0", "C2"), curves.items(), strict=True):
        steps = every * np.arange(len(ranks[0]))
        axes.plot(steps, np.array(ranks).T, ".-", color=colour)
        axes.lines[-1].set_label(name)
    axes.axhline(1, color="black", linestyle=":")
    axes.set(xlabel="step", ylabel=f"effective rank, of {DIM}", yscale="log")
    axes.set(title="Collapse: how many directions the test embeddings use")
    axes.set_yticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()


if __name__ == "__main__":
    run(main, Config(), quick=Config(steps=4, seeds=1, batch=16, points=2, pictures=80))
