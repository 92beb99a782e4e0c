"""Planar and radial flows: one ridge, or one ball, that pushes the density apart or together.

    planar   y = x + u tanh(w·x + b)                 |det| = 1 + (w·u) tanh'(w·x + b)
    radial   y = x + beta (x - c) / (alpha + r)      r = |x - c|
             |det| = (1 + beta / (alpha + r))^(d-1) (1 + alpha beta / (alpha + r)²)

Both can fold space over, and then are no bijections: planar unless w·u > -1, radial unless
alpha > 0 and beta > -alpha. So free parameters are led to allowed ones. A planar layer's inverse
has no closed form, but only the one number a = w·x has to be found, from

    a + (w·u) tanh(a + b) = w·y

whose left side rises: it is bracketed and bisected. A radial layer's r is the root of a quadratic.

Paper   Rezende & Mohamed 2015, arXiv:1505.05770, equations 10 to 14 and appendix A
Shapes  x [batch, dim]
Run     uv run python implementations/flows/planar.py
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from implementations.flows.bijection import Bijection, Mapped

HALVINGS = 60  # of a bracket, until it is as narrow as float64 can tell
MARGIN = 1e-3  # w·u stays this far above -1, where a slope would be zero
ONE = math.log(math.expm1(1 - MARGIN))  # softplus(ONE) + MARGIN = 1, so that 0 is led to 0


class Planar(Bijection):
    """x + u tanh(w·x + b), with u moved along w until w·u > -1."""

    def __init__(self, dim: int):
        super().__init__()
        self.direction = nn.Parameter(torch.randn(dim) / dim**0.5)
        self.free_push = nn.Parameter(0.01 * torch.randn(dim))
        self.offset = nn.Parameter(torch.zeros(()))

    def push(self) -> tuple[Float[Tensor, " dim"], Float[Tensor, ""]]:
        """The allowed u and its product with w (appendix A.1, moved so that w·u = 0 stays).

        Raises:
            ValueError: w is zero, so that no u along it can be found.
        """
        if not self.direction.detach().any():
            raise ValueError("a planar flow needs a direction w that is not zero")
        free = self.direction @ self.free_push
        allowed = softplus(free + ONE) - 1 + MARGIN
        along = self.direction / self.direction.square().sum()
        return self.free_push + (allowed - free) * along, allowed

    def forward(self, x: Float[Tensor, "batch dim"]) -> Mapped:
        push, product = self.push()
        bent = torch.tanh(x @ self.direction + self.offset)
        return Mapped(x + bent[:, None] * push, torch.log1p(product * (1 - bent.square())))

    def inverse(self, y: Float[Tensor, "batch dim"]) -> Mapped:
        push, product = self.push()
        target = y @ self.direction
        found = self.solve(target.detach(), product.detach())
        # One step of Newton's from the root: it polishes the last digits, and its gradient is that
        # of the root, which bisection has none of.
        bent = torch.tanh(found + self.offset)
        slope = (1 + product * (1 - bent.square())).detach()
        along = found - (found + product * bent - target) / slope
        bent = torch.tanh(along + self.offset)
        return Mapped(y - bent[:, None] * push, -torch.log1p(product * (1 - bent.square())))

    @torch.no_grad()
    def solve(
        self, target: Float[Tensor, " batch"], product: Float[Tensor, ""]
    ) -> Float[Tensor, " batch"]:
        """The a with a + product tanh(a + b) = target, which is within |product| of it."""
        low, high = target - product.abs(), target + product.abs()
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            above = middle + product * torch.tanh(middle + self.offset) > target
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2


class Radial(Bijection):
    """x + beta (x - c) / (alpha + |x - c|), with alpha > 0 and beta > -alpha."""

    def __init__(self, dim: int):
        super().__init__()
        self.centre = nn.Parameter(torch.randn(dim))
        self.free_alpha = nn.Parameter(torch.zeros(()))
        self.free_beta = nn.Parameter(torch.zeros(()))

    def size(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The allowed alpha and beta (appendix A.2)."""
        alpha = softplus(self.free_alpha) + MARGIN
        return alpha, softplus(self.free_beta) - (1 - MARGIN) * alpha

    def forward(self, x: Float[Tensor, "batch dim"]) -> Mapped:
        away = x - self.centre
        radius = torch.linalg.vector_norm(away, dim=1)
        stretch, log_det = self.stretch(radius, x.shape[1])
        return Mapped(self.centre + stretch[:, None] * away, log_det)

    def inverse(self, y: Float[Tensor, "batch dim"]) -> Mapped:
        """From r² + (alpha + beta - r_y) r = alpha r_y, the root that is not negative."""
        alpha, beta = self.size()
        away = y - self.centre
        target = torch.linalg.vector_norm(away, dim=1)
        half = (alpha + beta - target) / 2
        root = (half.square() + alpha * target).sqrt()
        # Two ways to write the root: each loses no digits on its side of half = 0.
        radius = torch.where(half > 0, alpha * target / (half.abs() + root), root - half)
        stretch, log_det = self.stretch(radius, y.shape[1])
        return Mapped(self.centre + away / stretch[:, None], -log_det)

    def stretch(
        self, radius: Float[Tensor, " batch"], dim: int
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """By how much a radius grows, and the log-determinant: d - 1 directions around, one out."""
        alpha, beta = self.size()
        around = 1 + beta / (alpha + radius)
        outwards = 1 + alpha * beta / (alpha + radius).square()
        return around, (dim - 1) * around.log() + outwards.log()


def main() -> None:
    torch.manual_seed(0)
    for layer in (Planar(3).double(), Radial(3).double()):
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=2)
        x = torch.randn(1, 3, dtype=torch.float64)
        y, log_det = layer(x)
        jacobian = torch.autograd.functional.jacobian(lambda x, f=layer: f(x).value[0], x)[:, 0]
        exact, back = torch.linalg.slogdet(jacobian)[1], layer.inverse(y).value
        print(
            f"{type(layer).__name__:7} log |det| {log_det[0]:.10f}, of the dense Jacobian "
            f"{exact:.10f}; there and back {(back - x).abs().max():.1e}"
        )


if __name__ == "__main__":
    main()
