"""Affine coupling (RealNVP): half of the numbers move, as the other half tells them to.

    y_kept  = x_kept
    y_moved = x_moved · exp(log_scale(x_kept)) + shift(x_kept)      log det = sum of log_scale

The kept half arrives unchanged, so the inverse can ask it the same questions: no network is ever
inverted. The Jacobian is triangular, its log-determinant a sum of d/2 numbers. Each layer keeps
what the one before it moved.

A coupling takes any elementwise bijection (below: affine; spline_coupling.py has another), and any
network that says with which parameters each moved number goes through it.

Paper   Dinh, Sohl-Dickstein & Bengio 2016, arXiv:1605.08803, equations 4 to 8
Shapes  x [batch, dim, ...]; along the second axis columns (or channels) are kept or moved
Fast    affine_coupling_jax.py: the same flow in JAX
Run     uv run python implementations/flows/affine_coupling.py
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from implementations.flows.bijection import Bijection, Compose, Flow, Mapped

Values = Float[Tensor, "*shape"]
Parameters = Float[Tensor, "*shape parameter"]


class Elementwise(NamedTuple):
    """A bijection of single numbers whose parameters somebody else supplies."""

    parameters: int
    """how many a number needs; with all of them zero it is the identity"""
    forward: Callable[[Values, Parameters], tuple[Values, Values]]
    """(x, parameters) -> (y, log dy/dx)"""
    inverse: Callable[[Values, Parameters], tuple[Values, Values]]
    """(y, parameters) -> (x, log dx/dy)"""


LARGEST_LOG_SCALE = 3.0  # a layer stretches by e³ = 20 at most; exp of a free number overflows


def affine(x: Values, parameters: Parameters) -> tuple[Values, Values]:
    """x exp(log_scale) + shift, with log_scale = 3 tanh(free / 3)."""
    log_scale, shift = scale_and_shift(parameters)
    return x * log_scale.exp() + shift, log_scale


def affine_inverse(y: Values, parameters: Parameters) -> tuple[Values, Values]:
    """(y - shift) exp(-log_scale)."""
    log_scale, shift = scale_and_shift(parameters)
    return (y - shift) * (-log_scale).exp(), -log_scale


def scale_and_shift(parameters: Parameters) -> tuple[Values, Values]:
    free, shift = parameters.unbind(-1)
    return LARGEST_LOG_SCALE * torch.tanh(free / LARGEST_LOG_SCALE), shift


AFFINE = Elementwise(2, affine, affine_inverse)


class Coupling(Bijection):
    """Moves some columns by an elementwise bijection whose parameters depend on the others.

    Args:
        kept: True where a column passes unchanged.
        conditioner: maps the kept columns [batch, kept, ...] to the parameters of the moved ones,
            [batch, moved, ..., parameter].
        elementwise: what the moved numbers go through.

    Raises:
        ValueError: nothing is kept, or nothing is moved (one column alone cannot be coupled).
    """

    def __init__(
        self, kept: Bool[Tensor, " dim"], conditioner: nn.Module, elementwise: Elementwise = AFFINE
    ):
        super().__init__()
        check_kept(kept)
        self.conditioner, self.elementwise = conditioner, elementwise
        self.register_buffer("kept", kept.nonzero()[:, 0])
        self.register_buffer("moved", (~kept).nonzero()[:, 0])
        self.register_buffer("order", torch.cat((self.kept, self.moved)).argsort())

    def forward(self, x: Float[Tensor, "batch dim ..."]) -> Mapped:
        return self.through(x, self.elementwise.forward)

    def inverse(self, y: Float[Tensor, "batch dim ..."]) -> Mapped:
        return self.through(y, self.elementwise.inverse)

    def through(self, x: Float[Tensor, "batch dim ..."], elementwise: Callable) -> Mapped:
        """Both directions are one: the kept columns know the parameters either way."""
        if x.shape[1] != len(self.order):
            raise ValueError(f"the coupling has {len(self.order)} columns, got {x.shape[1]}")
        kept = x[:, self.kept]
        moved, log_slope = elementwise(x[:, self.moved], self.conditioner(kept))
        return Mapped(torch.cat((kept, moved), 1)[:, self.order], log_slope.flatten(1).sum(1))


def check_kept(kept: Bool[Tensor, " dim"]) -> None:
    """Raise ValueError unless some columns are kept and some are moved."""
    if not 0 < int(kept.sum()) < len(kept):
        raise ValueError(
            f"a coupling keeps some columns and moves the others, so it needs two at least; "
            f"it would keep {int(kept.sum())} of {len(kept)}"
        )


def alternating(dim: int, layer: int) -> Bool[Tensor, " dim"]:
    """Keep the even columns in even layers, the odd ones in odd layers."""
    return torch.arange(dim) % 2 == layer % 2


class Perceptron(nn.Module):
    """A small network that gives each moved column its parameters; zero before training.

    Two hidden layers with smooth SiLU, so that the flow's density is smooth too. A last layer of
    zeros makes a new flow the identity.
    """

    def __init__(self, inputs: int, outputs: int, parameters: int, hidden: int):
        super().__init__()
        self.parameters_each = parameters
        self.layers = nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, outputs * parameters),
        )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x: Float[Tensor, "batch kept"]) -> Float[Tensor, "batch moved parameter"]:
        return rearrange(self.layers(x), "b (m p) -> b m p", p=self.parameters_each)


def coupling_layers(
    dim: int, layers: int, hidden: int, elementwise: Elementwise = AFFINE
) -> Compose:
    """Couplings that keep even and odd columns in turn, each with a Perceptron.

    Raises:
        ValueError: fewer than two columns.
    """
    steps = []
    for layer in range(layers):
        kept = alternating(dim, layer)
        check_kept(kept)
        count = int(kept.sum())
        conditioner = Perceptron(count, dim - count, elementwise.parameters, hidden)
        steps.append(Coupling(kept, conditioner, elementwise))
    return Compose(*steps)


def main() -> None:
    torch.manual_seed(0)
    layers = coupling_layers(dim=6, layers=4, hidden=16).double()
    for parameter in layers.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, 6, dtype=torch.float64)
    y, log_det = layers(x)
    jacobian = torch.autograd.functional.jacobian(lambda x: layers(x).value[0], x)[:, 0]
    print(f"log |det| of the dense Jacobian  {torch.linalg.slogdet(jacobian)[1]:.12f}")
    print(f"sum of the log scales            {log_det[0]:.12f}")
    print(f"there and back                   {(layers.inverse(y).value - x).abs().max():.1e}")
    grid = torch.cartesian_prod(*2 * [torch.linspace(-12, 12, 500, dtype=torch.float64)])
    plane = coupling_layers(dim=2, layers=4, hidden=16).double()
    for parameter in plane.parameters():
        nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        density = Flow(plane, (2,)).log_prob(grid).exp()
    print(f"integral of a random flow        {density.sum() * (24 / 499) ** 2:.6f}")


if __name__ == "__main__":
    main()
