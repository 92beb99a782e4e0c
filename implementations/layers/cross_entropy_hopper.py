"""Cross-entropy with its gradient on Hopper in Gluon: a row is read once, and lives on the chip.

    second walk, row r        slope of chunk 0   1   2   ...              its place is free, so
    copies, row r + 132       |        chunk 0   1   2   ...              the next row's comes
    first walk, row r + 132   |            tail, 0   1   2  ...  27 |     DELAY chunks later
                              normalizer of row r                   normalizer of row r + 132

The two walks are those of cross_entropy_triton.py, which reads the second time from the L2 cache.
Here a row of up to 131,072 numbers stays: 7/8 of it in shared memory, a ring of chunks, the
rest, its tail, in registers. Each thread copies eight numbers of a chunk and reads back the same
eight. A program takes every 132nd row: while a row's gradient leaves, the next row arrives, and
memory is never idle for long.

Half precision alone, since wider rows do not fit, and rows that begin at multiples of 16 bytes,
which a copy asks for. `reads_once` says whether it can; for all else there is the Triton kernel.

Naive   cross_entropy.py. Public functions: cross_entropy_triton.py
Floor   bytes, for n logits of b bytes: 2 n b, whatever the cache holds
Run     uv run python implementations/layers/cross_entropy_hopper.py
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from implementations.attention.hopper_tiles import gpu_is_missing, multiprocessors
from implementations.lab.ahead_of_time import Variant
from implementations.layers.row_tiles import ceil_divide, launch, power_of_two

WARPS = 16
DELAY = 12  # chunks on their way; of a copy's speed 3, 6, 8, 12 have 0.76, 0.83, 0.84, 0.89
CHUNK = 32 * WARPS * 8  # 16 bytes a thread
# Programs of a multiprocessor, and the chunks that each holds in shared memory and in registers.
PLACES = (2, 57344 // CHUNK, 8192 // CHUNK), (1, 114688 // CHUNK, 16384 // CHUNK)
REGISTERS = 65536  # of a multiprocessor
LOG2_E = gl.constexpr(math.log2(math.e))

# The names before Triton 3.9, and since.
copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def request(ring, slot, source, wanted):
    """Ask for a chunk, if it is wanted; in any case that is one group of copies."""
    copy(ring.index(slot), source, mask=wanted)
    async_copy.commit_group()


@gluon.jit
def join(value, maximum, total):
    """Every thread's maximum, in powers of two, and its sum of powers, with more numbers."""
    value = value.to(gl.float32)
    largest = gl.max(gl.max(value, axis=2, keep_dims=True), axis=0, keep_dims=True)
    largest = gl.maximum(maximum, largest * LOG2_E)
    base = gl.where(largest == float("-inf"), 0.0, largest)
    powers = gl.exp2(value * LOG2_E - base)
    powers = gl.sum(gl.sum(powers, axis=2, keep_dims=True), axis=0, keep_dims=True)
    return largest, total * gl.exp2(maximum - base) + powers


@gluon.jit
def slopes(value, weight, binary, wanted):
    """The gradient but for the target's own, in the logits' dtype; zeros if it is not wanted."""
    slope = weight * gl.exp2(value.to(gl.float32) * LOG2_E - binary)
    return gl.where(wanted, slope, 0.0).to(value.dtype)


@gluon.jit
def cross_entropy_kernel(
    logits,
    targets,
    upstream,
    losses,
    gradient,
    rows,
    vocabulary,
    logits_vectors,
    gradient_vectors,
    upstream_stride,
    ignore_index,
    Z_LOSS: gl.constexpr,
    RING: gl.constexpr,
    TAIL: gl.constexpr,
    DELAY: gl.constexpr,
):
    # A chunk is a matrix, 8 neighbours in a thread; a tail is TAIL of them.
    WARPS: gl.constexpr = gl.num_warps()
    THREADS: gl.constexpr = 32 * WARPS
    CHUNK: gl.constexpr = 8 * THREADS
    PARTS: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 32, 1], [1, WARPS, 1], [2, 1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    thread = gl.arange(0, THREADS, gl.SliceLayout(0, gl.SliceLayout(2, PARTS)))[None, :, None] * 8
    each = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, PARTS)))[None, None, :]
    part = gl.arange(0, TAIL, gl.SliceLayout(1, gl.SliceLayout(2, PARTS)))[:, None, None]
    column = thread + each
    inside = (RING + part) * CHUNK + thread < vocabulary  # all eight are, or none
    last = (RING + part) * CHUNK + column
    ring = gl.allocate_shared_memory(logits.dtype.element_ty, [RING, 1, THREADS, 8], PLAIN)
    nothing = gl.full([1, THREADS, 1], float("-inf"), gl.float32, PARTS)

    first, step = gl.program_id(0), gl.num_programs(0)
    logits_stride = gl.cast(logits_vectors, gl.int64) * 8
    gradient_stride = gl.cast(gradient_vectors, gl.int64) * 8
    source = logits + first * logits_stride
    target = gl.load(targets + first)
    wanted = target != ignore_index
    for slot in range(RING):
        request(ring, slot, source + slot * CHUNK + column, wanted)
    tail = gl.load(source + last, inside & wanted, float("-inf"))
    maximum, total = join(tail, nothing, gl.zeros_like(nothing))
    async_copy.wait_group(0)
    for slot in range(RING - DELAY):
        maximum, total = join(ring.index(slot).load(PARTS), maximum, total)

    for row in range(first, rows, step):
        source = logits + row * logits_stride
        result = gradient + row * gradient_stride
        # Outside the vocabulary is no address to read: that row's loss is NaN.
        known = wanted & (target >= 0) & (target < vocabulary)
        chosen = gl.load(source + target, known, float("nan")).to(gl.float32)
        factor = gl.load(upstream + row * upstream_stride).to(gl.float32)
        following = gl.minimum(row + step, rows - 1)
        source = logits + following * logits_stride
        next_target = gl.load(targets + following)
        next_wanted = (next_target != ignore_index) & (row + step < rows)

        for slot in range(RING - DELAY, RING):
            # With an empty group for each chunk, DELAY - 1 are always younger than the awaited one.
            async_copy.wait_group(DELAY - 1)
            async_copy.commit_group()
            maximum, total = join(ring.index(slot).load(PARTS), maximum, total)
        largest = gl.max(gl.max(gl.max(maximum, axis=2), axis=1), axis=0)
        base = gl.where(largest == float("-inf"), 0.0, largest)
        total = total * gl.exp2(maximum - base)
        binary = largest + gl.log2(gl.sum(gl.sum(gl.sum(total, axis=2), axis=1), axis=0))
        normalizer = binary / LOG2_E
        loss = normalizer - chosen + Z_LOSS * normalizer * normalizer
        gl.store(losses + row, gl.where(wanted, loss, 0.0))
        weight = factor * (1 + 2 * Z_LOSS * normalizer)

        tail = slopes(tail, weight, binary, wanted)
        gl.store(result + last, tail, inside, cache_modifier=".cs")
        tail = gl.load(source + last, inside & next_wanted, float("-inf"))
        for slot in range(DELAY):
            slope = slopes(ring.index(slot).load(PARTS), weight, binary, wanted)
            gl.store(result + slot * CHUNK + column, slope, cache_modifier=".cs")
            request(ring, slot, source + slot * CHUNK + column, next_wanted)
        maximum, total = join(tail, nothing, gl.zeros_like(nothing))
        for slot in range(DELAY, RING):
            async_copy.wait_group(DELAY - 1)
            value = ring.index(slot).load(PARTS)
            arrived = ring.index(slot - DELAY).load(PARTS)
            slope = slopes(value, weight, binary, wanted)
            gl.store(result + slot * CHUNK + column, slope, cache_modifier=".cs")
            request(ring, slot, source + slot * CHUNK + column, next_wanted)
            maximum, total = join(arrived, maximum, total)
        barrier()  # the target is written once more, by whichever thread
        own = weight * gl.exp2(chosen * LOG2_E - binary) - factor
        gl.store(result + target, own.to(gradient.dtype.element_ty), known)
        target, wanted = next_target, next_wanted


def plan(vocabulary: int) -> tuple[int, int, int] | None:
    """Programs a multiprocessor, chunks in shared memory, chunks in registers; None if no row fits.

    The ring's chunks are whole; what does not fill one belongs to the tail.
    """
    chunks = ceil_divide(vocabulary, CHUNK)
    for programs, ring, tail in PLACES:
        registers = power_of_two(max(1, chunks - ring))
        if registers <= tail and registers < chunks:
            return programs, chunks - registers, registers
    return None


def reads_once(logits: Tensor, gradient: Tensor) -> bool:
    """Whether the kernel can compute this gradient: its GPU, its dtypes, and rows that fit."""
    return on_hopper(logits) and fits(logits) and fits(gradient)


def on_hopper(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9


def fits(x: Tensor) -> bool:
    """Whether rows are of 16-bit numbers, in pieces of 16 bytes, and can be held on the chip."""
    pieces = x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.shape[1] % 8 == 0
    return x.element_size() == 2 and pieces and plan(x.shape[1]) is not None


def launch_rows(
    logits: Tensor,
    targets: Tensor,
    upstream: Tensor,
    losses: Tensor,
    gradient: Tensor,
    ignore_index: int,
    z_loss: float,
) -> None:
    """The loss of every row and its gradient, which may be written over the logits."""
    rows, vocabulary = logits.shape
    programs, ring, tail = plan(vocabulary)
    launch(
        cross_entropy_kernel,
        (min(rows, programs * multiprocessors(logits.device)),),
        logits,
        targets.contiguous(),
        upstream,
        losses,
        gradient,
        rows,
        vocabulary,
        logits.stride(0) // 8,
        gradient.stride(0) // 8,
        upstream.stride(0) if upstream.ndim else 0,
        ignore_index,
        Z_LOSS=z_loss,
        RING=ring,
        TAIL=tail,
        DELAY=min(DELAY, ring),
        num_warps=WARPS,
        maxnreg=REGISTERS // (32 * WARPS * programs),
    )


def variants() -> Iterator[Variant]:
    """bfloat16 logits in the longest rows that fit."""
    pointers = {"logits": "*bf16", "targets": "*i64", "upstream": "*fp32", "losses": "*fp32"}
    integers = ("rows", "vocabulary", "logits_vectors", "gradient_vectors", "ignore_index")
    types = pointers | {"gradient": "*bf16"} | dict.fromkeys(integers, "i32")
    _, ring, tail = plan(131_072)
    constants = {"upstream_stride": 1, "Z_LOSS": 1e-4, "RING": ring, "TAIL": tail, "DELAY": DELAY}
    yield Variant(
        "loss and gradient", cross_entropy_kernel, types, constants, WARPS, capabilities=(90,)
    )


def main() -> None:
    from implementations.lab.compare import error
    from implementations.layers.cross_entropy import cross_entropy_naive

    print("a row on the chip: programs, chunks in shared memory, chunks in registers")
    for vocabulary in (8192, 32_000, 50_304, 128_256, 131_072, 151_936):
        print(f"  {vocabulary:7,}  {plan(vocabulary) or 'too long'}")
    if gpu_is_missing():
        return
    torch.manual_seed(0)
    logits = (3 * torch.randn(300, 131_072, device="cuda")).bfloat16()
    targets = torch.randint(131_072, (300,), device="cuda")
    exact = logits.double().requires_grad_()
    cross_entropy_naive(exact, targets).backward()
    losses, share = logits.new_empty(300, dtype=torch.float32), torch.tensor(1 / 300).cuda()
    launch_rows(logits, targets, share, losses, logits, -100, 0.0)
    print(f"loss of 300 rows {losses.mean():.6f}")
    print(f"  the logits, now their gradient: mean error {error(logits, exact.grad).mean:.1e}")


if __name__ == "__main__":
    main()
