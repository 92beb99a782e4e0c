"""When does a VAE stop using its code, and how is it brought back?

First where everything is a formula: a linear VAE with 24 coordinates of z, trained by gradients
with its noise σ² fixed, keeps a coordinate for every principal variance of the data above σ² and
lets the others collapse onto the prior: no bug of the bound, but its optimum. Then where it hurts: a
decoder that predicts every pixel from those before it explains digits without z, and the
divergence is a price for nothing. Two repairs: divergence that grows to its full weight, and free
nats.

Expected: in the linear model as many coordinates are left as theory says, at every σ². With the
autoregressive decoder the divergence falls to a small part of the plain decoder's; both repairs
bring it back. Which of them helps the likelihood is measured.

Paper   linear: Lucas et al. 2019, arXiv:1911.02469, section 4
        decoders that are too good: Bowman et al. 2015, arXiv:1511.06349; Chen et al. 2016,
        arXiv:1611.02731    free nats: Kingma et al. 2016, arXiv:1606.04934
Run     uv run python weeks/07_autoencoders/posterior_collapse.py
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from torch import Tensor

from implementations.flows.autoregressive import MADE
from implementations.generative.diagonal_gaussian import DiagonalGaussian
from implementations.generative.importance_weighted import importance_weighted_bound
from implementations.generative.linear_vae import LinearVAE, principal_axes
from implementations.generative.trained import VAEConfig, held_out_pictures, pictures
from implementations.generative.trained import sampled_log_weights
from implementations.generative.vae import VAE, elbo, free_bits, perceptron
from implementations.lab.findings import Finding, at_least, at_most, equals
from implementations.lab.script import run
from implementations.sources.images import digits
from implementations.training.fit import fit
from implementations.training.rows import RandomRows

LATENT, DIM = 24, 64
MODELS = ("plain decoder", "autoregressive", "+ rising divergence", "+ free nats")


@dataclass(frozen=True)
class Config:
    """Collapse a posterior and repair it."""

    linear_steps: int = 1500
    """gradient steps of each linear VAE"""
    noises: int = 5
    """how many values of σ²"""
    hidden: int = 200
    steps: int = 3000
    """training steps of each deep VAE"""
    free_nats: float = 0.3
    """for each of the 8 coordinates of z"""


def used(kl: Float[Tensor, " latent"]) -> int:
    """Coordinates that carry more than a hundredth of a nat."""
    return int((kl > 0.01).sum())


def linear_kl(
    x: Float[Tensor, "image dim"], variance: float, steps: int
) -> Float[Tensor, " latent"]:
    """Train W and a linear encoder; the mean divergence of each coordinate, in nats."""
    torch.manual_seed(0)
    weight, encode = (0.1 * torch.randn(DIM, LATENT, dtype=x.dtype) for _ in range(2))
    parameters = [weight, encode, torch.zeros(LATENT, dtype=x.dtype)]
    parameters = [parameter.requires_grad_() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, 0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    mean, noise = x.mean(0), torch.tensor(variance, dtype=x.dtype)
    for _ in range(steps):
        q = DiagonalGaussian((x - mean) @ encode, parameters[2].expand(len(x), LATENT))
        optimizer.zero_grad()
        (-LinearVAE(weight, mean, noise).elbo(x, q).mean()).backward()
        optimizer.step()
        schedule.step()
    return q.kl_by_coordinate().mean(0).detach()


class Autoregressive(VAE):
    """A VAE whose decoder also sees the pixels before the one that it predicts."""

    def __init__(self, *arguments, hidden: int):
        super().__init__(*arguments)
        self.before = MADE(DIM, hidden, 1)

    def log_likelihood(self, x, z):
        logits = self.outputs(z) + self.before(x)
        return self.likelihood.log_density(x, logits, self.levels)


def trained(name: str, data: VAEConfig, config: Config) -> VAE:
    """One of MODELS, after its training."""
    torch.manual_seed(0)
    sizes = 2 * data.latent, config.hidden
    networks = perceptron(DIM, sizes[1], sizes[0]), perceptron(data.latent, sizes[1], DIM)
    plain = name == MODELS[0]
    model = (
        VAE(*networks, "bernoulli", 2)
        if plain
        else Autoregressive(*networks, "bernoulli", 2, hidden=config.hidden)
    )
    done = 0

    def loss(model: VAE, grey: Tensor) -> tuple[Tensor, int]:
        x = torch.bernoulli(grey)
        q = model.posterior(x)
        log_likelihood = model.log_likelihood(x, q.at(torch.randn(1, len(x), data.latent)))
        kl, beta = q.kl_to_standard(), 1.0
        if name == "+ free nats":
            kl = free_bits(q.kl_by_coordinate(), config.free_nats).expand(len(x))
        if name == "+ rising divergence":
            beta = min(1.0, 2 * done / config.steps)
        return -elbo(log_likelihood, kl, beta).sum(), len(x)

    def watch(step: int) -> None:
        nonlocal done
        done = step

    grey = digits().split()[0].pixels.flatten(1) / 16
    rows = RandomRows(grey, batch=64)
    fit(model, rows, loss, steps=config.steps, learning_rate=2e-3, watch=watch, title=name)
    return model


def draw(variances: Tensor, noises: list[float], left_over: list[Tensor], deep: dict) -> None:
    """Divergence by coordinate in the linear model with its formula, and in the deep ones."""
    _, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    places = range(1, LATENT + 1)
    for noise, kl in sorted(zip(noises, left_over, strict=True)):
        (line,) = left.plot(places, kl.sort(descending=True).values, "o", label=f"σ² = {noise:.3f}")
        theory = (variances[:LATENT] / noise).log().clamp(min=0) / 2
        left.plot(places, theory, color=line.get_color(), alpha=0.6)
    left.set(xlabel="coordinate of z, by its divergence", ylabel="KL, nats")
    left.set_title("Linear VAE on digits: trained (dots), ½ log(λ/σ²) (lines)")
    for name, kl in deep.items():
        right.plot(range(1, len(kl) + 1), kl.sort(descending=True).values, "o-", label=name)
    right.set(xlabel="coordinate of z, by its divergence", ylabel="KL, nats")
    right.set_title("Deep VAEs on black and white digits")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()


def main(config: Config) -> list[Finding]:
    torch.set_num_threads(1)
    x = digits().split()[0].pixels.flatten(1).double() / 16
    variances, _ = principal_axes(x)
    # Between variances that are far apart, so that nobody stands on the threshold.
    apart = (variances[: LATENT - 4] / variances[1 : LATENT - 3]).topk(config.noises).indices
    noises = [(variances[i] * variances[i + 1]).sqrt().item() for i in apart.sort().values]
    left_over = [linear_kl(x, noise, config.linear_steps) for noise in noises]
    wrong = [
        used(kl) - int((variances > noise).sum())
        for noise, kl in zip(noises, left_over, strict=True)
    ]
    source = "Lucas et al. 2019; notes/07, step 9"
    claim = (
        f"linear: values of σ², of {len(noises)}, at which another number of coordinates is used"
    )
    findings = [Finding(claim, sum(map(bool, wrong)), expected=equals(0), source=source)]

    data, deep = VAEConfig(data="digits", latent=8), {}
    test = held_out_pictures(data)
    for name in MODELS:
        model = trained(name, data, config)
        with torch.no_grad():
            deep[name] = model.posterior(test).kl_by_coordinate().mean(0)
        weights = sampled_log_weights(model, test, 100)
        bound = importance_weighted_bound(weights).mean().item()
        findings += [
            Finding(f"{name}: divergence", deep[name].sum().item(), "nats"),
            Finding(f"{name}: coordinates in use", used(deep[name]), "of 8"),
            Finding(f"{name}: bound on log p(x), K = 100", bound, "nats"),
        ]
    draw(variances, noises, left_over, deep)
    total = {name: kl.sum().item() for name, kl in deep.items()}
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(linear_steps=600, noises=1, hidden=32, steps=30))
