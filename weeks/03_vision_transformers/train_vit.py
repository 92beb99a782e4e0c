"""Can a transformer learn to see from a few thousand pictures?

A vision transformer, a convolutional network somewhat smaller and a linear model of the pixels
learn the digits of MNIST-5k (4,000 to learn from) and OpenMoji's ten categories (1,502). The two
networks see every picture moved, turned and scaled anew in each batch; the linear model sees it as
it is. OpenMoji's variants of one picture are never on both sides.

Expected: all beat the commonest class. That the transformer names 98% of the test digits, and that
it names more than the convolutional network, are goals: Dosovitskiy et al. found that with few
pictures it does not, because it must learn what a convolution is told.

Paper   Dosovitskiy et al. 2020, arXiv:2010.11929, section 4.3
Run     uv run python weeks/03_vision_transformers/train_vit.py
"""

from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from torch import Tensor

from implementations.contrastive.probes import linear_probe
from implementations.lab.findings import Finding, at_least, at_most, over_seeds
from implementations.lab.script import run
from implementations.models.picture_classifier import (
    ClassifierConfig,
    Labelled,
    accuracy,
    pictures,
    train_or_load,
)

NAMES = {"mnist_5k": "MNIST-5k", "openmoji": "OpenMoji"}
SIZES = {"mnist_5k": (28, 7), "openmoji": (32, 8)}  # of a picture, of a patch
KINDS = {"vision_transformer": "transformer", "convolutional": "convolutional network"}


@dataclass(frozen=True)
class Config:
    """Train and compare; models that were trained before are read from the cache."""

    data: tuple[str, ...] = ("mnist_5k", "openmoji")
    """what to learn"""
    seeds: int = 3
    """how often each network is trained"""
    digit_steps: int = 8000
    """training steps of 32 pictures of the transformer on the digits"""
    emoji_steps: int = 1500
    """the same on OpenMoji"""
    convolutional_steps: int = 1000
    """training steps of the convolutional network on either"""
    width: int = 64
    """of the transformer, a multiple of 16"""
    layers: int = 4
    """of the transformer"""
    device: str = "cpu"


def settings(config: Config, data: str, kind: str) -> ClassifierConfig:
    steps = {"mnist_5k": config.digit_steps, "openmoji": config.emoji_steps}[data]
    steps = config.convolutional_steps if kind == "convolutional" else steps
    size, patch = SIZES[data]
    shape = {"width": config.width, "layers": config.layers, "hidden": 2 * config.width}
    shape = shape if kind == "vision_transformer" else {}
    return ClassifierConfig(data=data, size=size, patch=patch, model=kind, steps=steps, **shape)


def commonest(known: Labelled, test: Labelled) -> float:
    """Accuracy of always naming the class that training shows most."""
    return (test.labels == known.labels.bincount().argmax()).double().mean().item()


def by_pixels(known: Labelled, test: Labelled) -> float:
    """Accuracy of a linear model of the pixels."""
    rows, unseen = known.pixels.flatten(1), test.pixels.flatten(1)
    return linear_probe(rows, known.labels, unseen, test.labels, penalty=0.03)


def compare(config: Config, data: str) -> tuple[dict[str, Float[Tensor, " seed"]], list[Finding]]:
    """Accuracies of all models on one set, and what they say."""
    known, test = pictures(settings(config, data, "vision_transformer"))
    chance, name = commonest(known, test), NAMES[data]
    found = {"linear, pixels": torch.tensor([by_pixels(known, test)], dtype=torch.float64)}
    findings = [Finding(f"{name}: the commonest class", chance)]
    seconds = {}
    for kind, title in KINDS.items():
        runs = [replace(settings(config, data, kind), seed=seed) for seed in range(config.seeds)]
        trained = [train_or_load(one, config.device) for one in runs]
        right = [accuracy(one, done.model, test) for one, done in zip(runs, trained, strict=True)]
        found[title] = torch.tensor(right, dtype=torch.float64)
        seconds[title] = sum(done.seconds for done in trained)
    steps = (config.digit_steps, config.emoji_steps, config.convolutional_steps)
    promised = min(steps) >= 500  # a few steps promise nothing
    for title, right in found.items():
        goal = at_least(0.98) if (data, title) == ("mnist_5k", "transformer") else None
        rule = at_least(chance) if promised and not goal else None
        claim = f"{name}, {title}: test pictures named"
        findings.append(Finding(claim, expected=rule, goal=goal, **over_seeds(right)))
    lead = found["transformer"].mean() - found["convolutional network"].mean()
    source = "Dosovitskiy et al. 2020: not with few pictures"
    claim = f"{name}: the transformer leads the convolutional network by"
    findings.append(Finding(claim, lead.item(), goal=at_least(0.0), source=source))
    mean = found["transformer"].mean().item()
    claim = f"{name}: standard error from having only {len(test.labels):,} test pictures"
    findings.append(Finding(claim, (mean * (1 - mean) / len(test.labels)) ** 0.5))
    for title, cost in seconds.items():
        claim = f"{name}, {title}: processor time of training, all seeds"
        goal = at_most(1200.0) if (data, title) == ("mnist_5k", "transformer") else None
        source = "ten minutes on two cores" if goal else ""
        findings.append(Finding(claim, cost, "s", goal=goal, source=source))
    return found, findings


def draw(results: dict[str, dict[str, Float[Tensor, " seed"]]], chances: dict[str, float]) -> None:
    """A bar for each model, a dot for each seed."""
    figure, panels = plt.subplots(1, len(results), figsize=(5.5 * len(results), 4), squeeze=False)
    for axes, (data, found) in zip(panels[0], results.items(), strict=True):
        for place, right in enumerate(found.values()):
            mean, spread = right.mean().item(), right.std(correction=min(1, len(right) - 1)).item()
            axes.bar(place, mean, yerr=spread, capsize=6, color=f"C{place}", alpha=0.6)
            axes.plot([place] * len(right), right.tolist(), "k.", alpha=0.6)
            axes.annotate(f"{mean:.1%}", (place, 0.03), ha="center")
        axes.axhline(chances[data], color="black", linestyle=":", label="the commonest class")
        axes.set_xticks(range(len(found)), [title.replace(" net", "\nnet") for title in found])
        axes.set(title=NAMES[data], ylabel="test pictures named", ylim=(0, 1.02))
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.12))
        axes.grid(axis="y", alpha=0.3)
    figure.tight_layout()


def main(config: Config) -> list[Finding]:
    if config.seeds < 1 or not set(config.data) <= set(NAMES):
        raise ValueError(
            f"at least one seed of {', '.join(NAMES)}, got {config.seeds} of {config.data}"
        )
    # Matrices this small gain nothing from a second thread, and lose when it has to wait.
    torch.set_num_threads(1)
    results, findings, chances = {}, [], {}
    for data in config.data:
        results[data], new = compare(config, data)
        chances[data] = new[0].measured
        findings += new
    draw(results, chances)
    return findings


if __name__ == "__main__":
    quick = Config(
        data=("mnist_5k",), seeds=1, digit_steps=40, emoji_steps=40, convolutional_steps=20
    )
    run(main, Config(), quick=quick)
