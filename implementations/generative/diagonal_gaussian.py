"""The diagonal Gaussian: what an encoder says about z, how to draw from it, and how far it is off.

    z   = mean + exp(log_variance / 2) · noise                                  noise ~ N(0, I)
    KL(q || N(0, I)) = Σ_i ½ (mean_i² + variance_i - log variance_i - 1)        in nats

The draw is a deterministic function of mean and variance and of noise that depends on neither: so a
gradient can pass (reparameterization). The divergence is a sum over the coordinates of z. Its mean
over them would be another number, and weaker by their count.

Paper   Kingma & Welling 2013, arXiv:1312.6114, section 2.4 and appendix B
Shapes  mean, log_variance [..., latent]    noise [..., latent], with more axes in front or none
Run     uv run python implementations/generative/diagonal_gaussian.py
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class DiagonalGaussian(NamedTuple):
    """A Gaussian with independent coordinates."""

    mean: Float[Tensor, "*batch latent"]
    log_variance: Float[Tensor, "*batch latent"]
    """of every coordinate: any number is allowed, and the deviation is exp of half of it"""

    @property
    def deviation(self) -> Float[Tensor, "*batch latent"]:
        return (self.log_variance / 2).exp()

    def at(self, noise: Float[Tensor, "... latent"]) -> Float[Tensor, "... latent"]:
        """mean + deviation · noise: a sample, if the noise is standard normal."""
        return self.mean + self.deviation * noise

    def log_density(self, z: Float[Tensor, "... latent"]) -> Float[Tensor, "..."]:
        """log q(z), in nats."""
        squares = ((z - self.mean) / self.deviation).square()
        return -(squares + self.log_variance + math.log(2 * math.pi)).sum(-1) / 2

    def kl_by_coordinate(self) -> Float[Tensor, "*batch latent"]:
        """KL(q || N(0, I)), what each coordinate adds to it, in nats."""
        return (self.mean.square() + self.log_variance.expm1() - self.log_variance) / 2

    def kl_to_standard(self) -> Float[Tensor, "*batch"]:
        """KL(q || N(0, I)) in nats."""
        return self.kl_by_coordinate().sum(-1)

    def kl_to(self, other: "DiagonalGaussian") -> Float[Tensor, "*batch"]:
        """KL(q || other) in nats."""
        difference = self.log_variance - other.log_variance
        moved = ((self.mean - other.mean) / other.deviation).square()
        return (moved + difference.expm1() - difference).sum(-1) / 2


def standard(like: Float[Tensor, "*batch latent"]) -> DiagonalGaussian:
    """N(0, I) with the shape and dtype of `like`: the usual prior of z."""
    return DiagonalGaussian(torch.zeros_like(like), torch.zeros_like(like))


def kl_monte_carlo(
    q: DiagonalGaussian, p: DiagonalGaussian, noise: Float[Tensor, "sample *batch latent"]
) -> Float[Tensor, "*batch"]:
    """KL(q || p) as the average of log q(z) - log p(z) over z ~ q: unbiased, needs no formula.

    Args:
        noise: standard normal numbers, a set for each sample.

    Raises:
        ValueError: there is no sample.
    """
    if len(noise) < 1:
        raise ValueError("an average needs at least one sample, got 0")
    z = q.at(noise)
    return (q.log_density(z) - p.log_density(z)).mean(0)


def main() -> None:
    torch.manual_seed(0)
    q = DiagonalGaussian(torch.tensor([1.0, 0.0, -0.5]), torch.tensor([-2.0, 0.0, 1.0]))
    print("coordinate by coordinate, KL to the standard normal:", q.kl_by_coordinate().tolist())
    print(f"  their sum, the formula       {q.kl_to_standard():.4f} nats")
    for samples in (10, 1000, 100_000):
        estimate = kl_monte_carlo(q, standard(q.mean), torch.randn(samples, 3))
        print(f"  {samples:7,} samples instead     {estimate:.4f}")


if __name__ == "__main__":
    main()
