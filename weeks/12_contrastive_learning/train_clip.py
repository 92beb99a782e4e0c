"""Can pictures and their names teach each other, from 1,500 pairs?

Two towers for OpenMoji: a small vision transformer, and beside it a reader of names. Once the
reader is MiniLM, frozen, of which only a projection is learned; once a decoder of two blocks that
starts from nothing. Measured on pictures of families that training has not seen: does a picture
find its name among all test names, does a name find its picture, and is a picture nearest to the
names that belong to its own category (zero-shot: no label was ever shown)?

Expected: a picture finds its name among ten more often than chance, which is ten of all. Hoped
for: zero-shot beats the commonest category, and MiniLM does better, for it has read what the test
names mean. The towers of Radford et al. saw 400 million pairs; these see 1,500, time and again.

Data    OpenMoji, CC BY-SA 4.0; MiniLM, Apache-2.0
Paper   Radford et al. 2021, arXiv:2103.00020; a frozen tower: Zhai et al. 2021, arXiv:2111.07991
Run     uv run python weeks/12_contrastive_learning/train_clip.py
"""

from dataclasses import dataclass
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from implementations.contrastive.clip import CLIP
from implementations.contrastive.named_pictures import Reader, as_floats, split_pictures
from implementations.contrastive.retrieval import ranks, recall, recalls_both_ways
from implementations.contrastive.trained import CLIPConfig, reader, train_or_load
from implementations.lab.findings import Finding, at_least, over_seeds
from implementations.lab.script import run
from implementations.sources.openmoji import OpenMoji

TOWERS = {"minilm": "MiniLM, frozen", "scratch": "a decoder from scratch"}
AT = (1, 5, 10)


@dataclass(frozen=True)
class Config:
    """Train towers for pictures and names, and let them find each other."""

    steps: int = 400
    """updates of each model"""
    seeds: int = 3
    """how often each model is trained"""
    batch: int = 128
    """pairs of a batch"""
    patch: int = 8
    """side of a patch in pixels; 4 costs four times as much"""
    width: int = 64
    """of the towers"""
    layers: int = 4
    """blocks of the image tower"""
    pictures: int | None = None
    """how many there are; all unless given"""
    device: str = "cpu"

    def of(self, text: str, seed: int) -> CLIPConfig:
        sizes = {"patch": self.patch, "width": self.width, "layers": self.layers}
        sizes |= {"steps": self.steps, "batch": self.batch, "pictures": self.pictures}
        return CLIPConfig(**sizes, text=text, seed=seed)


class Names(NamedTuple):
    """What a reader makes of all words that are needed: read once, embedded by every model."""

    train: Tensor
    test: Tensor
    subcategories: Tensor


def read_names(read: Reader, train: OpenMoji, test: OpenMoji) -> Names:
    words = [word.replace("-", " ") for word in test.subcategories]
    return Names(read(train.names["en"]), read(test.names["en"]), read(words))


def zero_shot(images: Tensor, named: Tensor, test: OpenMoji) -> float:
    """Accuracy of "the category whose subcategories' names the picture is nearest to"."""
    owner = dict(zip(test.subcategory.tolist(), test.category.tolist(), strict=True))
    categories = sorted(set(owner.values()))
    mean = [named[[sub for sub in owner if owner[sub] == cat]].mean(0) for cat in categories]
    nearest = torch.tensor(categories)[(images @ torch.stack(mean).T).argmax(1)]
    return (nearest == test.category).double().mean().item()


@torch.no_grad()
def measured(
    model: CLIP, names: Names, train: OpenMoji, test: OpenMoji
) -> tuple[dict[str, float], list[float]]:
    """Recall both ways and zero-shot accuracy, and the recall of names at every k up to 50."""
    shown, asked = (model.embed_images(as_floats(part)) for part in (train, test))
    scores = asked @ model.embed_texts(names.test).T
    found = recalls_both_ways(scores, AT)
    known = shown @ model.embed_texts(names.train).T
    found["training pictures, image to text @10"] = recall(ranks(known), 10)
    found["zero-shot category"] = zero_shot(asked, model.embed_texts(names.subcategories), test)
    return found, [recall(ranks(scores.T), k) for k in range(1, 51)]


def main(config: Config) -> list[Finding]:
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    train, test = split_pictures(count=config.pictures)
    found, curves = {}, {}
    for text in TOWERS:
        read = reader(config.of(text, 0))
        names, found[text], curves[text] = read_names(read, train, test), [], []
        for seed in range(config.seeds):
            model = train_or_load(config.of(text, seed), read, config.device).cpu()
            values, curve = measured(model, names, train, test)
            found[text].append(values)
            curves[text].append(curve)
    common = torch.bincount(test.category).max().item() / len(test.codes)
    shot = {text: [seen["zero-shot category"] for seen in found[text]] for text in TOWERS}
    draw(curves, shot, common, len(test.codes))
    count = len(test.codes)
    findings = [
        Finding("pictures to train on", len(train.codes)),
        Finding("pictures of the test, each of another family", count),
        Finding("recall@10 by chance", 10 / count),
        Finding("the commonest category", common),
    ]
    promised = config.steps >= 100  # a few steps promise nothing
    for text, title in TOWERS.items():
        for name in found[text][0]:
            beats = at_least(10 / count) if promised and name.endswith("text @10") else None
            goal = at_least(common) if name.startswith("zero-shot") else None
            rules = {"expected": None if name.startswith("training") else beats, "goal": goal}
            rules["source"] = "chance" if rules["expected"] else ""
            values = over_seeds(x[name] for x in found[text])
            findings.append(Finding(f"{title}: {name}", **values, **rules))
    gain = [a[9] - b[9] for a, b in zip(curves["minilm"], curves["scratch"], strict=True)]
    claim = "MiniLM adds to recall@10, text to image"
    return [*findings, Finding(claim, goal=at_least(0.0), **over_seeds(gain))]


def draw(curves: dict, shot: dict, common: float, count: int) -> None:
    """Recall by k with a line a seed, and zero-shot accuracy with a dot a seed."""
    _, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(2, 1)
    )
    ks = np.arange(1, 51)
    for (text, title), colour in zip(TOWERS.items(), ("C0", "C1"), strict=True):
        left.plot(ks, np.array(curves[text]).T, color=colour)
        left.lines[-1].set_label(title)
        right.plot([title] * len(shot[text]), shot[text], "o", color=colour)
    left.plot(ks, ks / count, "k:", label="chance")
    left.set(xlabel="k", ylabel="recall@k", ylim=(0, None))
    left.set_title(f"A name looks for its picture among {count} never seen")
    right.axhline(common, color="black", linestyle=":")
    right.annotate("the commonest category", (0.5, common), va="bottom", ha="center")
    right.set(ylabel="accuracy", ylim=(0, None), xlim=(-0.5, 1.5), title="Zero-shot category")
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)


if __name__ == "__main__":
    run(main, Config(), quick=Config(steps=6, seeds=1, batch=16, layers=1, width=16, pictures=80))
