"""The last layer of a language model and its loss, as one function.

    logits = hidden weightᵀ;   loss = cross-entropy(logits, targets)

One function because the logits are the largest tensor of a language model, and only the loss and
two gradients are wanted: the fast form never holds them.

Shapes  hidden [..., width]    weight [vocabulary, width]    targets [...]
Fast    linear_cross_entropy_triton.py: a chunk of rows at a time
Run     uv run python implementations/layers/linear_cross_entropy.py
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from implementations.layers.cross_entropy import cross_entropy_naive


def linear_cross_entropy_naive(
    hidden: Float[Tensor, "*batch width"],
    weight: Float[Tensor, "vocabulary width"],
    targets: Int[Tensor, "*batch"],
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> Float[Tensor, ""]:
    """The equation above; options and errors are those of `cross_entropy_naive`."""
    return cross_entropy_naive(hidden @ weight.mT, targets, ignore_index, z_loss)


def main() -> None:
    from implementations.lab.memory import peak_bytes

    torch.manual_seed(0)
    hidden, weight = torch.randn(512, 64), torch.randn(8192, 64)
    targets = torch.randint(8192, (512,))
    peak = peak_bytes(linear_cross_entropy_naive, hidden, weight, targets)
    print(f"inputs {(hidden.nbytes + weight.nbytes) / 2**20:.1f} MB", end=", ")
    print(f"logits {512 * 8192 * 4 / 2**20:.1f} MB, held at once beyond the inputs", end=" ")
    print(f"{peak / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
