"""Can a model that learned small pictures read larger ones?

Transformers with four kinds of positions learn digits of 28 x 28 pixels in patches of 7 x 7: a grid
of 4 x 4. Then they are shown the same test digits drawn with more pixels or fewer, cut into patches
of the same size: grids of 3 x 3 to 8 x 8. Learned positions are interpolated to the new grid,
sinusoidal and rotary ones are computed at the places between, and without positions there is
nothing to do. For learned positions the careless way is measured too: their rows read in order, as
far as they reach.

Expected: whatever the positions do, a patch of a larger picture holds a smaller piece of a digit,
so accuracy falls on both sides of 28. Interpolation should lose less than rows read in order.

Paper   Dosovitskiy et al. 2020, arXiv:2010.11929, section 3.2; Touvron et al. 2019,
        arXiv:1906.06423 (train and test resolution)
Run     uv run python weeks/03_vision_transformers/more_pixels.py
"""

from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from implementations.lab.findings import Finding, at_least, equals, over_seeds
from implementations.lab.script import run
from implementations.models.picture_classifier import (
    ClassifierConfig,
    Labelled,
    accuracy,
    pictures,
    train_or_load,
)

POSITIONS = ("learned", "sinusoidal", "rotary", "none")
CARELESS = "learned, rows in order"


@dataclass(frozen=True)
class Config:
    """Train at 28 x 28, test at other sizes."""

    sizes: tuple[int, ...] = (21, 28, 35, 42, 49, 56)
    """pixels of a test picture's side: multiples of 7, 28 among them"""
    steps: int = 1000
    """training steps of each model, 32 pictures each"""
    seeds: int = 2
    """how often each model is trained"""
    device: str = "cpu"


class RowsInOrder(nn.Module):
    """A model that forgets that its positions are a grid: patch i gets row i, the last for more."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        model = self.model
        patches, table = model.patches(pixels), model.positions[0]
        x = patches + table[torch.arange(patches.shape[1]).clamp(max=len(table) - 1)]
        for block in model.blocks:
            x = block(x)
        return model.head(model.norm(x).mean(1))


def measure(config: Config, tests: dict[int, Labelled]) -> dict[str, Tensor]:
    """Accuracy [seed, size] of every kind of positions."""
    base = ClassifierConfig(patch=7, steps=config.steps)
    found = {}
    for position in POSITIONS:
        runs = [replace(base, position=position, seed=seed) for seed in range(config.seeds)]
        models = [train_or_load(one, config.device).model for one in runs]
        ways = {position: models}
        if position == "learned":
            ways[CARELESS] = [RowsInOrder(model) for model in models]
        for name, readers in ways.items():
            rows = [[accuracy(base, reader, test) for test in tests.values()] for reader in readers]
            found[name] = torch.tensor(rows)
    return found


def draw(found: dict[str, Tensor], sizes: tuple[int, ...]) -> None:
    """Accuracy by size, a line for each kind of positions."""
    _, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, right in found.items():
        style = "--" if name == CARELESS else "-"
        axes.plot(sizes, right.mean(0).tolist(), f"o{style}", label=name)
        axes.fill_between(sizes, right.amin(0).tolist(), right.amax(0).tolist(), alpha=0.15)
    axes.axvline(28, color="black", linestyle=":", label="trained at")
    axes.set_xticks(sizes, [f"{size}\n{size // 7} x {size // 7}" for size in sizes])
    axes.set(xlabel="pixels of a side; patches", ylabel="test digits named", ylim=(0, 1))
    axes.set_title("Digits drawn with more pixels, patches of 7 x 7 (band: all seeds)")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    axes.grid(alpha=0.3)


def main(config: Config) -> list[Finding]:
    if 28 not in config.sizes or any(size % 7 for size in config.sizes):
        raise ValueError(f"sizes are multiples of 7 and 28 is among them, got {config.sizes}")
    # Matrices this small gain nothing from a second thread, and lose when it has to wait.
    torch.set_num_threads(1)
    tests = {size: pictures(ClassifierConfig(size=size))[1] for size in config.sizes}
    found = measure(config, tests)
    draw(found, config.sizes)
    findings = []
    for name, right in found.items():
        for size in (28, *(size for size in (42, 56) if size in tests)):
            column = right[:, config.sizes.index(size)]
            claim = f"{name}: digits named at {size} x {size}"
            findings.append(Finding(claim, **over_seeds(column)))
    larger = [i for i, size in enumerate(config.sizes) if size > 28]
    if larger:
        gain = (found["learned"] - found[CARELESS])[:, larger].mean().item()
        claim = "larger pictures: interpolating learned positions gains, next to rows in order"
        findings.append(Finding(claim, gain, goal=at_least(0.0), source="Dosovitskiy et al. 2020"))
    exact = (found["learned"] - found[CARELESS])[:, config.sizes.index(28)].abs().max().item()
    claim = "at the size trained on, the two ways differ by"
    findings.append(Finding(claim, exact, expected=equals(0.0), source="they are one model there"))
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(sizes=(28, 42), steps=2, seeds=1))
