"""Autoregressive flows: each number moves as all numbers before it tell it to.

    y_i = x_i · exp(log_scale_i) + shift_i      both parameters functions of x_1 ... x_(i-1)

The Jacobian is triangular, as the chain rule of probability is: p(x) is a product of conditionals.
One network gives all parameters in one pass, if masks cut every way from an input to an output that
must not see it (MADE):

    a hidden unit of degree m sees inputs 1 ... m        output i sees units of degree < i

Forward is one pass, the inverse needs one pass for each number. From data to noise this is MAF,
with fast densities; turned around it is IAF, with fast samples.

Paper   MADE: Germain et al. 2015, arXiv:1502.03509    MAF: Papamakarios et al. 2017,
        arXiv:1705.07057    IAF: Kingma et al. 2016, arXiv:1606.04934
Shapes  x [batch, dim]
Run     uv run python implementations/flows/autoregressive.py
"""

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from implementations.flows.affine_coupling import AFFINE, Elementwise
from implementations.flows.bijection import Bijection, Compose, Inverse, Mapped, Permute


class MaskedLinear(nn.Linear):
    """A linear layer some of whose weights do not exist."""

    def __init__(self, mask: Bool[Tensor, "output input"]):
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask)

    def forward(self, x: Float[Tensor, "*batch input"]) -> Float[Tensor, "*batch output"]:
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


def degrees(dim: int, hidden: int) -> Int[Tensor, " hidden"]:
    """How many inputs each hidden unit sees: 1 ... dim - 1 in turn; with one column, none."""
    return torch.zeros(hidden).long() if dim == 1 else 1 + torch.arange(hidden) % (dim - 1)


class MADE(nn.Module):
    """A network whose output i depends on inputs 1 ... i - 1 alone; zero before training.

    Args:
        dim: columns.
        hidden: units in each of the two hidden layers; fewer than dim - 1 leave inputs unread.
        parameters: numbers that each column's output has.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(self, dim: int, hidden: int, parameters: int):
        super().__init__()
        if min(dim, hidden, parameters) < 1:
            raise ValueError(f"sizes are positive, got {dim}, {hidden} and {parameters}")
        column, unit = torch.arange(1, dim + 1), degrees(dim, hidden)
        last = (column[:, None] > unit).repeat_interleave(parameters, 0)
        self.parameters_each = parameters
        self.layers = nn.Sequential(
            MaskedLinear(unit[:, None] >= column),
            nn.SiLU(),
            MaskedLinear(unit[:, None] >= unit),
            nn.SiLU(),
            MaskedLinear(last),
        )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim parameter"]:
        return rearrange(self.layers(x), "b (d p) -> b d p", p=self.parameters_each)


class Autoregressive(Bijection):
    """Moves every column by an elementwise bijection whose parameters depend on those before it."""

    def __init__(self, dim: int, hidden: int, elementwise: Elementwise = AFFINE):
        super().__init__()
        self.made, self.elementwise = MADE(dim, hidden, elementwise.parameters), elementwise

    def forward(self, x: Float[Tensor, "batch dim"]) -> Mapped:
        y, log_slope = self.elementwise.forward(x, self.made(x))
        return Mapped(y, log_slope.sum(1))

    def inverse(self, y: Float[Tensor, "batch dim"]) -> Mapped:
        """Column by column: the parameters of the next are known when those before it are."""
        done, log_det = y[:, :0], y.new_zeros(len(y))
        for i in range(y.shape[1]):
            unknown = torch.zeros_like(y[:, i:])
            parameters = self.made(torch.cat((done, unknown), 1))[:, i : i + 1]
            column, log_slope = self.elementwise.inverse(y[:, i : i + 1], parameters)
            done, log_det = torch.cat((done, column), 1), log_det + log_slope[:, 0]
        return Mapped(done, log_det)


def masked_autoregressive_flow(
    dim: int, layers: int, hidden: int, elementwise: Elementwise = AFFINE
) -> Compose:
    """MAF: autoregressive layers, the order of the columns reversed after each."""
    steps: list[Bijection] = []
    for _ in range(layers):
        steps += [Autoregressive(dim, hidden, elementwise), Permute(torch.arange(dim).flip(0))]
    return Compose(*steps)


def inverse_autoregressive_flow(
    dim: int, layers: int, hidden: int, elementwise: Elementwise = AFFINE
) -> Inverse:
    """IAF: the same turned around, so that samples take one pass and densities dim of them."""
    return Inverse(masked_autoregressive_flow(dim, layers, hidden, elementwise))


def main() -> None:
    from implementations.lab.timing import time_interleaved

    torch.manual_seed(0)
    dim = 64
    layer = Autoregressive(dim, 128).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = torch.randn(32, dim, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x).value[0], x[:1])[:, 0]
    print(f"largest entry above the diagonal of the Jacobian  {jacobian.triu(1).abs().max():.1e}")
    print(f"there and back  {(layer.inverse(layer(x).value).value - x).abs().max():.1e}")
    with torch.no_grad():
        paths = {"forward": layer.forward, "inverse": layer.inverse}
        ratio = time_interleaved(paths, x, rounds=10).ratio("forward", "inverse")
    print(f"the inverse of {dim} columns takes {ratio:.0f} times as long as forward")


if __name__ == "__main__":
    main()
