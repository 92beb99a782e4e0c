"""When does a VAE stop using its code, and how is it brought back?

First where everything is a formula: a linear VAE with 24 coordinates of z, trained by gradients
with its noise σ² fixed, keeps a coordinate for every principal variance of the data above σ² and
lets the others collapse onto the prior. That is no accident of training but the optimum of the
bound. Then a deep VAE with the losses that people write: squared errors summed over the pixels
(σ² = ½ is meant, without a word), squared errors averaged over them (σ² = 32 for 64 pixels), and
two repairs of the latter: free nats, and a σ² that is learnt.

Expected: in the linear model as many coordinates are left as theory says, at every σ². Averaged
errors collapse the deep model too, entirely, as no direction of the digits has a variance of 32;
three have one above ½, and a learnt σ² uses no fewer coordinates than that. Free nats bring a code
back; whether they bring a better model with it is measured.

Paper   linear: Lucas et al. 2019, arXiv:1911.02469, section 4    learnt σ²: Rybkin et al. 2020,
        arXiv:2006.13202    free nats: Kingma et al. 2016, arXiv:1606.04934
Run     uv run python weeks/07_autoencoders/posterior_collapse.py
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from torch import Tensor

from implementations.generative.diagonal_gaussian import DiagonalGaussian
from implementations.generative.importance_weighted import importance_weighted_bound
from implementations.generative.linear_vae import LinearVAE, principal_axes
from implementations.generative.shared_noise import SharedNoise
from implementations.generative.trained import sampled_log_weights
from implementations.generative.vae import VAE, elbo, free_bits, perceptron
from implementations.lab.findings import Finding, at_least, equals
from implementations.lab.script import run
from implementations.sources.images import digits
from implementations.training.fit import fit
from implementations.training.rows import RandomRows

LATENT, DIM = 24, 64
SUMMED, AVERAGED, FREE, LEARNT = (
    "errors summed",
    "errors averaged",
    "averaged, free nats",
    "σ² learnt",
)
NOISES = {SUMMED: 0.5, AVERAGED: DIM / 2, FREE: DIM / 2, LEARNT: 0.5}


@dataclass(frozen=True)
class Config:
    """Collapse a posterior and repair it."""

    linear_steps: int = 1500
    """gradient steps of each linear VAE"""
    noises: int = 5
    """how many values of σ²"""
    latent: int = 8
    """coordinates of z in the deep VAEs"""
    hidden: int = 128
    steps: int = 2500
    """training steps of each deep VAE"""
    free_nats: float = 0.3
    """for each coordinate of z, in one of them"""


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


def trained(name: str, x: Float[Tensor, "image dim"], config: Config) -> VAE:
    """One of NOISES, after its training."""
    torch.manual_seed(0)
    latent, hidden = config.latent, config.hidden
    means = perceptron(latent, hidden, hidden, DIM)
    decoder = SharedNoise(means, NOISES[name], learnt=name == LEARNT)
    model = VAE(perceptron(DIM, hidden, hidden, 2 * latent), decoder, "gaussian", levels=2)
    floor = config.free_nats if name == FREE else 0.0

    def loss(model: VAE, x: Tensor) -> tuple[Tensor, int]:
        q = model.posterior(x)
        log_likelihood = model.log_likelihood(x, q.at(torch.randn(1, len(x), latent)))
        kl = free_bits(q.kl_by_coordinate(), floor).expand(len(x))
        return -elbo(log_likelihood, kl).sum(), len(x)

    rows = RandomRows(x, batch=64)
    fit(model, rows, loss, steps=config.steps, learning_rate=2e-3, title=name)
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
    right.set_title("Deep VAEs on the same digits")
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

    train, test = (part.pixels.flatten(1) / 16 for part in digits().split())
    trained_long = config.steps >= 1000
    deep, trivial = {}, (test - train.mean(0)).square().sum(-1).mean()
    for name in NOISES:
        model = trained(name, train, config)
        with torch.no_grad():
            q = model.posterior(test)
            left = (test - model.mean(q.mean)).square().sum(-1).mean()
        deep[name] = q.kl_by_coordinate().mean(0)
        bound = importance_weighted_bound(sampled_log_weights(model, test, 100)).mean().item()
        rules = {
            SUMMED: (None, equals(int((variances > 0.5).sum())), "the linear law"),
            AVERAGED: (equals(0), None, source),
            LEARNT: (at_least(used(deep[SUMMED])), None, "Rybkin et al. 2020"),
        }
        # A few steps, as in --quick, prove nothing.
        rule, goal, why = rules.get(name, (None, None, "")) if trained_long else (None, None, "")
        findings += [
            Finding(f"{name}: coordinates in use", used(deep[name]), f"of {config.latent}",
                    expected=rule, goal=goal, source=why),
            Finding(f"{name}: divergence", deep[name].sum().item(), "nats"),
            Finding(f"{name}: variance of test digits explained", (1 - left / trivial).item()),
            Finding(f"{name}: bound on log p(x), K = 100", bound, "nats"),
        ]  # fmt: skip
        if name == LEARNT:
            found = model.decoder.log_variance.exp().item()
            findings.append(Finding(f"{name}: σ²", found))
    draw(variances, noises, left_over, deep)
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(linear_steps=600, noises=1, hidden=32, steps=30))
