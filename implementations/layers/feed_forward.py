"""The feed-forward layer: each token alone goes up to a wider space, through a bend, and back.

    output = activation(x W₁ + b₁) W₂ + b₂              FeedForward
    output = (silu(x W_gate) * x W_expand) W_contract   SwiGLU: one half gates the other

    gelu       x Φ(x), with Φ the normal distribution function: BERT, ViT
    silu       x / (1 + exp(-x)), also called swish: the gate of Llama
    gelu_tanh  0.5 x (1 + tanh(sqrt(2/π) (x + 0.044715 x³))): GPT-2's approximation, up to 5e-4 away

The two forms of GELU differ by enough to change a trained model's output and by too little to
notice in its loss.

Paper   Hendrycks & Gimpel 2016, arXiv:1606.08415; SwiGLU: Shazeer 2020, arXiv:2002.05202
Shapes  x [..., width]
Fast    feed_forward_triton.py: SwiGLU's bend in one launch
Run     uv run python implementations/layers/feed_forward.py
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn


def gelu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """x Φ(x), exactly, Φ from the error function; in float32 or wider, returned as `x`'s dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2)))).to(x.dtype)


def gelu_tanh(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The approximation of GELU by tanh (section 2 of the paper); widened as `gelu` is."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    return (0.5 * wide * (1 + torch.tanh(inner))).to(x.dtype)


def silu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """x sigmoid(x); widened as `gelu` is."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.sigmoid(wide)).to(x.dtype)


def swiglu_naive(
    gate: Float[Tensor, "*batch hidden"], expand: Float[Tensor, "*batch hidden"]
) -> Float[Tensor, "*batch hidden"]:
    """silu(gate) · expand: the bend between SwiGLU's linear maps."""
    return silu(gate) * expand


class FeedForward(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: Callable[[Tensor], Tensor] = gelu,
        *,
        bias: bool = True,
    ):
        super().__init__()
        self.expand = nn.Linear(width, hidden, bias=bias)
        self.contract = nn.Linear(hidden, width, bias=bias)
        self.activation = activation

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return self.contract(self.activation(self.expand(x)))


class SwiGLU(nn.Module):
    """A gated feed-forward layer: three linear maps, without biases unless asked for.

    Args:
        activation: of the gate.
        gated: activation and product as one function with the signature of `swiglu_naive`, which
            then takes the place of `activation`.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: Callable[[Tensor], Tensor] = silu,
        *,
        bias: bool = False,
        gated: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.activation, self.gated = activation, gated
        self.gate = nn.Linear(width, hidden, bias=bias)
        self.expand = nn.Linear(width, hidden, bias=bias)
        self.contract = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        if self.gated is not None:
            return self.contract(self.gated(self.gate(x), self.expand(x)))
        return self.contract(self.activation(self.gate(x)) * self.expand(x))


def main() -> None:
    x = torch.linspace(-6, 6, 100_001, dtype=torch.float64)
    apart = (gelu(x) - gelu_tanh(x)).abs()
    where = abs(x[apart.argmax()])
    print(f"the two forms of GELU differ by at most {apart.max():.2e}, at x = ±{where:.2f}")
    print(f"GELU's lowest point is {gelu(x).min():.4f}, at x = {x[gelu(x).argmin()]:.3f}")


if __name__ == "__main__":
    main()
