"""A mixture of Gaussians under noise: the one place where all of diffusion is known exactly.

    x_0 ~ sum_k w_k N(m_k, C_k)       x = alpha x_0 + sigma noise
    p(x) = sum_k w_k N(x; alpha m_k, S_k)       S_k = alpha² C_k + sigma² I
    score         grad log p(x) = -sum_k r_k(x) S_k⁻¹ (x - alpha m_k)
    denoised      E[x_0 | x]    =  sum_k r_k(x) (m_k + alpha C_k S_k⁻¹ (x - alpha m_k))
    transport     F(x_s; s) = F(x_t; t)       on a line: the flow of probability passes nobody by

r_k is the probability that x came from component k, F the distribution function. Score and
posterior mean are two formulas here, so that Tweedie's identity between them is a test and no
definition.

Paper   Karras et al. 2022, arXiv:2206.00364, appendix B (the score of a finite set); Song et al.
        2020, arXiv:2011.13456, section 4.3 (the probability flow)
Shapes  x [batch, dim]    weights [component]    means [component, dim]
        covariances [component, dim, dim]
Run     uv run python implementations/generative/gaussian_mixture.py
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Mixture(NamedTuple):
    """Weights that sum to one, means, and covariances."""

    weights: Float[Tensor, " component"]
    means: Float[Tensor, "component dim"]
    covariances: Float[Tensor, "component dim dim"]

    def noised(self, alpha: float, sigma: float) -> "Mixture":
        """The distribution of alpha x_0 + sigma noise: a mixture again."""
        identity = torch.eye(self.means.shape[1]).to(self.means)
        covariances = alpha**2 * self.covariances + sigma**2 * identity
        return Mixture(self.weights, alpha * self.means, covariances)

    def component_log_density(
        self, x: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "batch component"]:
        """log(w_k N(x; m_k, C_k))."""
        factor = torch.linalg.cholesky(self.covariances)
        apart = (x[:, None] - self.means)[..., None]  # [batch, component, dim, 1]
        whitened = torch.linalg.solve_triangular(factor, apart, upper=False)[..., 0]
        log_size = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = x.shape[1] * math.log(2 * math.pi) / 2
        return self.weights.log() - whitened.square().sum(-1) / 2 - log_size - constant

    def log_density(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """log p(x), in nats."""
        return self.component_log_density(x).logsumexp(1)

    def responsibilities(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch component"]:
        """Which component x came from: r_k(x)."""
        return self.component_log_density(x).softmax(1)

    def score(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """The gradient of log p at x."""
        apart = (x[:, None] - self.means)[..., None]
        pulls = -torch.linalg.solve(self.covariances, apart)[..., 0]
        return (self.responsibilities(x)[..., None] * pulls).sum(1)

    def denoised(
        self, x: Float[Tensor, "batch dim"], alpha: float, sigma: float
    ) -> Float[Tensor, "batch dim"]:
        """E[x_0 | x]: the best guess of the data, and what a trained network comes close to."""
        noisy = self.noised(alpha, sigma)
        apart = (x[:, None] - noisy.means)[..., None]
        moved = alpha * self.covariances @ torch.linalg.solve(noisy.covariances, apart)
        return (noisy.responsibilities(x)[..., None] * (self.means + moved[..., 0])).sum(1)

    def sample(
        self, count: int, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "batch dim"], Int[Tensor, " batch"]]:
        """Points, and which component each came from."""
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        factor = torch.linalg.cholesky(self.covariances)[chosen]
        return self.means[chosen] + (factor @ noise.to(self.means)[..., None])[..., 0], chosen

    def moments(self) -> tuple[Float[Tensor, " dim"], Float[Tensor, "dim dim"]]:
        """Mean and covariance of the whole."""
        mean = self.weights @ self.means
        apart = self.means - mean
        between = torch.einsum("k,ki,kj->ij", self.weights, apart, apart)
        return mean, between + torch.einsum("k,kij->ij", self.weights, self.covariances)

    def given(self, component: int) -> "Mixture":
        """The distribution of the points of one component: what a label conditions on."""
        one = slice(component, component + 1)
        return Mixture(torch.ones_like(self.weights[one]), self.means[one], self.covariances[one])

    def cdf(self, x: Float[Tensor, "batch 1"]) -> Float[Tensor, "batch 1"]:
        """The distribution function of a mixture on a line.

        Raises:
            ValueError: the mixture is not on a line.
        """
        if self.means.shape[1] != 1:
            raise ValueError(f"only a line has an order, got {self.means.shape[1]} dimensions")
        deviations = self.covariances[:, 0, 0].sqrt()
        parts = torch.special.ndtr((x - self.means[:, 0]) / deviations)
        return (parts * self.weights).sum(1, keepdim=True)


def transport(
    mixture: Mixture,
    x: Float[Tensor, "batch 1"],
    start: tuple[float, float],
    end: tuple[float, float],
) -> Float[Tensor, "batch 1"]:
    """Where the probability flow takes x from one (alpha, sigma) to another, on a line.

    The flow keeps the order of the points and the mass between them: the distribution function is
    constant along each path. Its inverse is found by bisection, to the last bits of float64.
    """
    before, after = mixture.noised(*start), mixture.noised(*end)
    wanted = before.cdf(x)
    reach = 40 * (after.covariances.max().sqrt() + after.means.abs().max())
    low, high = torch.full_like(x, -reach), torch.full_like(x, reach)
    for _ in range(90):
        middle = (low + high) / 2
        right = after.cdf(middle) < wanted
        low, high = torch.where(right, middle, low), torch.where(right, high, middle)
    return (low + high) / 2


def ring(components: int = 5, radius: float = 1.5, deviation: float = 0.15) -> Mixture:
    """Gaussians on a circle, each stretched along it, the first one the heaviest."""
    angle = 2 * math.pi * torch.arange(components, dtype=torch.float64) / components
    out = torch.stack((angle.cos(), angle.sin()), 1)
    along = torch.stack((-angle.sin(), angle.cos()), 1)
    covariances = deviation**2 * (
        out[:, :, None] * out[:, None] + 6 * along[:, :, None] * along[:, None]
    )
    weights = 1 / (1 + torch.arange(components, dtype=torch.float64))
    return Mixture(weights / weights.sum(), radius * out, covariances)


def main() -> None:
    mixture, generator = ring(), torch.Generator().manual_seed(0)
    x, _ = mixture.sample(1000, generator)
    print("noise of sigma  |score|   Tweedie's identity is off by")
    for sigma in (0.1, 0.5, 2.0):
        noisy = x + sigma * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        score = mixture.noised(1.0, sigma).score(noisy)
        tweedie = noisy + sigma**2 * score
        gap = (tweedie - mixture.denoised(noisy, 1.0, sigma)).abs().max()
        print(f"{sigma:14}  {score.norm(dim=1).mean():7.3f}   {gap:.1e}")


if __name__ == "__main__":
    main()
