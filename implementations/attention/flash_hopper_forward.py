"""FlashAttention's forward for Hopper in Gluon: copies, products, exponentials at the same time.

    copies      K2 Q  V2  K1    V1      K0      V0                      1 warpgroup: the producer
    products    | Q K2 |  Q K1, P2 V2  |  Q K0, P1 V1  |  P0 V0 |       issued by the consumers
    softmax            |P2|    P1      |      P0       |        | O     2 or 3 warpgroups: consumers
                               time ->

A tile is 64 queries a consumer, of one head. Blocks of 128 keys and values come from the last to
the first, so that a mask is met at once. The product of block j's scores and that of block j - 1's
weights with its values are in flight together; softmax j runs while the second goes on, and while
the other consumer's products do. Scores and weights stay in registers all the time.

Every buffer has two barriers. The copy engine completes `full` when its bytes are there; each
consumer arrives at `empty` when it has read them. A counter that never restarts gives a buffer's
slot, count % STAGES, and the phase of its barriers, count // STAGES & 1. A wait for the phase
before the first one passes: fresh buffers are empty.

The grid is as large as the GPU, and a program fetches its next tile while it ends the last. When
causal, tiles are long and short: a program takes tile i of all, then the i-th from the end, and so
on, which is the same work for each and needs no counter.

Paper   Shah et al. 2024, arXiv:2407.08608
Naive   flash.py. Step by step from the simplest form: pipeline_hopper.py. Launch: flash_hopper.py
Legend  q k v o: tiles of query, key, value, output    s: scores    p: weights not yet divided
Run     uv run python implementations/attention/flash_hopper_forward.py
"""

import math
from collections.abc import Iterator

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from implementations.attention.hopper_tiles import block_types
from implementations.lab.ahead_of_time import Variant

ROWS = gl.constexpr(64)  # queries of a consumer: one warpgroup's matrix instruction
KEYS = gl.constexpr(128)  # keys of a block
STAGES = gl.constexpr(2)  # blocks of keys on the chip
LOWEST = gl.constexpr(-3.0e38)  # where a maximum begins: -inf would make inf - inf
LN_2 = gl.constexpr(math.log(2))

# The names before Triton 3.9, and since.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def make_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Barriers that turn to their next phase after so many arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def make_buffers(descriptor, COUNT: gl.constexpr):
    """Room on the chip for so many blocks of what the descriptor describes."""
    block: gl.constexpr = descriptor.block_type.shape
    shape: gl.constexpr = [COUNT] + block  # noqa: RUF005  Gluon does not know a star
    return gl.allocate_shared_memory(descriptor.dtype, shape, descriptor.layout)


@gluon.jit
def has_tile(turn, sizes, PAIRED: gl.constexpr):
    """Whether this program has a `turn`-th tile."""
    tiles = sizes[0]
    if PAIRED:
        return 2 * (gl.program_id(0) + turn // 2 * gl.num_programs(0)) + turn % 2 < tiles
    return gl.program_id(0) + turn * gl.num_programs(0) < tiles


@gluon.jit
def tile_of(turn, sizes, SIZE: gl.constexpr, CAUSAL: gl.constexpr, PAIRED: gl.constexpr):
    """Batch times head, first query, and how many blocks of keys its `turn`-th tile sees."""
    tiles, _, _, queries, keys = sizes
    if PAIRED:
        place = gl.program_id(0) + turn // 2 * gl.num_programs(0)
        if turn % 2 == 1:
            place = tiles - 1 - place
    else:
        place = gl.program_id(0) + turn * gl.num_programs(0)
    a_head = gl.cdiv(queries, SIZE)
    first = place % a_head * SIZE
    seen = keys
    if CAUSAL:
        seen = gl.minimum(keys, first + SIZE + keys - queries)
    return place // a_head, first, gl.cdiv(seen, KEYS)


@gluon.jit
def fetch(descriptor, batch, head, row, buffers, full, empty, slot, phase):
    """When the buffer is empty, ask the copy engine to fill it."""
    mbarrier.wait(empty.index(slot), phase ^ 1)
    mbarrier.expect(full.index(slot), descriptor.block_type.nbytes)
    tma_load(descriptor, [batch, head, row, 0], full.index(slot), buffers.index(slot))


@gluon.jit
def producer(
    query, key, value, buffers, barriers, sizes, CAUSAL: gl.constexpr, PAIRED: gl.constexpr
):
    """Ask for all that the consumers will need, as early as there is room for it."""
    q_buffers, k_buffers, v_buffers, _ = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    _, heads, group, _, _ = sizes
    CONSUMERS: gl.constexpr = q_buffers.shape[0]
    count = 0
    turn = 0
    while has_tile(turn, sizes, PAIRED):
        plane, first, blocks = tile_of(turn, sizes, CONSUMERS * ROWS, CAUSAL, PAIRED)
        batch, head = plane // heads, plane % heads
        for block in range(blocks):
            row = (blocks - 1 - block) * KEYS
            slot, phase = count % STAGES, count // STAGES & 1
            fetch(key, batch, head // group, row, k_buffers, k_full, k_empty, slot, phase)
            if block == 0:
                for g in gl.static_range(CONSUMERS):
                    fetch(
                        query, batch, head, first + g * ROWS, q_buffers, q_full, q_empty, g,
                        turn & 1,
                    )  # fmt: skip
            fetch(value, batch, head // group, row, v_buffers, v_full, v_empty, slot, phase)
            count += 1
        turn += 1


@gluon.jit
def start_scores(q, k_buffers, k_full, count):
    """Issue Q Kᵀ with a block of keys that has arrived."""
    DIM: gl.constexpr = q.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    mbarrier.wait(k_full.index(count % STAGES), count // STAGES & 1)
    k = k_buffers.index(count % STAGES).reshape([KEYS, DIM])
    nothing = gl.full([ROWS, KEYS], 0.0, gl.float32, LAYOUT)
    return warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def start_output(p, o, v_buffers, v_full, count):
    """Issue O + P V with a block of values that has arrived."""
    mbarrier.wait(v_full.index(count % STAGES), count // STAGES & 1)
    v = v_buffers.index(count % STAGES).reshape([KEYS, o.shape[1]])
    return warpgroup_mma(p, v, o, is_async=True)


@gluon.jit
def hide(s, first, last_seen, seen_by_all):
    """Scores -inf for the keys after the last that a query sees; most blocks hide none."""
    if first + KEYS > seen_by_all:
        column = first + gl.arange(0, KEYS, gl.SliceLayout(0, s.type.layout))
        s = gl.where(column[None, :] <= last_seen[:, None], s, float("-inf"))
    return s


@gluon.jit
def softmax(s, peak, mass, scale):
    """Weights to base 2 under the new maximum, maximum, sum, and what the older sums shrink by."""
    new_peak = gl.maximum(peak, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - new_peak[:, None])
    shrink = gl.exp2(peak - new_peak)
    return p, new_peak, mass * shrink + gl.sum(p, 1), shrink


@gluon.jit
def consumer(
    output, log_sum_exp, buffers, barriers, sizes, scale,
    CAUSAL: gl.constexpr, PAIRED: gl.constexpr, OWN: gl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of rows OWN * 64 .. OWN * 64 + 63 of every tile."""
    q_buffers, k_buffers, v_buffers, o_buffers = buffers
    _, heads, _, queries, keys = sizes
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    CONSUMERS: gl.constexpr = q_buffers.shape[0]
    DIM: gl.constexpr = q_buffers.shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)  # P stays in its registers
    S_ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    narrow: gl.constexpr = q_buffers.dtype
    q = q_buffers.index(OWN).reshape([ROWS, DIM])
    o_buffer = o_buffers.index(OWN)
    count = 0
    turn = 0
    while has_tile(turn, sizes, PAIRED):
        plane, first, blocks = tile_of(turn, sizes, CONSUMERS * ROWS, CAUSAL, PAIRED)
        first += OWN * ROWS
        row = first + gl.arange(0, ROWS, S_ROWS)
        last_seen = row * 0 + keys - 1
        seen_by_all = keys
        if CAUSAL:
            last_seen = row + keys - queries
            seen_by_all = first + keys - queries + 1
        peak = gl.full([ROWS], LOWEST, gl.float32, S_ROWS)
        mass = gl.full([ROWS], 0.0, gl.float32, S_ROWS)
        o = gl.full([ROWS, DIM], 0.0, gl.float32, OUTPUT)

        mbarrier.wait(q_full.index(OWN), turn & 1)
        s = warpgroup_mma_wait(0, deps=(start_scores(q, k_buffers, k_full, count),))
        mbarrier.arrive(k_empty.index(count % STAGES), count=1)
        s = hide(s, (blocks - 1) * KEYS, last_seen, seen_by_all)
        p, peak, mass, shrink = softmax(s, peak, mass, scale)
        weights = gl.convert_layout(p.to(narrow), WEIGHTS)
        for block in range(1, blocks):
            count += 1
            s_flying = start_scores(q, k_buffers, k_full, count)
            o_flying = start_output(weights, o, v_buffers, v_full, count - 1)
            s = warpgroup_mma_wait(1, deps=(s_flying,))
            mbarrier.arrive(k_empty.index(count % STAGES), count=1)
            if CAUSAL:
                s = hide(s, (blocks - 1 - block) * KEYS, last_seen, seen_by_all)
            p, peak, mass, shrink = softmax(s, peak, mass, scale)
            o = warpgroup_mma_wait(0, deps=(o_flying,))
            mbarrier.arrive(v_empty.index((count - 1) % STAGES), count=1)
            o = o * gl.convert_layout(shrink, O_ROWS)[:, None]
            weights = gl.convert_layout(p.to(narrow), WEIGHTS)
        mbarrier.arrive(q_empty.index(OWN), count=1)
        o = warpgroup_mma_wait(0, deps=(start_output(weights, o, v_buffers, v_full, count),))
        mbarrier.arrive(v_empty.index(count % STAGES), count=1)
        count += 1

        nothing = mass == 0.0  # every score was -inf
        total = gl.where(nothing, float("-inf"), (peak + gl.log2(mass)) * LN_2)
        place = log_sum_exp + plane.to(gl.int64) * queries + row
        gl.store(place, total, mask=row < queries)
        mass = gl.where(nothing, 1.0, mass)
        o = o * (1.0 / gl.convert_layout(mass, O_ROWS))[:, None]
        tma.store_wait(0)  # the tile before has left the buffer
        o_buffer.reshape([ROWS, DIM]).store(o.to(narrow))
        fence_async_shared()
        tma_store(output, [plane // heads, plane % heads, first, 0], o_buffer)
        turn += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles", "heads", "group", "queries", "keys"])
def forward_kernel(
    query, key, value, output,  # descriptors [batch, head, row, dim]
    log_sum_exp,  # pointer [batch, head, query]
    tiles, heads, group, queries, keys, scale,
    CAUSAL: gl.constexpr, PAIRED: gl.constexpr, CONSUMERS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Shared memory, barriers, and one program for the producer and each consumer."""
    sizes = (tiles, heads, group, queries, keys)
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
    if CONSUMERS == 2:
        gl.warp_specialize([
            (producer, (query, key, value, buffers, barriers, sizes, CAUSAL, PAIRED)),
            (consumer, (output, log_sum_exp, buffers, barriers, sizes, scale, CAUSAL, PAIRED, 0)),
            (consumer, (output, log_sum_exp, buffers, barriers, sizes, scale, CAUSAL, PAIRED, 1)),
        ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (producer, (query, key, value, buffers, barriers, sizes, CAUSAL, PAIRED)),
            (consumer, (output, log_sum_exp, buffers, barriers, sizes, scale, CAUSAL, PAIRED, 0)),
            (consumer, (output, log_sum_exp, buffers, barriers, sizes, scale, CAUSAL, PAIRED, 1)),
            (consumer, (output, log_sum_exp, buffers, barriers, sizes, scale, CAUSAL, PAIRED, 2)),
        ], [4, 4, 4], [REGISTERS, REGISTERS, REGISTERS])  # fmt: skip


def variants() -> Iterator[Variant]:
    for dim, causal in ((64, True), (128, False), (128, True)):
        yield variant(dim, causal, gl.bfloat16)
    yield variant(64, True, gl.float16, consumers=3, registers=160)


def variant(
    dim: int, causal: bool, dtype: gl.dtype, consumers: int = 2, registers: int = 240
) -> Variant:
    rows = {"query": ROWS, "key": KEYS, "value": KEYS, "output": ROWS}
    types = block_types({name: count.value for name, count in rows.items()}, dim, dtype)
    types |= {"log_sum_exp": "*fp32"}
    types |= dict.fromkeys(("tiles", "heads", "group", "queries", "keys"), "i32")
    types |= {"scale": "fp32"}
    constants = {"CAUSAL": causal, "PAIRED": causal}
    constants |= {"CONSUMERS": consumers, "REGISTERS": registers}
    label = f"forward, dim {dim}, {dtype}" + ", causal" * causal
    return Variant(label, forward_kernel, types, constants, capabilities=(90,))


def main() -> None:
    from implementations.lab.ahead_of_time import cost

    print("registers at launch, bytes spilled, matrix instructions; without a GPU")
    for variant in variants():
        seen = cost(variant, 90)
        print(f"  {variant.name:32} {seen.registers} {seen.spilled} {seen.wgmma}")


if __name__ == "__main__":
    main()
