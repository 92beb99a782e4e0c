"""What does Glow know of Japanese characters, at which scale, and what does temperature do?

A multi-scale flow on KanjiVG's characters. On a CPU they are drawn at 16 x 16 and the model is
small: bits per dimension and pictures are those of a small model, half trained. The real size is

    uv run python weeks/09_normalizing_flows/glow_kanji.py --device cuda --size 32 --scales 3
        --steps 12 --hidden 256 --updates 20000

Noise that left at the finest scale can be drawn anew while the rest is kept: what changes is what
that scale knows. Temperature multiplies all noise: below 1, samples are likelier and more alike.
The run may be stopped; the same command goes on.

Expected: less than 8 bits a pixel, the price of a uniform guess among 256 levels, and less than
pixels that are independent, each by its own histogram. Colder samples are likelier by the model.

Data    KanjiVG (Ulrich Apel), CC BY-SA 3.0: so is the figure
Paper   Kingma & Dhariwal 2018, arXiv:1807.03039
Run     uv run python weeks/09_normalizing_flows/glow_kanji.py
"""

import math
from dataclasses import asdict, dataclass

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from implementations.flows.dequantization import Dequantized, bits_per_dimension
from implementations.flows.pixels import glow, negative_log_probability, price, set_from_data
from implementations.lab.files import run_folder
from implementations.lab.findings import Finding, at_least, at_most
from implementations.lab.pictures import draw_sheet
from implementations.lab.script import run
from implementations.sources.images import kanji
from implementations.training.loop import train
from implementations.training.rows import RandomRows
from implementations.training.settings import TrainingConfig

LEVELS, BITS = 256, "bits per dimension"
TEMPERATURES = (0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Config:
    """Train Glow on characters; look at its samples scale by scale and by temperature."""

    size: int = 16
    """rows and columns of a character"""
    scales: int = 2
    """how often the image is squeezed"""
    steps: int = 6
    """of Glow, at each scale"""
    hidden: int = 32
    """channels inside a coupling's network"""
    updates: int = 3000
    """training steps"""
    batch: int = 64
    """characters in a training step"""
    learning_rate: float = 2e-3
    """the highest one"""
    characters: int = 1000
    """of the test set, to be measured on at the end"""
    draws: int = 5
    """of the noise for each of them"""
    device: str = "cpu"
    """where to train: cpu or cuda"""


def trained(config: Config, learn: Tensor) -> Dequantized:
    """The model, from its folder in the cache if it has been trained, or from where it stopped."""
    torch.manual_seed(0)
    shape = (1, config.size, config.size)
    sizes = {"scales": config.scales, "steps": config.steps, "hidden": config.hidden}
    model = glow(shape, LEVELS, **sizes)
    set_from_data(model, spread(learn, 256))
    settings = TrainingConfig(
        steps=config.updates,
        learning_rate=config.learning_rate,
        warmup=config.updates // 20,
        final=0.01,
        weight_decay=0.0,
        clip=1000.0,  # the loss is a sum over pixels, and so is its gradient
        checkpoint_every=max(1, config.updates // 10),
        log_every=max(1, config.updates // 200),
        keep=1,
    )
    folder = run_folder("glow", asdict(config), __file__)
    rows = RandomRows(learn.to(config.device), batch=config.batch)
    model = model.to(config.device)
    train(model, rows, settings, folder, loss=negative_log_probability)
    return model.eval()


def spread(images: Tensor, count: int) -> Tensor:
    """At most so many images, from all over the set: it is ordered by code point."""
    return images[:: math.ceil(len(images) / count)]


def independent(learn: Tensor, test: Tensor) -> float:
    """Bits per dimension of pixels that know nothing of each other: a histogram for each place.

    Every level is counted once more than it was seen, or one new level would cost everything.
    """
    counts = torch.stack([row.bincount(minlength=LEVELS) + 1 for row in learn.flatten(1).T])
    log_share = (counts / counts.sum(1, keepdim=True)).log()
    log_prob = log_share.gather(1, test.flatten(1).T).sum(0)
    return bits_per_dimension(log_prob, test[0].numel()).mean().item()


@torch.no_grad()
def half_anew(model: Dequantized, count: int, size: int) -> dict[str, Tensor]:
    """Variants of one sample. The first half of the noise has left at the finest scale."""
    noise = 0.7 * torch.randn(count, size**2, device=next(model.parameters()).device)
    fine = torch.arange(size**2, device=noise.device) < size**2 // 2
    kept = {"finest noise anew, the rest kept": ~fine, "finest noise kept, the rest anew": fine}
    return {
        name: model.flow.bijection.inverse(torch.where(stays, noise[:1], noise)).value * LEVELS
        for name, stays in kept.items()
    }


def draw(rows: dict[str, Tensor]) -> None:
    figure, axes = plt.subplots(len(rows), 1, figsize=(9, len(rows)), layout="constrained")
    for axis, (name, images) in zip(axes, rows.items(), strict=True):
        draw_sheet(axis, images[:12, 0], LEVELS, name)
    figure.suptitle("Characters: KanjiVG, CC BY-SA 3.0, and what was learnt from it", fontsize=8)


def main(config: Config) -> list[Finding]:
    if config.device == "cpu":
        torch.set_num_threads(1)
    learn, test = (part.pixels.long() for part in kanji(config.size).split())
    model = trained(config, learn)
    unseen, seen = (spread(images, config.characters) for images in (test, learn))
    costs = price(model, unseen.to(config.device), config.draws)
    mean, deviation = costs.mean().item(), costs.std().item()
    learnt = price(model, seen.to(config.device), config.draws).mean().item()
    alone = independent(learn, unseen)
    torch.manual_seed(2)
    samples = {t: model.sample(64, t) for t in TEMPERATURES}
    likely = {t: price(model, images, 1).mean().item() for t, images in samples.items()}
    rows = {f"temperature {t}": images for t, images in samples.items()}
    draw({"real": spread(test, 12), **rows, **half_anew(model, 12, config.size)})
    colder = likely[1.0] - likely[TEMPERATURES[0]]
    return [
        Finding("rows and columns of a character", config.size),
        Finding("parameters", sum(parameter.numel() for parameter in model.parameters())),
        Finding("characters trained on, counting each time", config.updates * config.batch),
        Finding("independent pixels, a histogram each", alone, BITS),
        Finding("Glow: characters never seen", mean, BITS, expected=at_most(8)),
        Finding("their deviation, character by character", deviation, BITS),
        Finding("Glow: characters it was trained on", learnt, BITS),
        Finding("Glow costs less than independent pixels by", alone - mean, BITS, goal=at_least(0)),
        *(Finding(f"its samples at temperature {t}", likely[t], BITS) for t in TEMPERATURES),
        Finding("temperature 0.4 costs less than 1 by", colder, BITS, goal=at_least(0)),
    ]


if __name__ == "__main__":
    small = {"steps": 1, "hidden": 8, "updates": 30, "batch": 32, "characters": 100, "draws": 1}
    run(main, Config(), quick=Config(**small))
