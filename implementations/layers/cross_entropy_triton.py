"""Cross-entropy in Triton: one kernel gives the loss of a row, its gradient, or both.

    first walk    normalizer = log Σ exp(logit), online
                  loss = normalizer - logit_target + z normalizer²
    second walk   share_j = exp(logit_j - normalizer)
                  logit_j' = upstream · (share_j (1 + 2 z normalizer) - [j = target])

The second walk may write where the first has read: `cross_entropy_in_place` turns the logits into
their own gradient. Its floor is one read and one write. Where a row fits on the chip of a Hopper
GPU, cross_entropy_hopper.py computes both, and keeps to that floor; everywhere else the kernel
below, which keeps to it if three conditions hold:

    cache          The second read is of the L2 cache. At 32 registers a thread two programs of 1024
                   threads share each of the 132 multiprocessors of an H200, so 264 rows are at
                   work: 25 MB for 50,304 bfloat16 logits, 68 MB for 131,072, of which the cache
                   holds 50. So the second walk goes backwards, from what was read last; its first
                   block is still in registers.
    instructions   At a copy's speed a multiprocessor has 28 for a logit. With exp, and a comparison
                   for the target, both walks took 30; with exp2, whose factor is part of the sum
                   before it, and the target written apart, 17.
    requests       A block is asked for before the one before it is worked on.

Paper   in-place gradient: Hsu et al. 2024 (Liger), arXiv:2410.10989
Floor   bytes, for n logits of b bytes: loss n b, loss and gradient 2 n b
Shapes  logits [..., vocabulary]    targets [...]
Run     uv run python implementations/layers/cross_entropy_triton.py
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from implementations.lab.ahead_of_time import Variant
from implementations.layers.cross_entropy_hopper import launch_rows as launch_on_hopper
from implementations.layers.cross_entropy_hopper import reads_once
from implementations.layers.row_tiles import (
    as_rows,
    ceil_divide,
    check_device,
    check_rows,
    launch,
    power_of_two,
    wide_dtype,
)

# On an H200, of a copy's speed, loss and gradient of 131,072 and of 50,304 logits: 0.77 and 0.82;
# with 16 warps and two times 8 numbers a thread 0.75 and 0.80; with 32 and as many 0.78 and 0.60.
WARPS, EACH = 32, 8
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def join(value, maximum, total):
    """Every thread's maximum, and its sum of powers relative to it, with another block of numbers.

    Maxima are counted in powers of two: exp(value - maximum) is then one multiplication and sum and
    the one power that a GPU has.
    """
    value = value.to(maximum.dtype)
    largest = tl.maximum(maximum, tl.max(value, axis=1, keep_dims=True) * LOG2_E)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    powers = tl.sum(tl.exp2(value * LOG2_E - base), axis=1, keep_dims=True)
    return largest, total * tl.exp2(maximum - base) + powers


@triton.jit
def cross_entropy_kernel(
    logits,
    targets,
    upstream,
    losses,
    gradient,
    vocabulary,
    logits_stride,
    gradient_stride,
    upstream_stride,
    ignore_index,
    Z_LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    THREADS: tl.constexpr,
    EACH: tl.constexpr,
):
    BLOCK: tl.constexpr = THREADS * EACH
    wide = losses.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    gradient += row * gradient_stride
    # A block is a matrix: EACH neighbours in a thread, so that none waits for another in the walks.
    lane = tl.arange(0, THREADS)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    target = tl.load(targets + row)
    if target == ignore_index:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            for start in range(0, vocabulary, BLOCK):
                column = start + lane
                tl.store(gradient + column, tl.zeros_like(column).to(wide), column < vocabulary)
        return
    # Outside the vocabulary is no address to read: that row's loss is NaN.
    known = (target >= 0) & (target < vocabulary)
    chosen = tl.load(logits + target, known, float("nan")).to(wide)
    maximum = tl.full([THREADS, 1], float("-inf"), wide)
    total = tl.zeros([THREADS, 1], wide)
    value = tl.load(logits + lane, lane < vocabulary, float("-inf"))
    for start in range(BLOCK, vocabulary, BLOCK):
        column = start + lane
        ahead = tl.load(logits + column, column < vocabulary, float("-inf"))
        maximum, total = join(value, maximum, total)
        value = ahead
    maximum, total = join(value, maximum, total)
    largest = tl.max(maximum)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    binary = largest + tl.log2(tl.sum(total * tl.exp2(maximum - base)))
    normalizer = binary / LOG2_E
    tl.store(losses + row, normalizer - chosen + Z_LOSS * normalizer * normalizer)
    if GRADIENT:
        factor = tl.load(upstream + row * upstream_stride).to(wide)
        weight = factor * (1 + 2 * Z_LOSS * normalizer)
        for piece in range(tl.cdiv(vocabulary, BLOCK) - 1, -1, -1):
            column = piece * BLOCK + lane
            before = column - BLOCK
            ahead = tl.load(logits + before, before >= 0, float("-inf"))
            slope = weight * tl.exp2(value.to(wide) * LOG2_E - binary)
            tl.store(gradient + column, slope, column < vocabulary, cache_modifier=".cs")
            value = ahead
        tl.debug_barrier()  # the target is written once more, by whichever thread
        own = weight * tl.exp2(chosen * LOG2_E - binary) - factor
        tl.store(gradient + target, own, known)


def launch_rows(
    logits: Tensor,
    targets: Tensor,
    upstream: Tensor,
    losses: Tensor,
    gradient: Tensor | None,
    ignore_index: int,
    z_loss: float,
) -> None:
    """One program a row. `upstream` has one number a row, or one for all."""
    if gradient is not None and reads_once(logits, gradient):
        options = ignore_index, z_loss
        return launch_on_hopper(logits, targets, upstream, losses, gradient, *options)
    rows, vocabulary = logits.shape
    written = logits if gradient is None else gradient
    whole = power_of_two(vocabulary)
    warps = min(WARPS, ceil_divide(whole, 32 * EACH))
    each = min(EACH, whole)
    launch(
        cross_entropy_kernel,
        (rows,),
        logits,
        targets.contiguous(),
        upstream,
        losses,
        written,
        vocabulary,
        logits.stride(0),
        written.stride(0),
        upstream.stride(0) if upstream.ndim else 0,
        ignore_index,
        Z_LOSS=z_loss,
        GRADIENT=gradient is not None,
        THREADS=min(32 * warps, whole // each),
        EACH=each,
        num_warps=warps,
    )


@torch.library.custom_op("ml_studies::cross_entropy", mutates_args=())
def cross_entropy_op(logits: Tensor, targets: Tensor, ignore_index: int, z_loss: float) -> Tensor:
    """The loss of each row, zero where it is ignored."""
    losses = torch.empty(targets.shape, dtype=wide_dtype(logits), device=logits.device)
    launch_rows(as_rows(logits), targets, losses, losses, None, ignore_index, z_loss)
    return losses


@torch.library.custom_op("ml_studies::cross_entropy_backward", mutates_args=())
def cross_entropy_backward_op(
    logits: Tensor, targets: Tensor, upstream: Tensor, ignore_index: int, z_loss: float
) -> Tensor:
    """The gradient of the logits; `upstream` is that of the losses."""
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    losses = torch.empty(targets.shape, dtype=wide_dtype(logits), device=logits.device)
    rows = gradient.view(-1, gradient.shape[-1])
    upstream = upstream.reshape(-1)
    launch_rows(as_rows(logits), targets, upstream, losses, rows, ignore_index, z_loss)
    return gradient


@torch.library.custom_op("ml_studies::cross_entropy_in_place", mutates_args=("logits",))
def cross_entropy_in_place_op(
    logits: Tensor, targets: Tensor, upstream: Tensor, ignore_index: int, z_loss: float
) -> Tensor:
    """The loss of each row; the logits become `upstream` times their gradient."""
    losses = torch.empty(targets.shape, dtype=wide_dtype(logits), device=logits.device)
    rows = logits.view(-1, logits.shape[-1])
    launch_rows(rows, targets, upstream, losses, rows, ignore_index, z_loss)
    return losses


@cross_entropy_op.register_fake
def _(logits, targets, ignore_index, z_loss):
    return torch.empty(targets.shape, dtype=wide_dtype(logits), device=logits.device)


@cross_entropy_backward_op.register_fake
def _(logits, targets, upstream, ignore_index, z_loss):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@cross_entropy_in_place_op.register_fake
def _(logits, targets, upstream, ignore_index, z_loss):
    return torch.empty(targets.shape, dtype=wide_dtype(logits), device=logits.device)


def save(ctx, inputs, output):
    logits, targets, ctx.ignore_index, ctx.z_loss = inputs
    ctx.save_for_backward(logits, targets)


def backward(ctx, upstream):
    options = ctx.ignore_index, ctx.z_loss
    return cross_entropy_backward_op(*ctx.saved_tensors, upstream, *options), None, None, None


cross_entropy_op.register_autograd(backward, setup_context=save)


def cross_entropy_triton(
    logits: Float[Tensor, "*batch vocabulary"],
    targets: Int[Tensor, "*batch"],
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> Float[Tensor, ""]:
    """`cross_entropy_naive` with one launch forward and one backward.

    A target outside the vocabulary makes the loss NaN: to raise, the CPU would wait for the GPU.

    Raises:
        ValueError: what `check_targets` refuses.
    """
    check_targets(logits, targets, z_loss)
    losses = cross_entropy_op(logits, targets, ignore_index, z_loss)
    return losses.sum() / (targets != ignore_index).sum()


def cross_entropy_in_place(
    logits: Float[Tensor, "*batch vocabulary"],
    targets: Int[Tensor, "*batch"],
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> Float[Tensor, ""]:
    """The loss of `cross_entropy_naive`; the logits are overwritten by its gradient.

    For a training step that writes its own backward pass: autograd knows nothing of it.

    Raises:
        ValueError: what `check_targets` refuses, logits that require a gradient, or that are not
            dense.
    """
    check_targets(logits, targets, z_loss)
    if logits.requires_grad and torch.is_grad_enabled():
        raise ValueError("logits that require a gradient cannot become it: detach them first")
    if not logits.is_contiguous():
        raise ValueError(f"logits are overwritten only if dense, got strides {logits.stride()}")
    valid = (targets != ignore_index).sum()
    share = 1 / valid.to(wide_dtype(logits))
    losses = cross_entropy_in_place_op(logits, targets, share, ignore_index, z_loss)
    return losses.sum() / valid


def check_targets(logits: Tensor, targets: Tensor, z_loss: float) -> None:
    """Raise ValueError unless there is one integer target for each row of floats."""
    check_rows(logits)
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"rows of {tuple(logits.shape)} need targets of {tuple(logits.shape[:-1])}, "
            f"got {tuple(targets.shape)}"
        )
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets are int64 or int32, got {targets.dtype}")
    if z_loss < 0:
        raise ValueError(f"the z-loss pulls to zero and is not negative, got {z_loss}")
    check_device(logits, "targets", targets)


def variants() -> Iterator[Variant]:
    """bfloat16 logits, with the gradient."""
    pointers = {"logits": "*bf16", "targets": "*i64", "upstream": "*fp32", "losses": "*fp32"}
    strides = ("vocabulary", "logits_stride", "gradient_stride")
    types = pointers | {"gradient": "*bf16"} | dict.fromkeys(strides, "i32")
    constants = {"upstream_stride": 1, "Z_LOSS": 1e-4, "GRADIENT": True}
    constants |= {"THREADS": 32 * WARPS, "EACH": EACH}
    types |= {"ignore_index": "i32"}
    # For sm_90 linear_cross_entropy_triton.py compiles it.
    yield Variant(
        "loss and gradient", cross_entropy_kernel, types, constants, WARPS, capabilities=(80,)
    )


def main() -> None:
    from implementations.lab.compare import error
    from implementations.layers.cross_entropy import cross_entropy_naive

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = (3 * torch.randn(8, 50_257, device=device)).half()
    targets = torch.randint(50_257, (8,), device=device)
    exact = logits.double().requires_grad_()
    cross_entropy_naive(exact, targets, z_loss=1e-4).backward()
    loss = cross_entropy_in_place(logits, targets, z_loss=1e-4)
    print(f"loss of 8 rows of 50,257 float16 logits, {device}: {loss:.6f}")
    print(f"  the logits, now their gradient: mean error {error(logits, exact.grad).mean:.1e}")


if __name__ == "__main__":
    main()
