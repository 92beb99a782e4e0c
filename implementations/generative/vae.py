"""The variational autoencoder: a bound on log p(x) that can be computed, and climbed.

    log p(x) >= ELBO = E log p(x, z) - log q(z | x)                   as a ratio of densities
                     = E log p(x | z) - KL(q(z | x) || p(z))          as reconstruction and code
                     = log p(x) - KL(q(z | x) || p(z | x))            as the gap that is left

An encoder gives q(z | x), a diagonal Gaussian; a decoder gives p(x | z); p(z) = N(0, I). z is drawn
by a formula through which gradients pass, diagonal_gaussian.py. Everything is in nats and summed
over pixels and over coordinates of z.

    beta        E log p(x | z) - beta KL        beta > 1 buys a shorter code with worse pictures
    free bits   E log p(x | z) - Σ_i max(floor, mean over the batch of KL_i)

Paper   Kingma & Welling 2013, arXiv:1312.6114; Rezende et al. 2014, arXiv:1401.4082
        beta: Higgins et al. 2017, https://openreview.net/forum?id=Sy2fzU9gl
        free bits: Kingma et al. 2016, arXiv:1606.04934, section 2.5
Shapes  x [..., dim] in levels 0 ... levels - 1    z [..., latent]    noise [sample, ..., latent]
Run     uv run python implementations/generative/vae.py
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from implementations.generative.diagonal_gaussian import DiagonalGaussian, standard
from implementations.generative.likelihoods import (
    bernoulli_log_likelihood,
    discretized_logistic_log_likelihood,
    gaussian_log_likelihood,
)


def elbo(
    log_likelihood: Float[Tensor, "sample *batch"], kl: Float[Tensor, "*batch"], beta: float = 1.0
) -> Float[Tensor, "*batch"]:
    """E log p(x | z) - beta KL(q || p): the ELBO for beta = 1.

    Raises:
        ValueError: beta is negative, or the likelihood is not finite.
    """
    if beta < 0:
        raise ValueError(f"beta weighs the divergence and is not negative, got {beta}")
    if not log_likelihood.isfinite().all():
        raise ValueError("the log-likelihood is not finite: the decoder or the data are broken")
    return log_likelihood.mean(0) - beta * kl


def elbo_of_joint(
    log_joint: Float[Tensor, "sample *batch"], log_posterior: Float[Tensor, "sample *batch"]
) -> Float[Tensor, "*batch"]:
    """E log p(x, z) - log q(z | x): the same number on average, without a formula for the KL."""
    return (log_joint - log_posterior).mean(0)


def free_bits(kl_by_coordinate: Float[Tensor, "batch latent"], floor: float) -> Float[Tensor, ""]:
    """Σ_i max(floor, mean over the batch of KL_i): below the floor a coordinate costs no more.

    Args:
        floor: nats that every coordinate may use for nothing; 0 gives the mean KL itself.

    Raises:
        ValueError: the floor is negative.
    """
    if floor < 0:
        raise ValueError(f"a coordinate cannot have less than 0 free nats, got {floor}")
    return kl_by_coordinate.mean(0).clamp(min=floor).sum()


class Likelihood(NamedTuple):
    """What a decoder's numbers mean."""

    outputs: int
    """numbers that the decoder gives for a pixel"""
    log_density: Callable[[Tensor, Tensor, int], Tensor]
    """of x, given outputs [..., dim, output] and the number of levels"""
    mean: Callable[[Tensor], Tensor]
    """the expected pixel, as a part of the brightest"""


def bernoulli(x: Tensor, outputs: Tensor, levels: int) -> Tensor:
    return bernoulli_log_likelihood(x / (levels - 1), outputs[..., 0])


def gaussian(x: Tensor, outputs: Tensor, levels: int) -> Tensor:
    return gaussian_log_likelihood(x / (levels - 1), outputs[..., 0], outputs[..., 1])


def discretized_logistic(x: Tensor, outputs: Tensor, levels: int) -> Tensor:
    # A scale of e^-2 levels is certainty; narrower ones only make the gradients steeper.
    mean, log_scale = (levels - 1) * outputs[..., 0], outputs[..., 1].clamp(min=-2.0)
    return discretized_logistic_log_likelihood(x, mean, log_scale, levels)


LIKELIHOODS = {
    "bernoulli": Likelihood(1, bernoulli, lambda outputs: outputs[..., 0].sigmoid()),
    "gaussian": Likelihood(2, gaussian, lambda outputs: outputs[..., 0]),
    "discretized_logistic": Likelihood(2, discretized_logistic, lambda outputs: outputs[..., 0]),
}


class VAE(nn.Module):
    """An encoder and a decoder.

    Args:
        encoder: from x / (levels - 1) [..., dim] to mean and log-variance [..., 2 latent].
        decoder: from z [..., latent] to [..., outputs dim], the outputs of a pixel far apart.
        likelihood: a name in LIKELIHOODS.
        levels: how many values a pixel has; 2 for black and white.

    Raises:
        ValueError: the likelihood is unknown, or there are fewer than two levels.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, likelihood: str, levels: int):
        super().__init__()
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"the likelihoods are {', '.join(LIKELIHOODS)}, got {likelihood!r}")
        if levels < 2:
            raise ValueError(f"a pixel needs at least two levels, got {levels}")
        self.encoder, self.decoder, self.levels = encoder, decoder, levels
        self.likelihood = LIKELIHOODS[likelihood]

    def posterior(self, x: Float[Tensor, "*batch dim"]) -> DiagonalGaussian:
        """q(z | x)."""
        return DiagonalGaussian(*self.encoder(x / (self.levels - 1)).chunk(2, dim=-1))

    def outputs(self, z: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch dim output"]:
        """The parameters of p(x | z), pixel by pixel."""
        numbers = self.decoder(z)
        return rearrange(
            numbers, "... (output dim) -> ... dim output", output=self.likelihood.outputs
        )

    def mean(self, z: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch dim"]:
        """The expected picture, 0 to 1."""
        return self.likelihood.mean(self.outputs(z))

    def log_likelihood(
        self, x: Float[Tensor, "*batch dim"], z: Float[Tensor, "*sample latent"]
    ) -> Float[Tensor, "*sample"]:
        """log p(x | z), with as many z for each x as wanted."""
        return self.likelihood.log_density(x, self.outputs(z), self.levels)

    def elbo(
        self,
        x: Float[Tensor, "*batch dim"],
        noise: Float[Tensor, "sample *batch latent"],
        beta: float = 1.0,
    ) -> Float[Tensor, "*batch"]:
        """The bound by samples of z and the formula for the divergence."""
        q = self.posterior(x)
        return elbo(self.log_likelihood(x, q.at(noise)), q.kl_to_standard(), beta)

    def log_weights(
        self, x: Float[Tensor, "*batch dim"], noise: Float[Tensor, "sample *batch latent"]
    ) -> Float[Tensor, "sample *batch"]:
        """log p(x, z) - log q(z | x) at samples of z: what importance_weighted.py averages."""
        q = self.posterior(x)
        z = q.at(noise)
        joint = self.log_likelihood(x, z) + standard(z).log_density(z)
        return joint - q.log_density(z)


def perceptron(*sizes: int, dropout: float = 0.0) -> nn.Sequential:
    """Linear layers with SiLU between them, and dropout after each but the last."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.SiLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers[:-2])


def main() -> None:
    torch.manual_seed(0)
    model = VAE(perceptron(64, 32, 4), perceptron(2, 32, 64), "bernoulli", levels=2)
    x, noise = (torch.rand(64) > 0.5).float(), torch.randn(100_000, 2)
    with torch.no_grad():
        q = model.posterior(x)
        z = q.at(noise)
        log_likelihood = model.log_likelihood(x, z)
        by_kl = elbo(log_likelihood, q.kl_to_standard())
        joint, posterior = log_likelihood + standard(z).log_density(z), q.log_density(z)
        by_ratio, error = elbo_of_joint(joint, posterior), (joint - posterior).std() / 100_000**0.5
    print("the ELBO of one picture, in an untrained model, by 100,000 samples")
    print(f"  E log p(x | z) - KL             {by_kl:.4f}")
    print(f"  E log p(x, z) - log q(z | x)    {by_ratio:.4f} +- {error:.4f}")


if __name__ == "__main__":
    main()
