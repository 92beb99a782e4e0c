"""Dequantization: pixels are whole numbers, and a density of whole numbers can be made infinite.

    P(x) = integral of p(x + u) over u in [0, 1)^D,     x in {0 ... levels - 1}^D
    log P(x) >= E_q[log p(x + u) - log q(u | x)]        equal if q(u | x) = p(x + u) / P(x)

A flow that sees whole numbers puts a spike on each and calls it likelihood. With noise u added, its
density averages to the probability of the whole number, a bound (Jensen) that no spike can cheat.
Uniform noise has log q = 0; a learned q closes part of the gap (variational dequantization).

    v = (x + u) / levels in [0, 1]^D        log p(x + u) = log p(v) - D log levels
    bits per dimension = -log P(x) / (D log 2)

The middle equation is a change of variables, and where bits per dimension go wrong: without it a
density on [0, 1] is reported, log2(levels) too low. A uniform guess costs exactly log2(levels).

Paper   Theis, van den Oord & Bethge 2015, arXiv:1511.01844, section 3.1; variational: Ho et al.
        2019, arXiv:1902.00275; K draws: Hoogeboom, Cohen & Tomczak 2020, arXiv:2001.11235
Shapes  x [batch, ...] whole numbers    bound [batch]
Run     uv run python implementations/flows/dequantization.py
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from implementations.flows.bijection import Bijection, Flow, Mapped, normal_log_density

Noise = Callable[[Tensor], tuple[Tensor, Tensor]]


class Logit(Bijection):
    """From the unit cube to all numbers: logit(margin + (1 - 2 margin) v), as RealNVP does.

    With a margin the edges 0 and 1 are allowed, and a little density lies beyond them: what is
    measured inside stays a bound.

    Args:
        margin: from 0 up to, not including, 1/2.
    """

    def __init__(self, margin: float = 0.0):
        super().__init__()
        if not 0 <= margin < 0.5:
            raise ValueError(f"a margin is at least 0 and less than 1/2, got {margin}")
        self.margin = margin

    def forward(self, x: Float[Tensor, "batch ..."]) -> Mapped:
        """Raises ValueError for a number that is not between 0 and 1: it has no logit."""
        inner = self.margin + (1 - 2 * self.margin) * x
        if not ((inner > 0) & (inner < 1)).all():
            raise ValueError(f"data must lie between 0 and 1, got {x.min():.4g} to {x.max():.4g}")
        y = inner.log() - (-inner).log1p()
        return Mapped(y, self.log_slope(y))

    def inverse(self, y: Float[Tensor, "batch ..."]) -> Mapped:
        return Mapped((y.sigmoid() - self.margin) / (1 - 2 * self.margin), -self.log_slope(y))

    def log_slope(self, y: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
        """log dy/dv, summed over an example: the logit's slope is 1 / (s (1 - s))."""
        slope = math.log1p(-2 * self.margin) - logsigmoid(y) - logsigmoid(-y)
        return slope.flatten(1).sum(1)


def uniform_noise(x: Float[Tensor, "batch ..."]) -> tuple[Tensor, Float[Tensor, " batch"]]:
    """u uniform in [0, 1), and log q(u) = 0."""
    return torch.rand_like(x), x.new_zeros(len(x))


class VariationalNoise(nn.Module):
    """u = sigmoid(shift(x) + exp(log_scale(x)) · normal), with a network for the two.

    Args:
        network: maps x, between 0 and 1, to shift and log_scale, [batch, ..., 2].
        levels: of x.

    With zeros from the network, u is all but uniform: sigmoid(1.7 normal) nearly is.
    """

    def __init__(self, network: nn.Module, levels: int):
        super().__init__()
        self.network, self.levels = network, levels

    def forward(self, x: Float[Tensor, "batch ..."]) -> tuple[Tensor, Float[Tensor, " batch"]]:
        """u and log q(u | x), u differentiable by the network's weights."""
        shift, log_scale = self.network(x / self.levels).unbind(-1)
        log_scale = log_scale + math.log(1.7)
        normal = torch.randn_like(x)
        free = shift + log_scale.exp() * normal
        log_slope = (log_scale + logsigmoid(free) + logsigmoid(-free)).flatten(1).sum(1)
        return free.sigmoid(), normal_log_density(normal) - log_slope


class Dequantized(nn.Module):
    """The distribution of whole numbers that a flow on the unit cube is after rounding down.

    Args:
        flow: a density of v = (x + u) / levels; begin it with Logit.
        levels: how many values a pixel can have: 256 for MNIST, 17 for scikit-learn's digits.
        noise: draws u and gives log q(u | x); uniform unless given.

    Raises:
        ValueError: fewer than two levels.
    """

    def __init__(self, flow: Flow, levels: int, noise: Noise = uniform_noise):
        super().__init__()
        if levels < 2:
            raise ValueError(f"whole numbers have two levels at least, got {levels}")
        self.flow, self.levels, self.noise = flow, levels, noise

    def log_prob(self, x: Integer[Tensor, "batch ..."], draws: int = 1) -> Float[Tensor, " batch"]:
        """A lower bound on log P(x), in nats: log of the mean over draws of p(x + u) / q(u | x).

        One draw gives the bound above; more come closer to log P(x), from below on average.

        Raises:
            ValueError: a value is no level, or there are no draws.
        """
        if draws < 1:
            raise ValueError(f"a bound needs one draw at least, got {draws}")
        low, high = int(x.min()), int(x.max())
        if low < 0 or high >= self.levels:
            raise ValueError(f"levels are 0 to {self.levels - 1}, got {low} to {high}")
        ratios = torch.stack([self.log_ratio(x) for _ in range(draws)])
        return ratios.logsumexp(0) - math.log(draws)

    def log_ratio(self, x: Integer[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
        """log p(x + u) - log q(u | x) for one draw of u."""
        whole = x.to(**self.flow.kind)
        u, log_noise = self.noise(whole)
        dimensions = x[0].numel()
        log_density = self.flow.log_prob((whole + u) / self.levels)
        return log_density - dimensions * math.log(self.levels) - log_noise

    def sample(self, count: int, temperature: float = 1.0) -> Integer[Tensor, "batch ..."]:
        """Draw whole numbers: the flow's samples rounded down, and led back to the edge."""
        v = self.flow.sample(count, temperature=temperature)
        return (v * self.levels).floor().clamp(0, self.levels - 1).long()


def bits_per_dimension(
    log_prob: Float[Tensor, " batch"], dimensions: int
) -> Float[Tensor, " batch"]:
    """-log P(x) / (D log 2), for the log probability in nats of an example of D whole numbers."""
    return -log_prob / (dimensions * math.log(2))


def main() -> None:
    torch.manual_seed(0)

    class Identity(Bijection):
        def forward(self, x):
            return Mapped(x, x.new_zeros(len(x)))

    cube = torch.distributions.Uniform(torch.zeros(1), torch.ones(1))
    uniform = Flow(Identity(), (1,), torch.distributions.Independent(cube, 1))
    x = torch.randint(256, (1000, 1))
    bits = bits_per_dimension(Dequantized(uniform, 256).log_prob(x), 1).mean()
    print(f"a uniform guess among 256 levels costs {bits:.6f} bits per dimension")
    logistic = Dequantized(Flow(Logit(), (1,)), 4)
    x = torch.zeros(20_000, 1).long()
    print("log P(0) of four levels under a normal logit, K draws of the noise:")
    for draws in (1, 5, 50):
        print(f"  K = {draws:2}  {logistic.log_prob(x, draws).mean():.4f}")
    below = torch.distributions.Normal(0, 1).cdf(torch.tensor(1 / 4).logit()).log()
    print(f"  exact   {below:.4f}")


if __name__ == "__main__":
    main()
