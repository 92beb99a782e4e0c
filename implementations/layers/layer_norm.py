"""LayerNorm: give every row mean zero and variance one, then scale and shift each channel.

    output = (x - mean(x)) / sqrt(mean((x - mean(x))²) + epsilon) * scale + shift

Mean and variance are over the last axis, the variance divided by the count, not by count - 1.
Epsilon stands inside the
root: a constant row gives zeros.

Paper   Ba, Kiros & Hinton 2016, arXiv:1607.06450
Shapes  x, residual [..., channel]    scale, shift [channel]
Fast    layer_norm_triton.py: one launch, each row read once
Run     uv run python implementations/layers/layer_norm.py
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def layer_norm_naive(
    x: Float[Tensor, "*batch channel"],
    scale: Float[Tensor, " channel"],
    shift: Float[Tensor, " channel"],
    epsilon: float = 1e-5,
) -> Float[Tensor, "*batch channel"]:
    """The equation above, in float32 or wider, returned in the dtype of `x`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return (centred / torch.sqrt(variance + epsilon) * scale + shift).to(x.dtype)


def add_layer_norm_naive(
    x: Float[Tensor, "*batch channel"],
    residual: Float[Tensor, "*batch channel"],
    scale: Float[Tensor, " channel"],
    shift: Float[Tensor, " channel"],
    epsilon: float = 1e-5,
) -> tuple[Float[Tensor, "*batch channel"], Float[Tensor, "*batch channel"]]:
    """(LayerNorm(x + residual), x + residual): what the next part reads, and the stream."""
    stream = x + residual
    return layer_norm_naive(stream, scale, shift, epsilon), stream


class LayerNorm(nn.Module):
    """LayerNorm with learned scale and shift, under torch's names `weight` and `bias`."""

    def __init__(self, width: int, epsilon: float = 1e-5, norm=layer_norm_naive):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.epsilon, self.norm = epsilon, norm

    def forward(self, x: Float[Tensor, "*batch channel"]) -> Float[Tensor, "*batch channel"]:
        return self.norm(x, self.weight, self.bias, self.epsilon)


def main() -> None:
    torch.manual_seed(0)
    x = 100 + 7 * torch.randn(4, 64)
    y = LayerNorm(64)(x)
    print(f"before  mean {x.mean(-1).mean():8.3f}  deviation {x.std(-1, correction=0).mean():.3f}")
    print(f"after   mean {y.mean(-1).mean():8.3f}  deviation {y.std(-1, correction=0).mean():.3f}")
    difference = (y - nn.functional.layer_norm(x, (64,))).abs().max()
    print(f"largest difference from torch's layer_norm: {difference:.1e}")


if __name__ == "__main__":
    main()
