"""Softmax: numbers become shares that are positive and sum to one.

    output_i = exp(x_i - max(x)) / Σ_j exp(x_j - max(x))

Taking the largest away changes nothing in the quotient, and keeps exp from overflowing.

Paper   Bridle 1990, "Probabilistic interpretation of feedforward classification network outputs"
Shapes  x [..., channel]
Fast    softmax_triton.py: one launch, each row read once
Run     uv run python implementations/layers/softmax.py
"""

import torch
from jaxtyping import Float
from torch import Tensor


def softmax_naive(x: Float[Tensor, "*batch channel"]) -> Float[Tensor, "*batch channel"]:
    """The equation above over the last axis, in float32 or wider, returned in the dtype of `x`.

    A row of only -inf has no shares: it gives NaN, as torch's does.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    power = torch.exp(wide - wide.amax(-1, keepdim=True).detach())
    return (power / power.sum(-1, keepdim=True)).to(x.dtype)


def main() -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    for shift in (0.0, 100.0):
        plain = torch.exp(x + shift) / torch.exp(x + shift).sum()
        print(f"x = {(x + shift).tolist()}")
        print(f"  without the maximum  {[round(share, 4) for share in plain.tolist()]}")
        shares = softmax_naive(x + shift).tolist()
        print(f"  with it              {[round(share, 4) for share in shares]}")


if __name__ == "__main__":
    main()
