"""Cross-entropy: how surprised is a model by the right answers?

    normalizer = log Σ_j exp(logit_j)
    loss       = mean over valid rows of  normalizer - logit_target + z_loss · normalizer²

A row whose target is `ignore_index` is not valid: it adds nothing, has no gradient and does not
count in the mean. The z-loss keeps the normalizer near zero, where a narrow dtype is precise; the
gradient of a row is

    logit_j' = softmax(logits)_j · (1 + 2 z_loss normalizer) - [j = target]

Paper   z-loss: de Brébisson & Vincent 2016, arXiv:1604.08859; PaLM, arXiv:2204.02311, section 5
Shapes  logits [..., vocabulary]    targets [...]
Fast    cross_entropy_triton.py: loss and gradient in one launch
Run     uv run python implementations/layers/cross_entropy.py
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def cross_entropy_naive(
    logits: Float[Tensor, "*batch vocabulary"],
    targets: Int[Tensor, "*batch"],
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> Float[Tensor, ""]:
    """The equation above, in float32 or wider, which is also the loss's dtype.

    Without a valid row the mean is of nothing, and NaN.

    Raises:
        ValueError: there is not one target for each row, or a target is neither `ignore_index` nor
            in the vocabulary.
    """
    if targets.shape != logits.shape[:-1]:  # broadcasting would give a loss, and a wrong one
        raise ValueError(
            f"rows of {tuple(logits.shape)} need targets of {tuple(logits.shape[:-1])}, "
            f"got {tuple(targets.shape)}"
        )
    vocabulary, valid = logits.shape[-1], targets != ignore_index
    if ((targets < 0) | (targets >= vocabulary))[valid].any():
        raise ValueError(f"targets are 0 ... {vocabulary - 1} or ignore_index {ignore_index}")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    normalizer = wide.logsumexp(-1)
    chosen = wide.gather(-1, targets.masked_fill(~valid, 0)[..., None])[..., 0]
    losses = normalizer - chosen + z_loss * normalizer**2
    return losses.masked_fill(~valid, 0.0).sum() / valid.sum()


def main() -> None:
    torch.manual_seed(0)
    logits, targets = 3 * torch.randn(1000, 50), torch.randint(50, (1000,))
    targets[::4] = -100
    theirs = torch.nn.functional.cross_entropy(logits, targets)
    print(f"a quarter of 1,000 rows ignored: {cross_entropy_naive(logits, targets):.6f}", end="")
    print(f", torch {theirs:.6f}")
    print("gradient descent on the logits, 100 steps: log Σ exp(logit) on average")
    for z_loss in (0.0, 0.1):
        moved = logits.clone().requires_grad_()
        for _ in range(100):
            loss = cross_entropy_naive(moved, targets, z_loss=z_loss)
            moved.data -= 100 * torch.autograd.grad(loss, moved)[0]
        normalizer = moved[targets != -100].logsumexp(-1).abs().mean()
        print(f"  z-loss {z_loss:3}  {normalizer:.2f}")


if __name__ == "__main__":
    main()
