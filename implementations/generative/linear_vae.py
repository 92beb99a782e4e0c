"""A VAE whose every term has a formula: linear, Gaussian, also known as probabilistic PCA.

    p(z) = N(0, I)    p(x | z) = N(W z + μ, σ² I)    so   p(x)     = N(μ, C),   C = W Wᵀ + σ² I
                                                          p(z | x) = N(M⁻¹ Wᵀ (x - μ), σ² M⁻¹)
                                                                              M = Wᵀ W + σ² I
    best W for the β-ELBO at a given σ²     U (Λ - β σ²)₊^½        Λ, U: variances and axes of PCA
    best σ² as well, β = 1                  the mean of the variances that are left out

In the columns of that W the posterior is diagonal, so a diagonal q can be the posterior and the
ELBO can be log p(x) itself. A rotated W gives the same p(x), and leaves a gap. Coordinates whose
variance is below β σ² collapse: their column of W is zero and q(z | x) is the prior.

Paper   Tipping & Bishop 1999, doi:10.1111/1467-9868.00196; Bishop 2006, section 12.2
        collapse: Lucas et al. 2019, arXiv:1911.02469
Shapes  weight [dim, latent]    x [batch, dim]    covariances [dim, dim] and [latent, latent]
Run     uv run python implementations/generative/linear_vae.py
"""

import math
from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from implementations.generative.diagonal_gaussian import DiagonalGaussian


class LinearVAE(NamedTuple):
    """The model; its q is whatever is handed to `elbo`."""

    weight: Float[Tensor, "dim latent"]
    mean: Float[Tensor, " dim"]
    variance: Float[Tensor, ""]
    """σ²"""

    def log_likelihood(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """log N(x; μ, W Wᵀ + σ² I) in nats.

        Raises:
            ValueError: σ² is not positive, or x is not finite.
        """
        self.check(x)
        identity = torch.eye(len(self.mean), dtype=x.dtype, device=x.device)
        covariance = self.weight @ self.weight.mT + self.variance * identity
        return torch.distributions.MultivariateNormal(
            self.mean, covariance, validate_args=False
        ).log_prob(x)

    def precision(self) -> Float[Tensor, "latent latent"]:
        """M / σ²: the inverse covariance of p(z | x), the same for every x."""
        identity = torch.eye(self.weight.shape[1], dtype=self.mean.dtype, device=self.mean.device)
        return self.weight.mT @ self.weight / self.variance + identity

    def posterior_mean(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch latent"]:
        """M⁻¹ Wᵀ (x - μ).

        Raises:
            ValueError: σ² is not positive, or x is not finite.
        """
        self.check(x)
        explained = (x - self.mean) @ self.weight / self.variance
        return torch.linalg.solve(self.precision(), explained.mT).mT

    def best_diagonal(self, x: Float[Tensor, "batch dim"]) -> DiagonalGaussian:
        """The diagonal q with the highest ELBO: the posterior's mean, and 1 / its precisions."""
        mean = self.posterior_mean(x)
        return DiagonalGaussian(mean, -self.precision().diagonal().log().expand_as(mean))

    def elbo(
        self, x: Float[Tensor, "batch dim"], q: DiagonalGaussian, beta: float = 1.0
    ) -> Float[Tensor, " batch"]:
        """E log p(x | z) - β KL(q || p), the expectation taken by hand: no sample is drawn.

            E |x - μ - W z|² = |x - μ - W mean|² + Σ_i variance_i |W_i|²

        Raises:
            ValueError: σ² is not positive, or x is not finite.
        """
        self.check(x)
        missed = (x - self.mean - q.mean @ self.weight.mT).square().sum(-1)
        spread = einsum(q.log_variance.exp(), self.weight.square(), "b latent, dim latent -> b")
        constant = len(self.mean) * (math.log(2 * math.pi) + self.variance.log())
        return -((missed + spread) / self.variance + constant) / 2 - beta * q.kl_to_standard()

    def kl_to_posterior(
        self, x: Float[Tensor, "batch dim"], q: DiagonalGaussian
    ) -> Float[Tensor, " batch"]:
        """KL(q || p(z | x)): between a diagonal and a full Gaussian, in nats."""
        precision, moved = self.precision(), q.mean - self.posterior_mean(x)
        squares = einsum(moved, precision, moved, "b i, i j, b j -> b")
        traces = q.log_variance.exp() @ precision.diagonal()
        logarithms = precision.logdet() + q.log_variance.sum(-1)
        return (squares + traces - q.mean.shape[-1] - logarithms) / 2

    def rotated(self, rotation: Float[Tensor, "latent latent"]) -> "LinearVAE":
        """The same p(x) with other coordinates of z."""
        return self._replace(weight=self.weight @ rotation)

    def check(self, x: Tensor) -> None:
        """Raise ValueError where no density exists."""
        if not self.variance > 0:
            raise ValueError(f"the noise needs a positive variance, got {self.variance.item()}")
        if not x.isfinite().all():
            raise ValueError("x holds a number that is not finite")


def principal_axes(
    x: Float[Tensor, "batch dim"],
) -> tuple[Float[Tensor, " dim"], Float[Tensor, "dim dim"]]:
    """Variances along the principal axes, the largest first, and the axes as columns."""
    centred = x - x.mean(0)
    variances, axes = torch.linalg.eigh(centred.mT @ centred / len(x))
    return variances.flip(0).clamp(min=0), axes.flip(1)


def best_linear_vae(
    x: Float[Tensor, "batch dim"], latent: int, variance: float | None = None, beta: float = 1.0
) -> LinearVAE:
    """The W, μ and (unless it is given) σ² with the highest mean β-ELBO; for β = 1 the highest
    likelihood.

    Raises:
        ValueError: the latent size is not between 1 and dim - 1, the variance is not positive or
            none is left for it, it is left open with beta other than 1, or beta is negative.
    """
    dim = x.shape[1]
    if not 1 <= latent < dim:
        raise ValueError(f"the latent size lies between 1 and {dim - 1}, got {latent}")
    if beta < 0 or (variance is None and beta != 1):
        raise ValueError(f"beta is not negative, and 1 unless the variance is given, got {beta}")
    variances, axes = principal_axes(x)
    variance = variances[latent:].mean().item() if variance is None else variance
    if not variance > 0:
        raise ValueError(f"the noise needs a positive variance, got {variance}")
    lengths = (variances[:latent] - beta * variance).clamp(min=0).sqrt()
    return LinearVAE(axes[:, :latent] * lengths, x.mean(0), variances.new_tensor(variance))


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    model = best_linear_vae(x, latent=3)
    turned = model.rotated(torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q)
    print("mean over 500 points, in nats       log p(x)      ELBO       gap")
    for name, each in {"W along the axes": model, "W rotated": turned}.items():
        q = each.best_diagonal(x)
        likelihood, bound = each.log_likelihood(x).mean(), each.elbo(x, q).mean()
        gap = each.kl_to_posterior(x, q).mean()
        print(f"  best diagonal q, {name:16}{likelihood:10.6f}{bound:11.6f}{gap:10.6f}")


if __name__ == "__main__":
    main()
