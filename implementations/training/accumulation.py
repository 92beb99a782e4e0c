"""Gradient accumulation that equals the large batch: add up sums, divide once.

    gradient = sum_i d(sum of the token losses of part i) / sum_i (tokens of part i)

The mean of the parts' means is another number as soon as the parts differ in length: a token in a
short part then weighs more than one in a long part. So a loss here returns a sum and a count, and
the division waits until all parts are in.

Paper   the bug and its history: https://unsloth.ai/blog/gradient (October 2024)
Shapes  tokens [batch, token]    logits [batch, token, vocabulary]
Run     uv run python implementations/training/accumulation.py
"""

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

IGNORED = -100  # torch's own default for a target that does not count

Batch = Tensor | tuple[Tensor, ...]
Loss = Callable[[nn.Module, Batch], tuple[Tensor, Tensor | int]]


def next_token_loss(
    model: Callable[[Tensor], Tensor], tokens: Int[Tensor, "batch token"]
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """The summed surprise at every next token, in nats, and how many tokens were asked for.

    A token of -100 is padding: it is never asked for, and a causal model shows it to none before
    it. Logits are widened to float32 at least: a bfloat16 logarithm has two digits.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = model(inputs.masked_fill(inputs == IGNORED, 0))
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = nn.functional.cross_entropy(
        rearrange(wide, "batch token vocabulary -> (batch token) vocabulary"),
        rearrange(targets, "batch token -> (batch token)"),
        ignore_index=IGNORED,
        reduction="sum",
    )
    return losses, (targets != IGNORED).sum()


def accumulate(
    loss: Loss, model: nn.Module, batch: Batch, parts: int = 1
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Leave the gradient of the batch's mean loss in `.grad`; returns that mean and the count.

    Each part's graph is freed before the next is built, so memory is that of one part. Gradients
    must be clear before; nothing here waits for a GPU.

    Raises:
        ValueError: the batch has fewer rows than there are parts.
    """
    losses, counts = [], []
    for part in split(batch, parts):
        total, count = loss(model, part)
        total.backward()
        losses.append(total.detach().double())
        counts.append(torch.as_tensor(count, device=total.device))
    count = torch.stack(counts).sum()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.div_(count)
    return torch.stack(losses).sum() / count, count.double()


def split(batch: Batch, parts: int) -> list[Batch]:
    """The rows of a batch in `parts` pieces, as even as they can be; a tuple is cut alike."""
    tensors = (batch,) if isinstance(batch, Tensor) else batch
    rows = min(len(tensor) for tensor in tensors)
    if not 1 <= parts <= rows:
        raise ValueError(f"a batch of {rows} rows cannot be cut into {parts} micro-batches")
    pieces = [tensor.tensor_split(parts) for tensor in tensors]
    return list(pieces[0] if isinstance(batch, Tensor) else zip(*pieces, strict=True))


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50)).double()
    tokens = torch.randint(50, (4, 33))
    tokens[0, 5:] = tokens[1, 2:] = IGNORED  # two short texts, padded
    gradients, means = {}, []
    for parts in (1, 4):
        model.zero_grad()
        accumulate(next_token_loss, model, tokens, parts)
        gradients[parts] = model[1].weight.grad.clone()
    for row in tokens.split(1):
        total, count = next_token_loss(model, row)
        means.append(total / count)
    model.zero_grad()
    torch.stack(means).mean().backward()
    size = gradients[1].norm()
    print("four parts against one batch, relative difference of the gradient:")
    print(f"  sums, divided once  {(gradients[4] - gradients[1]).norm() / size:.1e}")
    print(f"  mean of means       {(model[1].weight.grad - gradients[1]).norm() / size:.1e}")


if __name__ == "__main__":
    main()
