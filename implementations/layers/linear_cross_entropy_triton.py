"""The last layer and its loss without the logits: a chunk of rows at a time, gradient and all.

    for each chunk of rows:
        logits = hidden weightᵀ
        logits become upstream · their gradient, in place      cross_entropy_triton.py
        hidden' = logits weight;   weight' += logitsᵀ hidden

A language model's logits are its largest tensor: 8,192 tokens and 131,072 words in bfloat16 are
2 GB, and their gradient as much again. Here only a chunk of them exists at a time. The gradient is
made in the forward pass, so that no product is computed twice; the backward pass scales it. The sum
for the weight is kept in float32, whatever the inputs are.

Paper   Hsu et al. 2024 (Liger), arXiv:2410.10989; Wijmans et al. 2024, arXiv:2411.09009
Floor   three matrix products, 6 · rows · width · vocabulary operations, as with the logits held
Shapes  hidden [..., width]    weight [vocabulary, width]    targets [...]
Run     uv run python implementations/layers/linear_cross_entropy_triton.py
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from implementations.lab.ahead_of_time import Variant
from implementations.layers.cross_entropy_triton import (
    EACH,
    WARPS,
    check_targets,
    cross_entropy_in_place_op,
    cross_entropy_kernel,
    cross_entropy_op,
)
from implementations.layers.row_tiles import ceil_divide, check_device, check_rows, wide_dtype

CHUNKS = 8  # a chunk holds an eighth of the logits


def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    z_loss: float,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss and its gradients by hidden and weight, which are empty unless asked for."""
    valid = (targets != ignore_index).sum()
    share = 1 / valid.to(wide_dtype(hidden))
    losses = torch.zeros_like(share)
    size = max(1, ceil_divide(len(hidden), CHUNKS))
    chunk = hidden.new_empty(size, len(weight))  # of logits, where each next one is written
    hidden_gradient, weight_gradient = hidden.new_empty(0), weight.new_empty(0)
    if gradients:
        hidden_gradient = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        weight_gradient = torch.zeros(weight.shape, dtype=wide_dtype(weight), device=weight.device)
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        logits = chunk[: len(hidden[rows])]
        torch.mm(hidden[rows], weight.mT, out=logits)
        if not gradients:
            losses += cross_entropy_op(logits, targets[rows], ignore_index, z_loss).sum()
            continue
        options = targets[rows], share, ignore_index, z_loss
        losses += cross_entropy_in_place_op(logits, *options).sum()
        torch.mm(logits, weight, out=hidden_gradient[rows])
        add_product(weight_gradient, logits.mT, hidden[rows])
    chunk = logits = None  # makes room for the rounded sum
    return losses / valid, hidden_gradient, weight_gradient.to(weight.dtype)


linear_cross_entropy_op = torch.library.custom_op(
    "ml_studies::linear_cross_entropy", loss_and_gradients, mutates_args=()
)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, summed in the dtype of the total, which may be wider."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:  # cuBLAS reads half precision and adds to float32
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


@linear_cross_entropy_op.register_fake
def _(hidden, weight, targets, ignore_index, z_loss, gradients):
    loss = torch.empty((), dtype=wide_dtype(hidden), device=hidden.device)
    if not gradients:
        return loss, hidden.new_empty(0), weight.new_empty(0)
    return loss, hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def save(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])


def backward(ctx, upstream, *_):
    hidden, weight = ctx.saved_tensors
    scale = upstream.to(hidden.dtype)
    return hidden * scale, weight * scale, None, None, None, None


linear_cross_entropy_op.register_autograd(backward, setup_context=save)


def linear_cross_entropy_triton(
    hidden: Float[Tensor, "*batch width"],
    weight: Float[Tensor, "vocabulary width"],
    targets: Int[Tensor, "*batch"],
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> Float[Tensor, ""]:
    """`linear_cross_entropy_naive` without its logits.

    A target outside the vocabulary makes the loss NaN, as in `cross_entropy_triton`.

    Raises:
        ValueError: hidden and weight do not share width, dtype and device, or there is not one
            integer target for each row.
    """
    check_rows(hidden)
    check_rows(weight)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"hidden of width {hidden.shape[-1]} needs weights [vocabulary, {hidden.shape[-1]}], "
            f"got {tuple(weight.shape)}"
        )
    if weight.dtype != hidden.dtype:
        raise ValueError(f"the weight is {weight.dtype}, hidden {hidden.dtype}")
    check_device(hidden, "weight", weight)
    check_targets(hidden, targets, z_loss)
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return linear_cross_entropy_op(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        targets.reshape(-1),
        ignore_index,
        z_loss,
        wanted,
    )[0]


def variants() -> Iterator[Variant]:
    """The one kernel, as it is launched from here: one upstream number for all rows."""
    pointers = {"logits": "*bf16", "targets": "*i64", "upstream": "*fp32", "losses": "*fp32"}
    integers = (
        "vocabulary",
        "logits_stride",
        "gradient_stride",
        "upstream_stride",
        "ignore_index",
    )
    types = pointers | {"gradient": "*bf16"} | dict.fromkeys(integers, "i32")
    constants = {"Z_LOSS": 0.0, "GRADIENT": True, "THREADS": 32 * WARPS, "EACH": EACH}
    yield Variant("a chunk", cross_entropy_kernel, types, constants, WARPS, capabilities=(90,))


def main() -> None:
    from implementations.lab.memory import peak_bytes
    from implementations.layers.linear_cross_entropy import linear_cross_entropy_naive

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.randn(256, 64, device=device, requires_grad=True)
    weight, targets = torch.randn(8192, 64, device=device), torch.randint(8192, (256,))
    inputs = hidden, weight, targets.to(device)
    print(f"logits of {256 * 8192 * 4 / 2**20:.0f} MB, held at once beyond the inputs, {device}:")
    for function in (linear_cross_entropy_naive, linear_cross_entropy_triton):

        def run(*inputs: Tensor, function=function) -> Tensor:
            return torch.autograd.grad(function(*inputs), hidden)[0]

        print(f"  {function.__name__:28} {peak_bytes(run, *inputs) / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
