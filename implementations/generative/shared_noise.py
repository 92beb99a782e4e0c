"""One noise for all pixels: what the weight of the squared error secretly says about σ².

    -log N(x; mean, σ² I) = |x - mean|² / 2σ² + dim/2 · log 2πσ²
    best σ²               = mean of (x - mean)² over pixels and pictures

A loss of squared errors plus divergence has chosen σ² = ½, and one of *mean* squared errors over
dim pixels σ² = dim / 2. By linear_vae.py every direction of the data whose variance is below σ² is
then given up. Let the noise be learnt, and it goes to the size of what the decoder leaves over.

Paper   Rybkin, Daniilidis & Levine 2020, arXiv:2006.13202; Lucas et al. 2019, arXiv:1911.02469
Shapes  z [..., latent]    out [..., 2 dim]: the means, then the log-variances
Run     uv run python implementations/generative/shared_noise.py
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implementations.generative.likelihoods import gaussian_log_likelihood


class SharedNoise(nn.Module):
    """A decoder for VAE's gaussian likelihood, with the same variance in every pixel.

    Args:
        mean: the network that gives the means.
        variance: σ², in squared parts of the brightest pixel; where it starts if it is learnt.
        learnt: train it with the rest.

    Raises:
        ValueError: the variance is not positive.
    """

    def __init__(self, mean: nn.Module, variance: float, *, learnt: bool = False):
        super().__init__()
        if not 0 < variance < math.inf:
            raise ValueError(f"the noise needs a positive variance, got {variance}")
        self.mean = mean
        self.log_variance = nn.Parameter(torch.tensor(math.log(variance)), requires_grad=learnt)

    def forward(self, z: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch twice_dim"]:
        mean = self.mean(z)
        return torch.cat([mean, self.log_variance.expand_as(mean)], dim=-1)


def best_variance(
    x: Float[Tensor, "*batch dim"], mean: Float[Tensor, "*batch dim"]
) -> Float[Tensor, ""]:
    """The σ² with the highest likelihood: the mean squared error."""
    return (x - mean).square().mean()


def main() -> None:
    torch.manual_seed(0)
    x, mean = torch.randn(1000, 64) * 0.3, torch.zeros(64)
    best = best_variance(x, mean.expand_as(x)).item()
    print("mean log-likelihood of 64 pixels whose squared error is 0.09 on average")
    for name, variance in {
        "squared errors, summed": 0.5,
        "squared errors, averaged": 32.0,
        "the mean squared error": best,
        "half of that": best / 2,
    }.items():
        log_variance = torch.full((64,), variance).log()
        value = gaussian_log_likelihood(x, mean, log_variance).mean()
        print(f"  σ² = {variance:7.4f}  {name:26}{value:9.2f} nats")


if __name__ == "__main__":
    main()
