"""RMSNorm: give every row a root mean square of one, then scale each channel.

    output = x / sqrt(mean(x²) + epsilon) * scale

LayerNorm without the mean and without the shift: one reduction instead of two.

    stream = x + residual;  output = RMSNorm(stream)      between the parts of a transformer

Paper   Zhang & Sennrich 2019, arXiv:1910.07467
Shapes  x, residual [..., channel]    scale [channel]
Fast    rms_norm_triton.py: one launch, each row read once
Run     uv run python implementations/layers/rms_norm.py
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def rms_norm_naive(
    x: Float[Tensor, "*batch channel"], scale: Float[Tensor, " channel"], epsilon: float = 1e-5
) -> Float[Tensor, "*batch channel"]:
    """The equation above (4 of the paper), in float32 or wider, returned in the dtype of `x`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = (wide**2).mean(-1, keepdim=True)
    return (wide / torch.sqrt(mean_square + epsilon) * scale).to(x.dtype)


def add_rms_norm_naive(
    x: Float[Tensor, "*batch channel"],
    residual: Float[Tensor, "*batch channel"],
    scale: Float[Tensor, " channel"],
    epsilon: float = 1e-5,
) -> tuple[Float[Tensor, "*batch channel"], Float[Tensor, "*batch channel"]]:
    """(RMSNorm(x + residual), x + residual): what the next part reads, and the stream."""
    stream = x + residual
    return rms_norm_naive(stream, scale, epsilon), stream


class RMSNorm(nn.Module):
    """RMSNorm with a learned scale, under torch's name `weight`."""

    def __init__(self, width: int, epsilon: float = 1e-5, norm=rms_norm_naive):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon, self.norm = epsilon, norm

    def forward(self, x: Float[Tensor, "*batch channel"]) -> Float[Tensor, "*batch channel"]:
        return self.norm(x, self.weight, self.epsilon)


def main() -> None:
    torch.manual_seed(0)
    x = 3 + 7 * torch.randn(4, 64)
    y = RMSNorm(64)(x)
    for name, rows in {"before": x, "after": y}.items():
        root = rows.pow(2).mean(-1).sqrt().mean()
        print(f"{name:8}root mean square {root:6.3f}  mean {rows.mean(-1).mean():6.3f}")
    print(
        f"largest difference from torch's: {(y - nn.functional.rms_norm(x, (64,))).abs().max():.1e}"
    )


if __name__ == "__main__":
    main()
