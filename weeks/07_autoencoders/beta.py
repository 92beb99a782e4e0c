"""What does a nat of code buy? Rate and distortion, as beta moves between them.

    rate        KL(q(z | x) || p(z)), the nats that a code costs, mean over pictures
    distortion  E |x - reconstruction|², mean over pictures

The β-ELBO is -(distortion / 2σ² + β rate) + constant, so every β asks for one point of a curve and
says its slope there. For Gaussian data Shannon knew the curve before there were VAEs: the variances
λ of the principal axes are filled with noise up to a common level θ,

    distortion = Σ min(λ, θ)        rate = Σ ½ log(λ / θ) over λ > θ        θ = β σ²

and no code for data with these variances needs more than that. A linear VAE should lie on this
curve exactly, and a deep one, for digits are not Gaussian, below it.

Expected: the linear VAE's rate and distortion are Shannon's to rounding, and the deep rates fall as
β rises. How far the deep curve lies below the Gaussian one is measured, on digits that nobody
trained on.

Paper   Higgins et al. 2017, https://openreview.net/forum?id=Sy2fzU9gl; Alemi et al. 2017,
        arXiv:1711.00464    Cover & Thomas 2006, theorem 10.3.3 (reverse water-filling)
Run     uv run python weeks/07_autoencoders/beta.py
"""

from dataclasses import dataclass
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from implementations.generative.linear_vae import best_linear_vae, principal_axes
from implementations.generative.shared_noise import SharedNoise
from implementations.generative.vae import VAE, elbo, perceptron
from implementations.lab.findings import Finding, at_least, at_most, equals
from implementations.lab.script import run
from implementations.sources.images import digits
from implementations.training.fit import fit
from implementations.training.rows import RandomRows

VARIANCE = 0.01  # σ² of the decoder, in squared parts of the brightest pixel
LATENT = 16


@dataclass(frozen=True)
class Config:
    """Draw the curve of rate and distortion."""

    betas: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    hidden: int = 128
    steps: int = 2500
    """training steps of each deep VAE"""


def shannon(variances: Float[Tensor, " dim"], level: float) -> tuple[float, float]:
    """Rate and distortion of a Gaussian, filled up to a level of noise."""
    rate = (variances / level).clamp(min=1).log().sum() / 2
    return rate.item(), variances.clamp(max=level).sum().item()


def linear_point(x: Float[Tensor, "image dim"], beta: float) -> tuple[float, float]:
    """Rate and distortion of the best linear VAE, through its q and its decoder."""
    # One axis is left out, as the model demands; its variance is below every level here.
    model = best_linear_vae(x, x.shape[1] - 1, VARIANCE, beta)
    q = model._replace(variance=beta * model.variance).best_diagonal(x)
    missed = (x - model.mean - q.mean @ model.weight.mT).square().sum(-1)
    spread = (q.log_variance.exp() * model.weight.square().sum(0)).sum(-1)
    return q.kl_to_standard().mean().item(), (missed + spread).mean().item()


def deep_point(
    train: Float[Tensor, "image dim"], test: Float[Tensor, "image dim"], beta: float, config: Config
) -> tuple[float, float]:
    """Rate and distortion of a deep VAE on the test digits."""
    torch.manual_seed(0)
    dim, hidden = train.shape[1], config.hidden
    decoder = SharedNoise(perceptron(LATENT, hidden, hidden, dim), VARIANCE)
    model = VAE(perceptron(dim, hidden, hidden, 2 * LATENT), decoder, "gaussian", levels=2)

    def loss(model: VAE, x: Tensor) -> tuple[Tensor, int]:
        q = model.posterior(x)
        log_likelihood = model.log_likelihood(x, q.at(torch.randn(1, len(x), LATENT)))
        return -elbo(log_likelihood, q.kl_to_standard(), beta).sum(), len(x)

    rows = RandomRows(train, batch=64)
    fit(model, rows, loss, steps=config.steps, learning_rate=2e-3, title=f"beta {beta:g}")
    with torch.no_grad():
        q = model.posterior(test)
        again = model.mean(q.at(torch.randn(100, len(test), LATENT)))
        distortion = (test - again).square().sum(-1).mean()
    return q.kl_to_standard().mean().item(), distortion.item()


def draw(variances: Tensor, betas: tuple, linear: list, deep: list) -> None:
    """Both curves, and the betas beside the points."""
    _, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    levels = np.geomspace(VARIANCE * betas[0], variances[0].item(), 200)
    rates, distortions = zip(*(shannon(variances, level) for level in levels), strict=True)
    axes.plot(distortions, rates, color="gray", label="Gaussian data: Shannon's curve")
    for name, points, style in (
        ("best linear VAE", linear, "ks"),
        ("deep VAE, test", deep, "C0o-"),
    ):
        rates, distortions = zip(*points, strict=True)
        axes.plot(distortions, rates, style, label=name, markersize=5)
    for beta, (rate, distortion) in zip(betas, deep, strict=True):
        axes.annotate(
            f"β = {beta:g}", (distortion, rate), (-8, -12), textcoords="offset points", ha="right"
        )
    axes.set(xlabel="distortion: squared error of a digit", ylabel="rate: nats for a digit's code")
    axes.set_title("Digits of 8x8: what a code costs and what it leaves")
    axes.grid(alpha=0.3)
    axes.legend()


def main(config: Config) -> list[Finding]:
    torch.set_num_threads(1)
    train, test = (part.pixels.flatten(1) / 16 for part in digits().split())
    x = train.double()
    variances, _ = principal_axes(x)
    linear = [linear_point(x, beta) for beta in config.betas]
    curve = [shannon(variances, beta * VARIANCE) for beta in config.betas]
    apart = np.abs(np.array(linear) - np.array(curve)).max().item()
    deep = [deep_point(train, test, beta, config) for beta in config.betas]
    draw(variances, config.betas, linear, deep)

    falling = all(low[0] > high[0] and low[1] < high[1] for low, high in pairwise(deep))
    findings = [
        Finding("linear VAE: rate and distortion differ from Shannon's by", apart,
                "nats or squares", expected=at_most(1e-9), source="notes/07, step 10"),
        Finding("deep: every higher beta has less rate and more distortion", falling,
                expected=equals(True), source="both are monotone in beta at the optimum"),
    ]  # fmt: skip
    for beta, (rate, distortion) in zip(config.betas, deep, strict=True):
        levels = np.geomspace(1e-4, variances[0].item(), 4000)
        rates, distortions = zip(*(shannon(variances, level) for level in levels), strict=True)
        gaussian = float(np.interp(distortion, distortions, rates))
        claim = (
            f"beta {beta:g}: nats that the deep code saves at its distortion of {distortion:.2f}"
        )
        findings.append(Finding(claim, gaussian - rate, "nats", goal=at_least(0.0)))
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(betas=(1.0, 16.0), hidden=32, steps=150))
