"""Can pictures and their names teach each other, from 1,500 pairs?

Two towers for OpenMoji: a small vision transformer, and beside it a reader of names. Once the
reader is MiniLM, frozen, of which only a projection is learned; once a decoder of two blocks that
starts from nothing. Measured on pictures of families that training has not seen: does a picture
find its name among all test names, does a name find its picture, and is a picture nearest to the
names that belong to its own category (zero-shot: no label was ever shown)?

Expected: both find more than chance, which is k of all for recall@k and the commonest category for
zero-shot. Hoped for: MiniLM does better, for it has read what the test names mean. The towers that
Radford et al. trained saw 400 million pairs; these see 1,500, and learn those by heart.

Data    OpenMoji, CC BY-SA 4.0; MiniLM, Apache-2.0
Paper   Radford et al. 2021, arXiv:2103.00020; a frozen tower: Zhai et al. 2021, arXiv:2111.07991
Run     uv run python weeks/12_contrastive_learning/train_clip.py
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from implementations.contrastive.clip import CLIP
from implementations.contrastive.named_pictures import Reader, as_floats, split_pictures
from implementations.contrastive.retrieval import ranks, recall, recalls_both_ways
from implementations.contrastive.trained import CLIPConfig, reader, train_or_load
from implementations.lab.findings import Finding, at_least
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


def zero_shot(
    model: CLIP, read: Reader, images: Float[Tensor, "image dim"], test: OpenMoji
) -> float:
    """Accuracy of "the category whose subcategories' names the picture is nearest to"."""
    pairs = sorted(set(zip(test.category.tolist(), test.subcategory.tolist(), strict=True)))
    words = [test.subcategories[sub].replace("-", " ") for _, sub in pairs]
    named = model.embed_texts(read(words).to(images.device))
    owner = torch.tensor([category for category, _ in pairs])
    rows = [named[owner == category].mean(0) for category in owner.unique()]
    nearest = owner.unique()[(images @ torch.stack(rows).T).argmax(1).cpu()]
    return (nearest == test.category).double().mean().item()


def main(config: Config) -> list[Finding]:
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    train, test = split_pictures(count=config.pictures)
    findings = [
        Finding("pictures to train on, and to test", f"{len(train.codes)}, {len(test.codes)}")
    ]
    curves, shot = {}, {}
    for text, title in TOWERS.items():
        read, found = reader(config.of(text, 0)), []
        for seed in range(config.seeds):
            model = train_or_load(config.of(text, seed), read, config.device)
            scores = {}
            for part in (train, test):
                with torch.no_grad():
                    images = model.embed_images(as_floats(part).to(config.device))
                    texts = model.embed_texts(read(part.names["en"]).to(config.device))
                    scores[len(part.codes)] = (images @ texts.T).cpu()
                    category = zero_shot(model, read, images, part) if part is test else 0.0
            known, asked = scores.values()
            curve = [recall(ranks(asked.T), k) for k in range(1, 51)]
            shot.setdefault(text, []).append(category)
            curves.setdefault(text, []).append(curve)
            found.append(
                recalls_both_ways(asked, AT) | {"in training @10": recall(ranks(known), 10)}
            )
        findings += described(title, found, len(test.codes))
    common = torch.bincount(test.category).max().item() / len(test.codes)
    for text, title in TOWERS.items():
        findings.append(
            several(f"{title}: zero-shot category", shot[text], at_least(common), "chance")
        )
    findings.append(Finding("the commonest category", common))
    gain = [a[9] - b[9] for a, b in zip(*(curves[text] for text in TOWERS), strict=True)]
    findings.append(several("MiniLM adds to recall@10, name to picture", gain, None, ""))
    findings[-1] = Finding(**(findings[-1].__dict__ | {"goal": at_least(0.0)}))
    draw(curves, shot, common, len(test.codes))
    return findings


def described(title: str, found: list[dict[str, float]], count: int) -> list[Finding]:
    """Recall both ways over the seeds, next to chance."""
    findings = []
    for name in found[0]:
        k = int(name.split("@")[1])
        rule = at_least(k / count) if k == 10 and "training" not in name else None
        values = [seen[name] for seen in found]
        findings.append(several(f"{title}: {name}", values, rule, "chance"))
    return findings


def several(claim: str, values: list[float], expected, source: str) -> Finding:
    """The mean over seeds, and one standard deviation where there are several."""
    noise = {"spread": float(np.std(values, ddof=1)), "seeds": len(values)} if values[1:] else {}
    source = source if expected else ""
    return Finding(claim, float(np.mean(values)), expected=expected, source=source, **noise)


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
