"""Which picture is "a happy animal"? Search by meaning, in words that no picture is called.

The CLIP towers of train_clip.py embed every test picture; a sentence is embedded likewise, and the
pictures are ranked by their cosine with it. None of the pictures on the contact sheet was seen in
training. Then names in five languages look for their pictures, once through MiniLM, which read
English alone, and once through a decoder from scratch that was trained on names in all five.

Expected: with English names MiniLM's tower finds more than chance, k of all. Reported: what is left
of it in languages that share English's letters, and in those that do not.

Data    OpenMoji, CC BY-SA 4.0, and so is the contact sheet; MiniLM, Apache-2.0
Paper   Radford et al. 2021, arXiv:2103.00020
Run     uv run python weeks/12_contrastive_learning/search_images.py
        uv run python weeks/12_contrastive_learning/search_images.py --queries "a cold drink"
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from implementations.contrastive.clip import CLIP
from implementations.contrastive.named_pictures import Reader, as_floats, split_pictures
from implementations.contrastive.retrieval import ranks, recall
from implementations.contrastive.trained import CLIPConfig, reader, train_or_load
from implementations.lab.findings import Finding, at_least
from implementations.lab.script import run
from implementations.sources.openmoji import OpenMoji, openmoji

LANGUAGES = {"en": "English", "de": "German", "es": "Spanish", "ru": "Russian", "zh": "Chinese"}
QUERIES = (
    "a happy animal",
    "somebody is angry",
    "something sweet to eat",
    "a building where people live",
    "the flag of a country in Africa",
    "do not do this",
)


@dataclass(frozen=True)
class Config:
    """Rank pictures by a sentence; search with names of several languages."""

    queries: tuple[str, ...] = QUERIES
    """what to look for"""
    shown: int = 10
    """pictures for each query"""
    steps: int = 400
    """updates of each model"""
    batch: int = 128
    """pairs of a batch"""
    width: int = 64
    """of the towers"""
    layers: int = 4
    """blocks of the image tower"""
    pictures: int | None = None
    """how many there are; all unless given"""
    sharp: int = 72
    """rows and columns of a picture on the contact sheet; the model sees 32"""


def search(model: CLIP, read: Reader, images: Tensor, queries: tuple[str, ...]) -> Tensor:
    """The rows of the pictures for each query, best first."""
    with torch.no_grad():
        return (model.embed_texts(read(queries)) @ images.T).argsort(dim=1, descending=True)


def main(config: Config) -> list[Finding]:
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    sizes = {"steps": config.steps, "batch": config.batch, "pictures": config.pictures}
    sizes |= {"width": config.width, "layers": config.layers}
    towers = {
        "MiniLM, which read English": CLIPConfig(**sizes),
        "from scratch, on all five": CLIPConfig(
            **sizes, text="scratch", languages=tuple(LANGUAGES)
        ),
    }
    _, test = split_pictures(count=config.pictures)
    found: dict[str, list[float]] = {}
    for title, tower in towers.items():
        read = reader(tower)
        model = train_or_load(tower, read)
        with torch.no_grad():
            images = model.embed_images(as_floats(test))
            for language in LANGUAGES:
                scores = model.embed_texts(read(test.names[language])) @ images.T
                found.setdefault(title, []).append(recall(ranks(scores), 10))
        if tower.text == "minilm":
            best = search(model, read, images, config.queries)
    contact_sheet(test, best[:, : config.shown], config)
    chance = 10 / len(test.codes)
    draw(found, chance)
    findings = [Finding("pictures that are searched", len(test.codes)), Finding("chance", chance)]
    for query, rows in zip(config.queries, best.tolist(), strict=True):
        names = ", ".join(test.names["en"][row] for row in rows[:3])
        findings.append(Finding(f'"{query}" finds', names))
    for title, recalls in found.items():
        for language, value in zip(LANGUAGES.values(), recalls, strict=True):
            promised = config.steps >= 100 and title.startswith("MiniLM") and language == "English"
            rule = at_least(chance) if promised else None  # a few steps promise nothing
            claim = f"{title}: recall@10 of {language} names"
            findings.append(Finding(claim, value, expected=rule, source="chance" if rule else ""))
    return findings


def contact_sheet(test: OpenMoji, best: Tensor, config: Config) -> None:
    """A row of pictures for each query, drawn sharper than the model saw them."""
    sharp = openmoji(config.sharp)
    where = {code: row for row, code in enumerate(sharp.codes)}
    rows, columns = best.shape
    size = (columns, 1.3 * rows)
    figure, grid = plt.subplots(rows, columns, squeeze=False, num="openmoji", figsize=size)
    for query, row, line in zip(config.queries, best.tolist(), grid, strict=True):
        line[0].set_title(f'"{query}"', loc="left", fontsize=11)
        for picture, axes in zip(row, line, strict=True):
            axes.imshow(sharp.pixels[where[test.codes[picture]]].permute(1, 2, 0).numpy())
            axes.axis("off")
    figure.text(0.5, 0.05, "Emoji: OpenMoji, CC BY-SA 4.0", ha="center", fontsize=8)


def draw(found: dict[str, list[float]], chance: float) -> None:
    """Recall by language for both readers."""
    _, axes = plt.subplots(figsize=(8, 3.8), layout="constrained", num="languages")
    for shift, (title, recalls) in zip((-0.2, 0.2), found.items(), strict=True):
        places = [place + shift for place in range(len(recalls))]
        axes.bar(places, recalls, width=0.38, label=title)
    axes.axhline(chance, color="black", linestyle=":", label="chance")
    axes.set_xticks(range(len(LANGUAGES)), LANGUAGES.values())
    axes.set(ylabel="recall@10", title="Names look for pictures never seen")
    axes.legend()
    axes.grid(axis="y", alpha=0.3)


if __name__ == "__main__":
    small = {"pictures": 60, "width": 16, "layers": 1, "sharp": 32, "shown": 4}
    quick = Config(steps=4, batch=16, queries=QUERIES[:2], **small)
    run(main, Config(), quick=quick)
