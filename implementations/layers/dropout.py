"""Dropout: in training, silence each number with probability rate, and raise the rest to keep the
mean.

    output = x · keep / (1 - rate),   keep ~ Bernoulli(1 - rate);   in evaluation output = x

Paper   Srivastava et al. 2014, JMLR 15. Scaled while training, so that evaluation does nothing
Shapes  x [...]
Run     uv run python implementations/layers/dropout.py
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def dropout_naive(x: Float[Tensor, "*shape"], rate: float) -> Float[Tensor, "*shape"]:
    """The equation above, with torch's default generator.

    Raises:
        ValueError: the rate is not in [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"a dropout rate is in [0, 1), got {rate}")
    keep = torch.rand_like(x, dtype=torch.float32) >= rate
    return x * keep / (1 - rate)


class Dropout(nn.Module):
    """Dropout in training, nothing in evaluation; rate 0 draws no random number."""

    def __init__(self, rate: float):
        super().__init__()
        # Refuses a wrong rate here, not at the first step; on the CPU also in a model without data.
        dropout_naive(torch.zeros(0, device="cpu"), rate)
        self.rate = rate

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return dropout_naive(x, self.rate) if self.training and self.rate else x


def main() -> None:
    torch.manual_seed(0)
    x = torch.ones(1_000_000)
    for rate in (0.1, 0.5):
        y = dropout_naive(x, rate)
        print(f"rate {rate}: {(y == 0).double().mean():.4f} silenced, mean {y.mean():.4f}")


if __name__ == "__main__":
    main()
