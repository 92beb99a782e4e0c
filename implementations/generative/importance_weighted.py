"""The importance-weighted bound: K samples instead of one make the ELBO tighter.

    w_k = p(x, z_k) / q(z_k | x)          z_k ~ q(z | x)
    L_K = E log (1/K) Σ_k w_k             L_1 = ELBO,   L_1 <= L_K <= L_{K+1} <= log p(x)

The average of the weights is unbiased for p(x); its logarithm is too low (Jensen), and the less so
the less the average varies. The logarithm comes after the average: the average of the logarithms is
the ELBO again, whatever K.

Paper   Burda, Grosse & Salakhutdinov 2015, arXiv:1509.00519, theorem 1
Shapes  log_weights [sample, ...]
Run     uv run python implementations/generative/importance_weighted.py
"""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def importance_weighted_bound(
    log_weights: Float[Tensor, "sample *batch"],
) -> Float[Tensor, "*batch"]:
    """log (1/K) Σ_k w_k, in nats: for K = 1 one sample of the ELBO.

    Raises:
        ValueError: there is no sample, or a weight's logarithm is not finite.
    """
    if len(log_weights) < 1:
        raise ValueError("the bound needs at least one sample, got 0")
    if not log_weights.isfinite().all():
        raise ValueError("a log-weight is not finite: so is the likelihood or the posterior")
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def nested_bounds(
    log_weights: Float[Tensor, "sample *batch"], counts: Sequence[int]
) -> dict[int, Float[Tensor, "*batch"]]:
    """L_K for several K from the same samples: each K's is the average over groups of K of them.

    Where a count divides the next, groups lie within groups, and the bounds are ordered for every
    x, not only on average: Jensen's inequality holds for the very samples.

    Raises:
        ValueError: a count is below 1 or does not divide the number of samples.
    """
    samples, bounds = len(log_weights), {}
    for count in counts:
        if count < 1 or samples % count:
            raise ValueError(f"{samples} samples cannot be cut into groups of {count}")
        groups = rearrange(log_weights, "(group sample) ... -> sample group ...", sample=count)
        bounds[count] = importance_weighted_bound(groups).mean(0)
    return bounds


def effective_samples(log_weights: Float[Tensor, "sample *batch"]) -> Float[Tensor, "*batch"]:
    """(Σ w)² / Σ w²: of how many equal weights the average would vary as much."""
    return torch.exp(2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0))


def main() -> None:
    torch.manual_seed(0)
    # p(z) = N(0, 1), p(x | z) = N(z, 1), so p(x) = N(0, 2); q is too wide and beside the posterior.
    prior, x = torch.distributions.Normal(0.0, 1.0), torch.tensor(1.5)
    q = torch.distributions.Normal(0.3, 1.0)
    z = q.sample((500, 2000))
    log_weights = prior.log_prob(z) + prior.log_prob(x - z) - q.log_prob(z)
    for count, bound in nested_bounds(log_weights, (1, 5, 50, 500)).items():
        print(f"  K = {count:3}   {bound.mean():.4f} nats")
    print(f"  log p(x)  {torch.distributions.Normal(0.0, 2**0.5).log_prob(x):.4f}")


if __name__ == "__main__":
    main()
