"""What separates the ELBO from log p(x), and who is to blame: the encoder, or the shape of q?

    log p(x) - ELBO = KL(q || p(z | x))
                    = [log p(x) - best ELBO of any diagonal Gaussian]        approximation
                    + [that best - ELBO of the encoder's q]                  amortization

In the linear model all three are formulas. W is turned against the principal axes, which changes no
p(x) and makes the posterior less diagonal, and a linear encoder learns step by step. In a VAE that
has learnt black and white digits, log p(x) is a bound with thousands of samples, and the best
diagonal Gaussian is found by climbing the ELBO for every picture alone.

Expected: in the linear model the two parts add up to the divergence to rounding, approximation
alone is left when the encoder has learnt, and it is zero where W lies along the axes. In the deep
model amortization is the larger part, as Cremer et al. found.

Paper   Cremer, Li & Duvenaud 2018, arXiv:1801.03558
Run     uv run python weeks/07_autoencoders/elbo_gap.py
"""

import math
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from implementations.generative.diagonal_gaussian import DiagonalGaussian
from implementations.generative.importance_weighted import importance_weighted_bound
from implementations.generative.linear_vae import LinearVAE, best_linear_vae
from implementations.generative.trained import (
    VAEConfig,
    held_out_pictures,
    sampled_log_weights,
    train_or_load,
)
from implementations.generative.vae import VAE
from implementations.lab.findings import Finding, at_least, at_most
from implementations.lab.script import run
from implementations.sources.images import digits


@dataclass(frozen=True)
class Config:
    """Measure the two parts of the gap."""

    encoder_steps: int = 3000
    """gradient steps of the linear encoder"""
    steps: int = 4000
    """training steps of the deep VAE"""
    pictures: int = 100
    """test digits on which the deep gap is split"""
    samples: int = 5000
    """of z, for log p(x)"""
    climbs: int = 400
    """steps up the ELBO for each picture's own Gaussian"""


def turned(model: LinearVAE, degrees: float) -> LinearVAE:
    """The same p(x): the first and the last coordinate of z turned into one another."""
    rotation, angle = torch.eye(model.weight.shape[1], dtype=torch.float64), math.radians(degrees)
    rotation[0, 0] = rotation[-1, -1] = math.cos(angle)
    rotation[0, -1], rotation[-1, 0] = -math.sin(angle), math.sin(angle)
    return model.rotated(rotation)


def approximation_gap(model: LinearVAE, x: Float[Tensor, "image dim"]) -> float:
    """Mean of log p(x) - the best ELBO of any diagonal Gaussian, in nats."""
    return (model.log_likelihood(x) - model.elbo(x, model.best_diagonal(x))).mean().item()


def while_it_learns(
    model: LinearVAE, x: Float[Tensor, "image dim"], looks: list[int]
) -> Float[np.ndarray, "look 2"]:
    """Amortization gap of a linear encoder after so many steps, and the KL to the posterior."""
    encode = torch.zeros(x.shape[1], model.weight.shape[1], dtype=x.dtype, requires_grad=True)
    best, gaps = model.best_diagonal(x), []
    optimizer = torch.optim.Adam([encode], 3e-3)
    for step in range(looks[-1] + 1):
        q = best._replace(mean=(x - model.mean) @ encode)
        bound = model.elbo(x, q).mean()
        if step in looks:
            amortization = model.elbo(x, best).mean() - bound
            gaps.append([amortization.item(), model.kl_to_posterior(x, q).mean().item()])
        optimizer.zero_grad()
        (-bound).backward()
        optimizer.step()
    return np.array(gaps)


def best_gaussians(model: VAE, x: Float[Tensor, "image dim"], steps: int) -> DiagonalGaussian:
    """For every picture a diagonal Gaussian of its own, climbed to from the encoder's."""
    leaves = [part.detach().clone().requires_grad_() for part in model.posterior(x)]
    optimizer = torch.optim.Adam(leaves, 0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    torch.manual_seed(0)
    for _ in tqdm(range(steps), desc="climbing", unit="step"):
        q = DiagonalGaussian(*leaves)
        noise = torch.randn(10, *leaves[0].shape)
        bound = model.log_likelihood(x, q.at(noise)).mean(0) - q.kl_to_standard()
        optimizer.zero_grad()
        (-bound.sum()).backward()
        optimizer.step()
        schedule.step()
    return DiagonalGaussian(*(leaf.detach() for leaf in leaves))


@torch.no_grad()
def deep_gaps(config: Config) -> tuple[Tensor, Tensor]:
    """Approximation and amortization of every picture, in nats."""
    settings = VAEConfig(
        data="digits", latent=8, hidden=64, dropout=0.0, steps=config.steps, learning_rate=3e-3
    )
    with torch.enable_grad():
        model = train_or_load(settings).requires_grad_(False)
    x = held_out_pictures(settings)[: config.pictures]
    with torch.enable_grad():
        own = best_gaussians(model, x, config.climbs)
    exact = importance_weighted_bound(sampled_log_weights(model, x, config.samples))
    noise = torch.randn(2000, *own.mean.shape, generator=torch.Generator().manual_seed(1))
    # The same noise for both, so that their difference is not the noise's.
    best, encoder = (
        model.log_likelihood(x, q.at(noise)).mean(0) - q.kl_to_standard()
        for q in (own, model.posterior(x))
    )
    return exact - best, best - encoder


def draw(
    looks: list[int], approximation: float, gaps: np.ndarray, deep: tuple[Tensor, Tensor]
) -> None:
    """The linear gap by the encoder's steps, and the deep gap by picture."""
    names = ("approximation", "amortization")
    _, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    left.stackplot(looks, [approximation] * len(looks), gaps[:, 0], alpha=0.5, labels=names)
    left.plot(looks, gaps[:, 1], "k.", label="KL(q || p(z | x)), by its own formula")
    left.set(xlabel="training steps of the encoder", ylabel="nats", xscale="log", yscale="log")
    left.set_title("Linear model, W turned by 45 degrees: the gap and its parts")
    order = sum(deep).argsort()
    parts = [part[order] for part in deep]
    right.stackplot(range(len(order)), *parts, alpha=0.5, labels=names)
    right.set(xlabel="test digit, by the size of its gap", ylabel="nats")
    right.set_title("Deep VAE: the gap of each digit")
    for axes in (left, right):
        axes.legend(loc="best")


def main(config: Config) -> list[Finding]:
    torch.set_num_threads(1)
    x = digits().split()[0].pixels.flatten(1).double() / 16
    straight = best_linear_vae(x, latent=16)
    model = turned(straight, 45)
    looks = sorted({round(step) for step in np.geomspace(1, config.encoder_steps, 24)})
    approximation, gaps = approximation_gap(model, x), while_it_learns(model, x, looks)
    a, b = straight.precision().diagonal()[[0, -1]].tolist()
    formula = math.log((a + b) / (2 * math.sqrt(a * b)))
    deep = deep_gaps(config)
    draw(looks, approximation, gaps, deep)

    rounding = np.abs(approximation + gaps[:, 0] - gaps[:, 1]).max().item()
    claims = [
        ("linear: approximation + amortization differ from the divergence by", rounding, 1e-9),
        ("linear, W along the axes: approximation gap", abs(approximation_gap(straight, x)), 1e-6),
        (
            "linear, W turned: its gap differs from the formula's by",
            abs(approximation - formula),
            1e-9,
        ),
    ]
    identity = "notes/07, steps 3 and 8"
    findings = [
        Finding(c, v, "nats", expected=at_most(most), source=identity) for c, v, most in claims
    ]
    findings += [
        Finding("linear, W turned by 45 degrees: approximation gap", approximation, "nats"),
        Finding(f"linear: amortization gap after {looks[-1]} steps", gaps[-1, 0].item(), "nats"),
    ]
    means = [part.mean().item() for part in deep]
    errors = [part.std().item() / len(part) ** 0.5 for part in deep]
    for name, mean, error in zip(("approximation", "amortization"), means, errors, strict=True):
        rule = at_least(-3 * error)  # of pictures; a gap is not negative
        claim = f"deep: {name} gap, mean of {len(deep[0])} digits"
        findings.append(Finding(claim, mean, "nats", expected=rule, source="a divergence is >= 0"))
    claim, source = "deep: amortization's share of the gap", "Cremer et al. 2018, table 2"
    goal = at_least(0.5)
    return [*findings, Finding(claim, means[1] / sum(means), goal=goal, source=source)]


if __name__ == "__main__":
    run(
        main,
        Config(),
        quick=Config(encoder_steps=100, steps=60, pictures=10, samples=200, climbs=30),
    )
