"""What is it worth to differentiate through a sample, instead of trying samples out?

Three gradients of one expectation, all of them unbiased: through the reparameterized sample, by the
score function, and by the score function with a baseline. First for a parabola in 1 to 64
dimensions, where the variance of each is known in closed form; then for the ELBO of a VAE that has
learnt black and white digits, where it is only measured, along its training.

Expected: on the parabola the measured variances are those of the formulas, 1, (d + 2)(d + 4) / 4
and (d + 4) / 2 with the mean as baseline: what the score function pays grows with the square of the
dimension, with a baseline only with the dimension. In the VAE the order is the same.

Paper   Kingma & Welling 2013, arXiv:1312.6114, section 2.3; Mohamed et al. 2019, arXiv:1906.10652
Run     uv run python weeks/07_autoencoders/reparameterization.py
"""

from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from torch import Tensor

from implementations.generative.diagonal_gaussian import DiagonalGaussian, standard
from implementations.generative.gradient_estimators import (
    leave_one_out_gradients,
    reparameterized_gradients,
    score_function_gradients,
    variances_of_a_parabola,
)
from implementations.generative.trained import (
    VAEConfig,
    held_out_pictures,
    train_or_load,
    untrained,
)
from implementations.generative.vae import VAE
from implementations.lab.findings import Finding, at_least, within
from implementations.lab.script import run

NAMES = ("reparameterized", "score function", "its mean as baseline")


@dataclass(frozen=True)
class Config:
    """Compare the variance of gradient estimators."""

    samples: int = 100_000
    """of each gradient of the parabola"""
    pictures: int = 50
    """test digits whose ELBO is differentiated"""
    draws: int = 2000
    """samples of z for each"""
    steps: tuple[int, ...] = (1, 30, 300, 3000)
    """training steps after which the VAE is looked at"""


def on_a_parabola(dimensions: list[int], samples: int) -> dict[str, list[float]]:
    """Variance of one coordinate's gradient of E ½|z|² at q = N(0, I), by dimension."""
    seen = {name: [] for name in NAMES}
    parabola = lambda z: z.square().sum(-1) / 2  # noqa: E731
    for dimension in dimensions:
        torch.manual_seed(dimension)
        q = DiagonalGaussian(*torch.zeros(2, dimension, dtype=torch.float64))
        noise = torch.randn(samples, dimension, dtype=torch.float64)
        for name, gradients in (
            (NAMES[0], reparameterized_gradients(parabola, q, noise)),
            (NAMES[1], score_function_gradients(parabola, q, noise)),
            (NAMES[2], score_function_gradients(parabola, q, noise, dimension / 2)),
        ):
            seen[name].append(gradients.var(0).mean().item())
    return seen


def in_a_vae(model: VAE, x: Float[Tensor, "image dim"], draws: int) -> dict[str, float]:
    """Total variance over the coordinates of q's mean, averaged over pictures."""
    total = dict.fromkeys(NAMES, 0.0)
    torch.manual_seed(0)
    for picture in x:
        q = DiagonalGaussian(*(part.detach()[0] for part in model.posterior(picture[None])))

        def term(z, picture=picture, q=q):
            """What the ELBO averages. q is held fixed: its score has the mean zero."""
            prior = standard(z).log_density(z)
            return model.log_likelihood(picture[None], z) + prior - q.log_density(z)

        noise = torch.randn(draws, len(q.mean))
        for name, gradients in (
            (NAMES[0], reparameterized_gradients(term, q, noise)),
            (NAMES[1], score_function_gradients(term, q, noise)),
            (NAMES[2], leave_one_out_gradients(term, q, noise)),
        ):
            total[name] += gradients.var(0).sum().item() / len(x)
    return total


def draw(dimensions: list[int], seen: dict, steps: tuple[int, ...], trained: list[dict]) -> None:
    """Variance by dimension with its formula, and by training step."""
    _, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained", sharey=False)
    for name, colour in zip(NAMES, ("C2", "C3", "C0"), strict=True):
        left.loglog(dimensions, seen[name], "o", color=colour, label=name)
        theory = [variances_of_a_parabola(dimension)[name] for dimension in dimensions]
        left.loglog(dimensions, theory, color=colour, alpha=0.6)
        right.loglog(steps, [each[name] for each in trained], "o-", color=colour, label=name)
    left.set(xlabel="dimensions", ylabel="variance of a gradient")
    left.set_title("A parabola: measured (dots) and the formulas (lines)")
    right.set(xlabel="training steps", ylabel="variance, summed over the mean of q")
    right.set_title("The ELBO of a VAE on test digits")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()


def main(config: Config) -> list[Finding]:
    torch.set_num_threads(1)
    dimensions = [2**power for power in range(7)]
    seen = on_a_parabola(dimensions, config.samples)
    findings = []
    # A variance over n samples is off by about (kurtosis / n)^½; the kurtosis is below 100 here.
    slack = 5 * (100 / config.samples) ** 0.5
    for name in NAMES:
        theory = variances_of_a_parabola(dimensions[-1])[name]
        ratio = seen[name][-1] / theory
        rule = within(1 - slack, 1 + slack)
        claim = f"parabola in {dimensions[-1]} dimensions, {name}: variance over its formula's"
        findings.append(Finding(claim, ratio, expected=rule, source="notes/07, steps 4 and 5"))

    digits, trained = VAEConfig(data="digits", latent=8, hidden=64, dropout=0.0), []
    x = held_out_pictures(digits)[: config.pictures]
    for steps in config.steps:
        settings = replace(digits, steps=steps, learning_rate=3e-3)
        model = train_or_load(settings) if steps > 1 else untrained(settings)
        trained.append(in_a_vae(model, x, config.draws))
    draw(dimensions, seen, config.steps, trained)
    for name in NAMES[1:]:
        ratio = trained[-1][name] / trained[-1][NAMES[0]]
        claim = f"VAE after {config.steps[-1]} steps, {name}: variance over the reparameterized"
        source = "Mohamed et al. 2019, section 8"
        findings.append(Finding(claim, ratio, "x", expected=at_least(1.0), source=source))
    saved = trained[-1][NAMES[1]] / trained[-1][NAMES[2]]
    claim = f"VAE after {config.steps[-1]} steps: what the baseline saves"
    return [*findings, Finding(claim, saved, "x", expected=at_least(1.0), source="note, step 5")]


if __name__ == "__main__":
    run(main, Config(), quick=Config(samples=20_000, pictures=5, draws=500, steps=(1, 60)))
