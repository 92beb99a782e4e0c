"""Cross-entropy with its gradient on Hopper in Gluon: a row of logits is read once.

    first walk     on a chunk that has arrived on the chip: maximum and sum of powers
    second walk    its gradient goes to memory, and the same chunk of the program's next row is
                   asked for in its place

Naive   cross_entropy.py
Run     uv run python implementations/layers/cross_entropy_hopper.py
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from implementations.attention.hopper_tiles import multiprocessors
from implementations.lab.ahead_of_time import Variant
from implementations.layers.row_tiles import ceil_divide, launch, power_of_two

WARPS = 16
DELAY = 6
CHUNK = 32 * WARPS * 8
LOG2_E = gl.constexpr(math.log2(math.e))

# The names before Triton 3.9, and since.
copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def request(ring, slot, source, lane, wanted):
    """Ask for a chunk, if it is wanted, in any case as one group."""
    CHUNK: gl.constexpr = ring.shape[1] * ring.shape[2] * ring.shape[3]
    copy(ring.index(slot), source + slot * CHUNK + lane, mask=wanted)
    async_copy.commit_group()


@gluon.jit
def join(value, maximum, total):
    """Every thread's maximum, in powers of two, and its sum of powers relative to it."""
    value = value.to(gl.float32)
    largest = gl.max(gl.max(value, axis=2, keep_dims=True), axis=0, keep_dims=True) * LOG2_E
    largest = gl.maximum(maximum, largest)
    base = gl.where(largest == float("-inf"), 0.0, largest)
    powers = gl.exp2(value * LOG2_E - base)
    powers = gl.sum(gl.sum(powers, axis=2, keep_dims=True), axis=0, keep_dims=True)
    return largest, total * gl.exp2(maximum - base) + powers


@gluon.jit
def slopes(value, weight, binary, wanted):
    """The gradient but for the target's own, in the logits' dtype; zeros if it is not wanted."""
    slope = gl.zeros_like(value)
    if wanted:
        slope = (weight * gl.exp2(value.to(gl.float32) * LOG2_E - binary)).to(value.dtype)
    return slope


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
    GROUPS: gl.constexpr,
    TAIL: gl.constexpr,
    DELAY: gl.constexpr,
):
    """A chunk is GROUPS times 8 neighbours in each thread; RING chunks live in shared memory, what
    is left of a row, TAIL times 8 numbers a thread, in registers."""
    THREADS: gl.constexpr = 32 * gl.num_warps()
    CHUNK: gl.constexpr = GROUPS * THREADS * 8
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 32, 1], [1, gl.num_warps(), 1], [2, 1, 0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    element: gl.constexpr = logits.dtype.element_ty
    group = gl.arange(0, GROUPS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    rest = gl.arange(0, TAIL, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    thread = gl.arange(0, THREADS, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    each = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    thread = thread[None, :, None] * 8
    lane = group[:, None, None] * (THREADS * 8) + thread + each[None, None, :]
    tail_vector = RING * GROUPS * THREADS * 8 + rest[:, None, None] * (THREADS * 8) + thread
    tail_lane = tail_vector + each[None, None, :]
    inside = tail_vector < vocabulary  # all eight are, or none
    ring = gl.allocate_shared_memory(element, [RING, GROUPS, THREADS, 8], FLAT)

    first, step = gl.program_id(0), gl.num_programs(0)
    logits_stride = gl.cast(logits_vectors, gl.int64) * 8
    gradient_stride = gl.cast(gradient_vectors, gl.int64) * 8
    source = logits + first * logits_stride
    target = gl.load(targets + first)
    wanted = target != ignore_index
    for slot in range(RING):
        request(ring, slot, source, lane, wanted)
    tail = gl.load(source + tail_lane, inside & wanted, float("-inf"))
    nothing = gl.full([1, THREADS, 1], float("-inf"), gl.float32, LAYOUT)
    maximum, total = join(tail, nothing, gl.zeros_like(nothing))
    async_copy.wait_group(0)
    for slot in range(RING - DELAY):
        maximum, total = join(ring.index(slot).load(LAYOUT), maximum, total)

    for row in range(first, rows, step):
        source = logits + row * logits_stride
        result = gradient + row * gradient_stride
        following = gl.minimum(row + step, rows - 1)
        next_source = logits + following * logits_stride
        next_target = gl.load(targets + following)
        next_wanted = (next_target != ignore_index) & (row + step < rows)
        known = (target >= 0) & (target < vocabulary) & wanted
        chosen = gl.load(source + target, known, float("nan")).to(gl.float32)
        factor = gl.load(upstream + row * upstream_stride).to(gl.float32)
        for slot in range(RING - DELAY, RING):
            # An empty group a chunk: there are always DELAY - 1 younger ones than the one awaited.
            async_copy.wait_group(DELAY - 1)
            async_copy.commit_group()
            maximum, total = join(ring.index(slot).load(LAYOUT), maximum, total)
        largest = gl.max(gl.max(gl.max(maximum, axis=2), axis=1), axis=0)
        base = gl.where(largest == float("-inf"), 0.0, largest)
        total = total * gl.exp2(maximum - base)
        binary = largest + gl.log2(gl.sum(gl.sum(gl.sum(total, axis=2), axis=1), axis=0))
        normalizer = binary / LOG2_E
        loss = normalizer - chosen + Z_LOSS * normalizer * normalizer
        gl.store(losses + row, gl.where(wanted, loss, 0.0))
        weight = factor * (1 + 2 * Z_LOSS * normalizer)

        last = slopes(tail, weight, binary, wanted)
        gl.store(result + tail_lane, last, inside, cache_modifier=".cs")
        tail = gl.load(next_source + tail_lane, inside & next_wanted, float("-inf"))
        for slot in range(DELAY):
            value = ring.index(slot).load(LAYOUT)
            slope = slopes(value, weight, binary, wanted)
            gl.store(result + slot * CHUNK + lane, slope, cache_modifier=".cs")
            request(ring, slot, next_source, lane, next_wanted)
        maximum, total = join(tail, nothing, gl.zeros_like(nothing))
        for slot in range(DELAY, RING):
            async_copy.wait_group(DELAY - 1)
            value = ring.index(slot).load(LAYOUT)
            arrived = ring.index(slot - DELAY).load(LAYOUT)
            slope = slopes(value, weight, binary, wanted)
            gl.store(result + slot * CHUNK + lane, slope, cache_modifier=".cs")
            request(ring, slot, next_source, lane, next_wanted)
            maximum, total = join(arrived, maximum, total)
        barrier()  # the target is written once more, by whichever thread
        own = weight * gl.exp2(chosen * LOG2_E - binary) - factor
        gl.store(result + target, own.to(element), known)
        target, wanted = next_target, next_wanted


def plan(vocabulary: int) -> tuple[int, int, int] | None:
    """Programs a multiprocessor, chunks in its ring, chunks in registers."""
    chunks = ceil_divide(vocabulary, CHUNK)
    for programs, most, widest in ((2, 13, 2), (1, 27, 8)):
        tail = power_of_two(max(1, chunks - most))
        if 0 < chunks - tail and tail <= widest:
            return programs, chunks - tail, tail
    return None


def launch_rows(
    logits: Tensor,
    targets: Tensor,
    upstream: Tensor,
    losses: Tensor,
    gradient: Tensor,
    ignore_index: int,
    z_loss: float,
) -> None:
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
        GROUPS=1,
        TAIL=tail,
        DELAY=min(DELAY, ring),
        num_warps=WARPS,
        maxnreg=65536 // (32 * WARPS * programs),
    )


def variants() -> Iterator[Variant]:
    pointers = {"logits": "*bf16", "targets": "*i64", "upstream": "*fp32", "losses": "*fp32"}
    integers = ("rows", "vocabulary", "logits_vectors", "gradient_vectors", "ignore_index")
    types = pointers | {"gradient": "*bf16"} | dict.fromkeys(integers, "i32")
    for name, warps, ring, groups, tail in (
        ("16 warps", 16, 28, 1, 4),
        ("8 warps", 8, 56, 1, 8),
        ("32 warps", 32, 14, 1, 2),
        ("50,304", 16, 12, 1, 1), ("50304b", 8, 24, 1, 1), ("50304c", 8, 23, 1, 2),
    ):
        constants = {"upstream_stride": 0, "Z_LOSS": 0.0, "RING": ring, "GROUPS": groups, "TAIL": tail, "DELAY": 6}
        yield Variant(name, cross_entropy_kernel, types, constants, warps, capabilities=(90,))
