"""How probable are the data, given what a decoder put out? Three answers, in nats.

    Bernoulli             x log p + (1 - x) log(1 - p)                           p = σ(logit)
    Gaussian              log N(x; mean, variance)                               a density
    discretized logistic  log [σ((x + ½ - mean) / s) - σ((x - ½ - mean) / s)]    x a whole level

The third is a probability of the levels 0, 1, ..., so its bits can be compared with any other model
of the same levels. Its first and last level take the tails, so that all levels sum to one. With
a = (x + ½ - mean)/s and b = (x - ½ - mean)/s the difference is σ(a) σ(-b) (1 - exp(-1/s)), whose
logarithm never takes the difference of two nearly equal numbers.

All are sums over the last axis. A mean over pixels would weigh them 1/dim against the divergence.

Paper   Kingma & Welling 2013, arXiv:1312.6114, appendix C; Kingma et al. 2016, arXiv:1606.04934,
        section 5.2 (discretized logistic)
Shapes  x and parameters [..., dim], any of them with fewer axes in front    out [...]
Run     uv run python implementations/generative/likelihoods.py
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

Data = Float[Tensor, "*#batch dim"]


def bernoulli_log_likelihood(x: Data, logits: Data) -> Float[Tensor, "*batch"]:
    """Σ x log p + (1 - x) log(1 - p), the logit of p given.

    Only for x of 0 and 1 is it a log-probability; between them it is a cross-entropy.

    Raises:
        ValueError: x is not between 0 and 1, or a logit is not finite.
    """
    check_range(x, 1)
    check_finite("logits", logits)
    x, logits = torch.broadcast_tensors(x, logits)
    return -binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)


def gaussian_log_likelihood(x: Data, mean: Data, log_variance: Data) -> Float[Tensor, "*batch"]:
    """Σ log N(x; mean, exp(log_variance)): a density, which no bound keeps below zero.

    Raises:
        ValueError: x, mean or log-variance is not finite, such as that of a variance of 0, or the
            variance is so small that its inverse is not.
    """
    check_finite("x", x)
    check_finite("mean", mean)
    check_finite("log-variance", log_variance)
    inverse = (-log_variance).exp()
    check_finite("inverse variance", inverse)
    squares = (x - mean).square() * inverse
    return -(squares + log_variance + math.log(2 * math.pi)).sum(-1) / 2


def discretized_logistic_log_likelihood(
    x: Data, mean: Data, log_scale: Data, levels: int
) -> Float[Tensor, "*batch"]:
    """Σ log P(level x) of a logistic distribution, rounded to the nearest of 0 ... levels - 1.

    Args:
        x: whole numbers.
        mean, log_scale: in levels, and the logarithm of that.

    Raises:
        ValueError: x is no whole level, a parameter is not finite, or there are fewer than two
            levels.
    """
    if levels < 2:
        raise ValueError(f"a pixel needs at least two levels, got {levels}")
    check_range(x, levels - 1)
    if (x != x.round()).any():
        raise ValueError("levels are whole numbers: undo the dequantization or scaling")
    check_finite("mean", mean)
    check_finite("log-scale", log_scale)
    inverse = (-log_scale).exp()
    first, last = x == 0, x == levels - 1
    below = logsigmoid((x + 0.5 - mean) * inverse).masked_fill(last, 0.0)
    above = logsigmoid((mean - x + 0.5) * inverse).masked_fill(first, 0.0)
    between = torch.log(-torch.expm1(-inverse)).masked_fill(first | last, 0.0)
    return (below + above + between).sum(-1)


def check_range(x: Tensor, largest: int) -> None:
    """Raise ValueError unless all of x lies in 0 ... largest; NaN does not."""
    if x.numel() and not (x.amin() >= 0 and x.amax() <= largest):
        low, high = x.amin().item(), x.amax().item()
        raise ValueError(f"data lie between 0 and {largest}, got {low:.4g} to {high:.4g}")


def check_finite(name: str, x: Tensor) -> None:
    """Raise ValueError unless all of x is finite."""
    if not x.isfinite().all():
        bad = x[~x.isfinite()].flatten()[0].item()
        raise ValueError(f"the likelihood needs a finite {name}, got {bad}")


def main() -> None:
    level = torch.arange(17.0)[:, None]
    for mean, scale in ((8.0, 1.0), (0.0, 2.0), (15.5, 0.05)):
        parameters = torch.tensor([mean]), torch.tensor([math.log(scale)])
        share = discretized_logistic_log_likelihood(level, *parameters, levels=17).exp()
        bar = "".join(" ▁▂▃▄▅▆▇█"[round(8 * p)] for p in share.tolist())
        print(f"  mean {mean:4}, scale {scale:4}   |{bar}|   all levels: {share.sum():.6f}")
    x = torch.tensor([1.0, 0.0, 1.0])
    print(f"three fair coins: {bernoulli_log_likelihood(x, torch.zeros(3)):.4f} nats")


if __name__ == "__main__":
    main()
