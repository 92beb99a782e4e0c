"""The pipeline of flash_hopper.py one step at a time: five kernels, each with one more overlap.

    in turn             copy K, Q Kᵀ, softmax, copy V, P V, and again    two warpgroups together
    copies ahead        a producer fills a ring of slots meanwhile       two warpgroups together
    two consumers       the same by each warpgroup for itself            one beside the other
    products in flight  Q Kᵀ of a block and P V of the block before run over the softmax
    persistent          the same with as many programs as multiprocessors, tile by tile

The sixth step is flash_hopper.py itself: equal work for every program, and all that a user needs.
Here queries are as many as keys and a multiple of 128, dim is 128, and there is no gradient: what
is left is the order of things. A tile is 128 queries of one head; the longest tiles come first.

Paper   Shah et al. 2024, arXiv:2407.08608
Naive   pipeline.py: the same steps as a model that counts cycles
Legend  q k v o: tiles of query, key, value, output    s: scores    p: weights not yet divided
Run     uv run python implementations/attention/pipeline_hopper.py
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from implementations.attention.flash_hopper_forward import (
    KEYS,
    LOWEST,
    STAGES,
    fetch,
    make_barriers,
    make_buffers,
    softmax,
    tma_load,
    tma_store,
)
from implementations.attention.flash_triton import LOG2_E
from implementations.attention.hopper_tiles import (
    block_types,
    gpu_is_missing,
    multiprocessors,
    tile_at,
)
from implementations.lab.ahead_of_time import Variant

SIZE = gl.constexpr(128)  # queries of a tile
DIM = gl.constexpr(128)


@gluon.jit
def tile_of(number, length, CAUSAL: gl.constexpr):
    """Batch times head, first query, and how many blocks of keys a tile sees."""
    a_head = length // SIZE
    first = (a_head - 1 - number % a_head) * SIZE
    blocks = length // KEYS
    if CAUSAL:
        blocks = first // KEYS + 1
    return number // a_head, first, blocks


@gluon.jit
def start_scores(q, k):
    """Issue Q Kᵀ."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, KEYS, 16])
    nothing = gl.full([q.shape[0], KEYS], 0.0, gl.float32, LAYOUT)
    k = k.reshape([KEYS, DIM]).permute((1, 0))
    return warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)


@gluon.jit
def start_output(p, o, v):
    """Issue O + P V, P from the registers."""
    return warpgroup_mma(p, v.reshape([KEYS, DIM]), o, is_async=True)


@gluon.jit
def rounded(p, o):
    """Weights as the left side of a product with the layout of `o`: they stay where they are."""
    return gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, o.type.layout, 2))


@gluon.jit
def hide_future(s, own):
    """On the diagonal: row r of a tile sees its first r + 1 keys; `own` is the first row."""
    row = own + gl.arange(0, s.shape[0], gl.SliceLayout(1, s.type.layout))
    column = gl.arange(0, KEYS, gl.SliceLayout(0, s.type.layout))
    return gl.where(column[None, :] <= row[:, None], s, float("-inf"))


@gluon.jit
def rescale(o, factor):
    return o * gl.convert_layout(factor, gl.SliceLayout(1, o.type.layout))[:, None]


@gluon.jit
def nothing_seen(ROWS: gl.constexpr):
    """Maximum, sum and output before the first block."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, KEYS, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, DIM, 16])
    peak = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, LAYOUT))
    mass = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, LAYOUT))
    return peak, mass, gl.full([ROWS, DIM], 0.0, gl.float32, OUTPUT)


@gluon.jit
def write(output, plane, row, o, mass, buffer):
    """Divide by the sums and let the copy engine carry the rows out."""
    o = rescale(o, 1.0 / mass)
    tma.store_wait(0)  # the tile before has left the buffer
    buffer.reshape(o.shape).store(o.to(buffer.dtype))
    fence_async_shared()
    tma_store(output, [0, plane, row, 0], buffer)


@gluon.jit
def copy_now(descriptor, plane, row, buffer, arrived, phase):
    """Fill a buffer, when all warps have come here, and wait until it is full."""
    mbarrier.expect(arrived, descriptor.block_type.nbytes)
    tma_load(descriptor, [0, plane, row, 0], arrived, buffer)
    mbarrier.wait(arrived, phase)


@gluon.jit
def in_turn_kernel(query, key, value, output, tiles, length, scale, CAUSAL: gl.constexpr):
    """One tile a program, one thing at a time: FlashAttention as it is written in flash.py."""
    q_buffer, k_buffer = make_buffers(query, 1).index(0), make_buffers(key, 1).index(0)
    v_buffer, o_buffer = make_buffers(value, 1).index(0), make_buffers(output, 1).index(0)
    barriers = make_barriers(3, 1)
    fence_async_shared()
    plane, first, blocks = tile_of(gl.program_id(0), length, CAUSAL)
    peak, mass, o = nothing_seen(SIZE)
    copy_now(query, plane, first, q_buffer, barriers.index(0), 0)
    q = q_buffer.reshape([SIZE, DIM])
    for block in range(blocks):
        row = (blocks - 1 - block) * KEYS
        copy_now(key, plane, row, k_buffer, barriers.index(1), block & 1)
        s = warpgroup_mma_wait(0, deps=(start_scores(q, k_buffer),))
        if CAUSAL:  # noqa: SIM102  one is decided when compiled, one when run
            if block == 0:
                s = hide_future(s, 0)
        p, peak, mass, shrink = softmax(s, peak, mass, scale)
        o = rescale(o, shrink)
        copy_now(value, plane, row, v_buffer, barriers.index(2), block & 1)
        o = warpgroup_mma_wait(0, deps=(start_output(rounded(p, o), o, v_buffer),))
    write(output, plane, first, o, mass, o_buffer)
    tma.store_wait(0)


@gluon.jit
def copies_in_turn_kernel(query, key, value, output, tiles, length, scale, CAUSAL: gl.constexpr):
    """No step of the ladder: the copies of the kernel above, to learn how long they are waited for.

    Launch no more programs than multiprocessors: several would fit on one, and hide each other.
    """
    k_buffer, v_buffer = make_buffers(key, 1).index(0), make_buffers(value, 1).index(0)
    barriers = make_barriers(2, 1)
    fence_async_shared()
    plane, _, blocks = tile_of(gl.program_id(0), length, CAUSAL)
    for block in range(blocks):
        row = (blocks - 1 - block) * KEYS
        copy_now(key, plane, row, k_buffer, barriers.index(0), block & 1)
        copy_now(value, plane, row, v_buffer, barriers.index(1), block & 1)


@gluon.jit
def producer(query, key, value, buffers, barriers, tiles, length, CAUSAL: gl.constexpr):
    """Ask for all that the consumers will need, as early as there is room for it."""
    q_buffers, k_buffers, v_buffers, _ = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    CONSUMERS: gl.constexpr = q_buffers.shape[0]
    ROWS: gl.constexpr = SIZE // CONSUMERS
    count = 0
    for number in range(gl.program_id(0), tiles, gl.num_programs(0)):
        turn = number // gl.num_programs(0)
        plane, first, blocks = tile_of(number, length, CAUSAL)
        for g in gl.static_range(CONSUMERS):
            fetch(query, 0, plane, first + g * ROWS, q_buffers, q_full, q_empty, g, turn & 1)
        for block in range(blocks):
            row = (blocks - 1 - block) * KEYS
            slot, phase = count % STAGES, count // STAGES & 1
            fetch(key, 0, plane, row, k_buffers, k_full, k_empty, slot, phase)
            fetch(value, 0, plane, row, v_buffers, v_full, v_empty, slot, phase)
            count += 1


@gluon.jit
def in_turn(
    output, buffers, barriers, tiles, length, scale, CAUSAL: gl.constexpr, OWN: gl.constexpr
):
    """Product, softmax, product, of one consumer's rows; the copies are somebody else's."""
    q_buffers, k_buffers, v_buffers, o_buffers = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    ROWS: gl.constexpr = q_buffers.shape[3]
    q = q_buffers.index(OWN).reshape([ROWS, DIM])
    count = 0
    for number in range(gl.program_id(0), tiles, gl.num_programs(0)):
        turn = number // gl.num_programs(0)
        plane, first, blocks = tile_of(number, length, CAUSAL)
        peak, mass, o = nothing_seen(ROWS)
        mbarrier.wait(q_full.index(OWN), turn & 1)
        for block in range(blocks):
            slot, phase = count % STAGES, count // STAGES & 1
            mbarrier.wait(k_full.index(slot), phase)
            s = warpgroup_mma_wait(0, deps=(start_scores(q, k_buffers.index(slot)),))
            mbarrier.arrive(k_empty.index(slot), count=1)
            if CAUSAL:  # noqa: SIM102  one is decided when compiled, one when run
                if block == 0:
                    s = hide_future(s, OWN * ROWS)
            p, peak, mass, shrink = softmax(s, peak, mass, scale)
            o, p = rescale(o, shrink), rounded(p, o)
            mbarrier.wait(v_full.index(slot), phase)
            o = warpgroup_mma_wait(0, deps=(start_output(p, o, v_buffers.index(slot)),))
            mbarrier.arrive(v_empty.index(slot), count=1)
            count += 1
        mbarrier.arrive(q_empty.index(OWN), count=1)
        write(output, plane, first + OWN * ROWS, o, mass, o_buffers.index(OWN))
    tma.store_wait(0)


@gluon.jit
def in_flight(
    output, buffers, barriers, tiles, length, scale, CAUSAL: gl.constexpr, OWN: gl.constexpr
):
    """The same, with two products issued at once: the wait is for the first of them only."""
    q_buffers, k_buffers, v_buffers, o_buffers = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    ROWS: gl.constexpr = q_buffers.shape[3]
    q = q_buffers.index(OWN).reshape([ROWS, DIM])
    count = 0
    for number in range(gl.program_id(0), tiles, gl.num_programs(0)):
        turn = number // gl.num_programs(0)
        plane, first, blocks = tile_of(number, length, CAUSAL)
        peak, mass, o = nothing_seen(ROWS)
        mbarrier.wait(q_full.index(OWN), turn & 1)
        mbarrier.wait(k_full.index(count % STAGES), count // STAGES & 1)
        s = warpgroup_mma_wait(0, deps=(start_scores(q, k_buffers.index(count % STAGES)),))
        mbarrier.arrive(k_empty.index(count % STAGES), count=1)
        if CAUSAL:
            s = hide_future(s, OWN * ROWS)
        p, peak, mass, shrink = softmax(s, peak, mass, scale)
        p = rounded(p, o)
        for _ in range(1, blocks):
            last, last_phase = count % STAGES, count // STAGES & 1
            count += 1
            slot, phase = count % STAGES, count // STAGES & 1
            mbarrier.wait(k_full.index(slot), phase)
            s_flying = start_scores(q, k_buffers.index(slot))
            mbarrier.wait(v_full.index(last), last_phase)
            o_flying = start_output(p, o, v_buffers.index(last))
            s = warpgroup_mma_wait(1, deps=(s_flying,))
            mbarrier.arrive(k_empty.index(slot), count=1)
            p, peak, mass, shrink = softmax(s, peak, mass, scale)
            o = warpgroup_mma_wait(0, deps=(o_flying,))
            mbarrier.arrive(v_empty.index(last), count=1)
            o, p = rescale(o, shrink), rounded(p, o)
        mbarrier.arrive(q_empty.index(OWN), count=1)
        last, last_phase = count % STAGES, count // STAGES & 1
        mbarrier.wait(v_full.index(last), last_phase)
        o = warpgroup_mma_wait(0, deps=(start_output(p, o, v_buffers.index(last)),))
        mbarrier.arrive(v_empty.index(last), count=1)
        count += 1
        write(output, plane, first + OWN * ROWS, o, mass, o_buffers.index(OWN))
    tma.store_wait(0)


@gluon.jit
def copies(
    output, buffers, barriers, tiles, length, scale, CAUSAL: gl.constexpr, OWN: gl.constexpr
):
    """No step of the ladder: empty the slots as they come, to learn how fast that can be."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    count = 0
    for number in range(gl.program_id(0), tiles, gl.num_programs(0)):
        turn = number // gl.num_programs(0)
        _, _, blocks = tile_of(number, length, CAUSAL)
        mbarrier.wait(q_full.index(OWN), turn & 1)
        for _ in range(blocks):
            slot, phase = count % STAGES, count // STAGES & 1
            mbarrier.wait(k_full.index(slot), phase)
            mbarrier.arrive(k_empty.index(slot), count=1)
            mbarrier.wait(v_full.index(slot), phase)
            mbarrier.arrive(v_empty.index(slot), count=1)
            count += 1
        mbarrier.arrive(q_empty.index(OWN), count=1)


@gluon.jit
def consumer(
    output, buffers, barriers, tiles, length, scale,
    CAUSAL: gl.constexpr, OWN: gl.constexpr, WORK: gl.constexpr,
):  # fmt: skip
    WORK(output, buffers, barriers, tiles, length, scale, CAUSAL, OWN)


@gluon.jit
def ring_kernel(
    query, key, value, output,  # descriptors [1, batch times head, row, dim]
    tiles, length, scale,
    CAUSAL: gl.constexpr, CONSUMERS: gl.constexpr, WORK: gl.constexpr,
):  # fmt: skip
    """A producer, and one consumer of eight warps or two of four."""
    buffers = (
        make_buffers(query, CONSUMERS), make_buffers(key, STAGES),
        make_buffers(value, STAGES), make_buffers(output, CONSUMERS),
    )  # fmt: skip
    barriers = (
        make_barriers(CONSUMERS, 1), make_barriers(CONSUMERS, 1),
        make_barriers(STAGES, 1), make_barriers(STAGES, CONSUMERS),
        make_barriers(STAGES, 1), make_barriers(STAGES, CONSUMERS),
    )  # fmt: skip
    fence_async_shared()
    if CONSUMERS == 1:
        gl.warp_specialize([
            (producer, (query, key, value, buffers, barriers, tiles, length, CAUSAL)),
            (consumer, (output, buffers, barriers, tiles, length, scale, CAUSAL, 0, WORK)),
        ], [8], [240])  # fmt: skip
    else:
        gl.warp_specialize([
            (producer, (query, key, value, buffers, barriers, tiles, length, CAUSAL)),
            (consumer, (output, buffers, barriers, tiles, length, scale, CAUSAL, 0, WORK)),
            (consumer, (output, buffers, barriers, tiles, length, scale, CAUSAL, 1, WORK)),
        ], [4, 4], [240, 240])  # fmt: skip


class Schedule(NamedTuple):
    """How a step of the ladder is launched."""

    consumers: int
    """none: the program is one group of eight warps, without a producer"""
    work: Any
    """what a consumer does, or the whole program"""
    persistent: bool = False


KERNELS = {
    "in turn": Schedule(0, in_turn_kernel),
    "copies ahead": Schedule(1, in_turn),
    "two consumers": Schedule(2, in_turn),
    "products in flight": Schedule(2, in_flight),
    "persistent": Schedule(2, in_flight, persistent=True),
}
# These write no output: they are there to be timed.
COPIES = Schedule(2, copies)
COPIES_IN_TURN = Schedule(0, copies_in_turn_kernel, persistent=True)


def attention_step(
    step: Schedule,
    query: Float[Tensor, "batch head query dim"],
    key: Float[Tensor, "batch head query dim"],
    value: Float[Tensor, "batch head query dim"],
    *,
    causal: bool = False,
) -> Float[Tensor, "batch head query dim"]:
    """softmax(query keyᵀ / √dim) value, by one step of the ladder.

    Raises:
        ValueError: shapes that the kernels do not know, or another GPU.
    """
    batch, heads, length, dim = query.shape
    alike = all(x.shape == query.shape and x.dtype == torch.bfloat16 for x in (query, key, value))
    if not alike or dim != DIM.value or length % SIZE.value or not length:
        shapes = ", ".join(f"{list(x.shape)} {x.dtype}" for x in (query, key, value))
        raise ValueError(
            f"the steps take three bfloat16 tensors of one shape, with lengths that are multiples "
            f"of {SIZE.value} and dim {DIM.value}, got {shapes}"
        )
    if not query.is_cuda:
        raise ValueError(f"the kernels run on a Hopper GPU, got {query.device}")
    programs = multiprocessors(query.device)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    rows = SIZE.value // max(1, step.consumers)
    tiles = batch * heads * length // SIZE.value
    planes = [x.contiguous().view(1, -1, length, dim) for x in (query, key, value, output)]
    blocks = map(tile_at, planes, (rows, KEYS.value, KEYS.value, rows))
    arguments = (*blocks, tiles, length, dim**-0.5 * LOG2_E.value)
    grid = (min(tiles, programs) if step.persistent else tiles,)
    with torch.cuda.device_of(query):  # Triton launches on the current GPU
        if step.consumers:
            ring_kernel[grid](*arguments, CAUSAL=causal, CONSUMERS=step.consumers, WORK=step.work)
        else:
            step.work[grid](*arguments, CAUSAL=causal, num_warps=8)
    return output


def variants() -> Iterator[Variant]:
    yield variant("products in flight", True)


def variant(name: str, causal: bool) -> Variant:
    """One step, ready to be compiled where there is no GPU."""
    step = KERNELS[name]
    rows = SIZE.value // max(1, step.consumers)
    counts = {"query": rows, "key": KEYS.value, "value": KEYS.value, "output": rows}
    types = block_types(counts, DIM.value, gl.bfloat16)
    types |= {"tiles": "i32", "length": "i32", "scale": "fp32"}
    constants: dict[str, Any] = {"CAUSAL": causal}
    label = name + ", causal" * causal
    if not step.consumers:
        return Variant(label, step.work, types, constants, warps=8, capabilities=(90,))
    constants |= {"CONSUMERS": step.consumers, "WORK": step.work}
    return Variant(label, ring_kernel, types, constants, capabilities=(90,))


def main() -> None:
    from implementations.attention_basic import attention_naive
    from implementations.lab.compare import allowed, error

    if gpu_is_missing():
        return
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 8, 2048, 128, device="cuda").bfloat16() for _ in range(3))
    exact = attention_naive(query.double(), key.double(), value.double(), causal=True)
    limit = allowed(attention_naive(query, key, value, causal=True), exact)
    print(f"causal, {list(query.shape)}, bfloat16: mean error, allowed {limit.mean:.1e}")
    for name, step in KERNELS.items():
        seen = error(attention_step(step, query, key, value, causal=True), exact)
        print(f"  {name:18}  {seen.mean:.1e}")


if __name__ == "__main__":
    main()
