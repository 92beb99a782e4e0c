"""Can a small VAE learn to write? And how much does its bound understate what it has learnt?

A VAE learns 4,000 black and white digits of MNIST (or KanjiVG's characters, with --data kanji_32)
and is asked about the held-out ones: the ELBO, and the importance-weighted bound with 5, 50 and 500
samples. A second one climbs the importance-weighted bound itself, for a third of the steps, which
cost more. Three sheets show what the first writes from nothing, what it makes of digits it has not
seen, and the way from one digit to another.

Expected: L_1 <= L_5 <= L_50 <= L_500 <= log p(x), for every single digit, because the groups of
samples lie within one another; the last steps are the smallest. Pixels that are independent of one
another, each with its own frequency, must be beaten by far. Stop it with Ctrl-C: the same command
goes on.

Paper   Kingma & Welling 2013, arXiv:1312.6114; Burda et al. 2015, arXiv:1509.00519
Run     uv run python weeks/07_autoencoders/train_vae.py
        uv run python weeks/07_autoencoders/train_vae.py --data kanji_32
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from torch import Tensor

from implementations.generative.importance_weighted import effective_samples, nested_bounds
from implementations.generative.likelihoods import bernoulli_log_likelihood
from implementations.generative.trained import (
    VAEConfig,
    held_out_pictures,
    images_of,
    sampled_log_weights,
    train_or_load,
)
from implementations.generative.vae import VAE
from implementations.lab.findings import Finding, at_least, equals
from implementations.lab.script import run

COUNTS = (1, 5, 50, 500)


@dataclass(frozen=True)
class Config:
    """Train a VAE and look at it from all sides."""

    data: Literal["mnist_5k", "kanji_32", "digits"] = "mnist_5k"
    latent: int = 20
    hidden: int = 256
    steps: int = 6000
    """of the VAE that climbs the ELBO"""
    weighted_steps: int = 2000
    """of the one that climbs the bound with 5 samples; 0 for none"""
    pictures: int = 500
    """held-out ones, of those that there are"""


def pixel_frequencies(config: VAEConfig) -> Float[Tensor, ""]:
    """Mean log-likelihood of the test pictures if every pixel were drawn by itself."""
    train, x = images_of(config).split()[0], held_out_pictures(config)
    # One picture more of each colour, so that no pixel is impossible.
    white = train.pixels.flatten(1).double().sum(0) / (train.levels - 1) + 1
    share = white / (len(train.labels) + 2)
    return bernoulli_log_likelihood(x.double(), share.logit()).mean()


def sheet(rows: list[Tensor], labels: list[str], title: str, name: str) -> None:
    """Pictures in a grid, every row with its label."""
    figure, axes = plt.subplots(num=name, figsize=(9, 0.9 * len(rows) + 0.6), layout="constrained")
    side = round(rows[0].shape[-1] ** 0.5)
    grid = torch.stack(rows).unflatten(-1, (side, side))
    pixels = grid.permute(0, 2, 1, 3).flatten(0, 1).flatten(1).numpy()
    axes.imshow(pixels, cmap="gray_r", vmin=0, vmax=1)
    axes.set_yticks([side * (row + 0.5) for row in range(len(rows))], labels)
    axes.set(xticks=[], title=title)
    figure.set_label(name)


@torch.no_grad()
def draw(model: VAE, x: Float[Tensor, "image dim"], latent: int) -> None:
    """Samples, reconstructions, and straight lines through the space of codes."""
    torch.manual_seed(1)
    samples = model.mean(torch.randn(6, 12, latent))
    sheet(list(samples), [""] * 6, "Written from nothing: mean pictures of z ~ N(0, I)", "samples")
    some = x[torch.linspace(0, len(x) - 1, 24).long()]
    again = model.mean(model.posterior(some).mean)
    rows, names = [some[:12], again[:12], some[12:], again[12:]], ["held out", "again"] * 2
    sheet(rows, names, "Held-out pictures, and what came back through the code", "reconstructions")
    codes, part = model.posterior(some).mean, torch.linspace(0, 1, 12)[:, None]
    lines = [
        model.mean((1 - part) * a + part * b) for a, b in zip(codes[:5], codes[-5:], strict=True)
    ]
    sheet(lines, [""] * 5, "From one code to another, in a straight line", "interpolation")


def estimates(model: VAE, x: Float[Tensor, "image dim"], name: str) -> list[Finding]:
    """The bounds of one model on held-out pictures."""
    weights = sampled_log_weights(model, x, COUNTS[-1])
    bounds = nested_bounds(weights.double(), COUNTS)
    # Rounding of float64 sums of some hundred nats.
    ordered = all((low <= high + 1e-9).all() for low, high in pairwise(bounds.values()))
    findings = [
        Finding(f"{name}: bound with K = {count}", bound.mean().item(), "nats")
        for count, bound in bounds.items()
    ]
    source = "Burda et al. 2015, theorem 1; Jensen, group within group"
    claim = f"{name}: the bounds are ordered for every picture"
    findings.append(Finding(claim, bool(ordered), expected=equals(True), source=source))
    claim = f"{name}: of {COUNTS[-1]} weights count as equal ones, median"
    return [*findings, Finding(claim, effective_samples(weights).median().item())]


def main(config: Config) -> list[Finding]:
    torch.set_num_threads(1)
    settings = VAEConfig(
        data=config.data, latent=config.latent, hidden=config.hidden, steps=config.steps
    )
    model, x = train_or_load(settings), held_out_pictures(settings)
    x = x[torch.linspace(0, len(x) - 1, min(config.pictures, len(x))).long()]
    findings = estimates(model, x, "ELBO-trained")
    frequencies = pixel_frequencies(settings).item()
    gained = findings[len(COUNTS) - 1].measured - frequencies
    trained = config.steps >= 1000  # a few steps, as in --quick, prove nothing
    findings.append(Finding("independent pixels", frequencies, "nats"))
    findings.append(
        Finding("better than independent pixels by", gained, "nats",
                expected=at_least(0.0) if trained else None)
    )  # fmt: skip
    with torch.no_grad():
        kl = model.posterior(x).kl_by_coordinate().mean(0)
    findings.append(
        Finding(
            "coordinates of z with more than 0.01 nats",
            int((kl > 0.01).sum()),
            f"of {config.latent}",
        )
    )
    if config.weighted_steps:
        weighted = replace(settings, steps=config.weighted_steps, importance_samples=5)
        findings += estimates(train_or_load(weighted), x, "trained with K = 5")
    draw(model, x, config.latent)
    return findings


if __name__ == "__main__":
    quick = Config(data="digits", latent=4, hidden=32, steps=60, weighted_steps=0, pictures=40)
    run(main, Config(), quick=quick)
