"""FlashAttention in Triton: the tiles of flash.py, one program each, kept on the chip.

    forward    a tile of queries meets all tiles of keys:    S = scale Q Kᵀ,  m' = max(m, rowmax S),
               P = e^(S - m'),  O = e^(m - m') O + P V,  l = e^(m - m') l + rowsum P;
               in the end  O / l  and the log-sum-exp  L = m + log l
    backward   Δ = rowsum(dO ∘ O) - dL,  and everywhere  P = e^(S - L),  dS = P ∘ (dO Vᵀ - Δ)
               a tile of keys meets all tiles of queries:    dV += Pᵀ dO,  dK += scale dSᵀ Q
               a tile of queries meets all tiles of keys:    dQ += scale dS K

Scores are never written to memory. Exponentials are taken to base 2, which the hardware has, with
log2(e) folded into the scale. Only tiles that some query sees in part are masked.

The backward computes the scores twice, seven matrix products a tile pair where five would do: then
every sum has one program and one order, the gradients are the same bits every time, and on an H100
it is faster than sending dQ from the first kernel by atomic adds, which spills registers.

Paper   Dao 2023, arXiv:2307.08691
Naive   flash.py, and attention_basic.py under both
Shapes  query, output [..., head, query, dim]    key, value [..., key_head, key, dim]
Legend  q k v o: tiles of query, key, value, output    d before a name: its gradient
Run     uv run python implementations/attention/flash_triton.py
"""

import math
import os
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from implementations.attention.flash import check_flash_inputs
from implementations.lab.ahead_of_time import Variant

DIMS = (16, 32, 64, 80, 96, 128, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LOG2_E = tl.constexpr(math.log2(math.e))
# Where the running maximum begins. Not -inf: a row that has seen no key yet would be inf - inf.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def sees(position, column, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether the query that stands at key `position` sees the key `column`."""
    visible = column < keys
    if CAUSAL:
        visible = visible & (column <= position)
    if WINDOW:
        visible = visible & (column > position - window)
    return visible


@triton.jit
def key_bounds(
    first, shift, keys, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Where the keys start and stop that the queries first .. first + QUERIES - 1 see; and, between
    the two, from where to where every one of these queries sees whole tiles of keys."""
    start, stop = 0, keys
    if CAUSAL:
        stop = min(keys, first + shift + QUERIES)
    if WINDOW:
        start = max(0, first + shift - window + 1) // KEYS * KEYS
    whole, edge = start, stop // KEYS * KEYS
    if CAUSAL:
        edge = (first + shift + 1) // KEYS * KEYS
    if WINDOW:
        whole = min(stop, tl.cdiv(max(0, first + shift + QUERIES - window), KEYS) * KEYS)
        edge = max(edge, whole)
    return start, whole, edge, stop


@triton.jit
def query_bounds(
    first, shift, queries, keys, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The same for the queries that see the keys first .. first + KEYS - 1."""
    start, stop = 0, queries
    if CAUSAL:
        start = max(0, first - shift) // QUERIES * QUERIES
    if WINDOW:
        stop = min(queries, first + KEYS - 1 - shift + window)
    whole, edge = start, stop
    if CAUSAL:
        whole = min(stop, tl.cdiv(max(0, first + KEYS - 1 - shift), QUERIES) * QUERIES)
    if WINDOW:
        edge = max(whole, min(stop, max(0, first - shift + window) // QUERIES * QUERIES))
    if first + KEYS > keys:  # the last tile of keys is partly empty: mask everywhere
        whole, edge = stop, stop
    return start, whole, edge, stop


@triton.jit
def own_tile(rows, heads, REVERSED: tl.constexpr, SIZE: tl.constexpr):
    """What this program works on: batch times head, batch, head, and the first row of its tile."""
    tiles = tl.cdiv(rows, SIZE)
    plane, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if REVERSED:
        tile = tiles - 1 - tile
    return plane, plane // heads, plane % heads, tile * SIZE


@triton.jit
def attend(
    o, peak, mass, q, key, value, batch, head, start, stop, position, keys, window,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
    KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Fold the keys start .. stop - 1 into output, maximum and sum of a tile of queries."""
    for first in tl.range(start, stop, KEYS):
        k = key.load([batch, head, first, 0]).reshape(KEYS, DIM)
        scores = tl.dot(q, k.T, input_precision="ieee", out_dtype=o.dtype)
        if MASKED:
            column = first + tl.arange(0, KEYS)
            visible = sees(position[:, None], column[None, :], keys, window, CAUSAL, WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * SCALE)
        p = tl.exp2(scores * SCALE - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        mass = mass * shrink + tl.sum(p, 1)
        v = value.load([batch, head, first, 0]).reshape(KEYS, DIM)
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision="ieee", out_dtype=o.dtype)
        peak = new_peak
    return o, peak, mass


@triton.jit
def forward_kernel(
    query, key, value, output,  # descriptors [batch, head, row, dim]
    log_sum_exp,  # pointer [batch, head, query]
    heads, group, queries, keys, window,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head; when causal, those that see the most keys first."""
    plane, batch, head, first = own_tile(queries, heads, CAUSAL, QUERIES)
    row, shift = first + tl.arange(0, QUERIES), keys - queries
    bounds = key_bounds(first, shift, keys, window, CAUSAL, WINDOW, QUERIES, KEYS)
    q = query.load([batch, head, first, 0]).reshape(QUERIES, DIM)
    o = tl.zeros([QUERIES, DIM], WIDE)
    peak = tl.full([QUERIES], LOWEST, WIDE)
    mass = tl.zeros([QUERIES], WIDE)
    for part in tl.static_range(3):
        if WINDOW or part > 0:
            o, peak, mass = attend(
                o, peak, mass, q, key, value, batch, head // group, bounds[part],
                bounds[part + 1], row + shift, keys, window,
                SCALE, CAUSAL, WINDOW, part != 1, KEYS, DIM,
            )  # fmt: skip
    nothing = mass == 0.0  # every score was -inf
    mass = tl.where(nothing, 1.0, mass)
    o = (o / mass[:, None]).to(output.dtype)
    output.store([batch, head, first, 0], o.reshape(1, 1, QUERIES, DIM))
    total = tl.where(nothing, float("-inf"), peak / LOG2_E + tl.log(mass))
    tl.store(log_sum_exp + plane.to(tl.int64) * queries + row, total, mask=row < queries)


@triton.jit
def delta_kernel(
    output, d_output,  # descriptors [batch, head, query, dim]
    delta,  # pointer [batch, head, query]; holds dL at first
    heads, queries, QUERIES: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Δ = rowsum(dO ∘ O) - dL: what the softmax of each row takes off its dP."""
    plane, batch, head, first = own_tile(queries, heads, False, QUERIES)
    row = first + tl.arange(0, QUERIES)
    place = [batch, head, first, 0]
    o = output.load(place).reshape(QUERIES, DIM).to(WIDE)
    do = d_output.load(place).reshape(QUERIES, DIM).to(WIDE)
    at, inside = delta + plane.to(tl.int64) * queries + row, row < queries
    tl.store(at, tl.sum(o * do, 1) - tl.load(at, mask=inside), mask=inside)


@triton.jit
def load_sums(log_sum_exp, delta, row, queries):
    """L to base 2 and Δ of some rows; L is +inf, so that P is zero, where a row saw nothing."""
    inside = row < queries
    total = tl.load(log_sum_exp + row, mask=inside, other=float("-inf"))
    total = tl.where(total == float("-inf"), float("inf"), total * LOG2_E)
    return total, tl.load(delta + row, mask=inside, other=0.0)


@triton.jit
def gather(
    dk, dv, k, v, query, d_output, log_sum_exp, delta, batch, head, start, stop, column, shift,
    queries, keys, window,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
    QUERIES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Add what the queries start .. stop - 1 say to dK and dV of a tile of keys."""
    for first in tl.range(start, stop, QUERIES):
        row = first + tl.arange(0, QUERIES)
        q = query.load([batch, head, first, 0]).reshape(QUERIES, DIM)
        total, less = load_sums(log_sum_exp, delta, row, queries)
        p = tl.exp2(
            tl.dot(k, q.T, input_precision="ieee", out_dtype=dk.dtype) * SCALE - total[None, :]
        )
        if MASKED:
            position = row[None, :] + shift
            p = tl.where(sees(position, column[:, None], keys, window, CAUSAL, WINDOW), p, 0.0)
        do = d_output.load([batch, head, first, 0]).reshape(QUERIES, DIM)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee", out_dtype=dk.dtype)
        ds = p * (tl.dot(v, do.T, input_precision="ieee", out_dtype=dk.dtype) - less[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee", out_dtype=dk.dtype)
    return dk, dv


@triton.jit
def key_kernel(
    query, key, value, d_output, d_key, d_value,  # descriptors [batch, head, row, dim]
    log_sum_exp, delta,  # pointers [batch, head, query]
    key_heads, group, queries, keys, window,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys, summed over the query heads that share it."""
    _, batch, key_head, first = own_tile(keys, key_heads, False, KEYS)
    column, shift = first + tl.arange(0, KEYS), keys - queries
    bounds = query_bounds(first, shift, queries, keys, window, CAUSAL, WINDOW, QUERIES, KEYS)
    k = key.load([batch, key_head, first, 0]).reshape(KEYS, DIM)
    v = value.load([batch, key_head, first, 0]).reshape(KEYS, DIM)
    dk, dv = tl.zeros([KEYS, DIM], WIDE), tl.zeros([KEYS, DIM], WIDE)
    for head in tl.range(key_head * group, key_head * group + group):
        rows = (batch * key_heads * group + head).to(tl.int64) * queries
        for part in tl.static_range(3):
            if WINDOW or part < 2:
                dk, dv = gather(
                    dk, dv, k, v, query, d_output, log_sum_exp + rows, delta + rows, batch, head,
                    bounds[part], bounds[part + 1], column, shift, queries, keys, window,
                    SCALE, CAUSAL, WINDOW, part != 1, QUERIES, DIM,
                )  # fmt: skip
    dk = dk * (SCALE / LOG2_E)
    d_key.store([batch, key_head, first, 0], dk.to(d_key.dtype).reshape(1, 1, KEYS, DIM))
    d_value.store([batch, key_head, first, 0], dv.to(d_value.dtype).reshape(1, 1, KEYS, DIM))


@triton.jit
def answer(
    dq, q, do, key, value, total, less, batch, head, start, stop, position, keys, window,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
    KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Add what the keys start .. stop - 1 say to dQ of a tile of queries."""
    for first in tl.range(start, stop, KEYS):
        k = key.load([batch, head, first, 0]).reshape(KEYS, DIM)
        v = value.load([batch, head, first, 0]).reshape(KEYS, DIM)
        p = tl.exp2(
            tl.dot(q, k.T, input_precision="ieee", out_dtype=dq.dtype) * SCALE - total[:, None]
        )
        if MASKED:
            column = first + tl.arange(0, KEYS)[None, :]
            p = tl.where(sees(position[:, None], column, keys, window, CAUSAL, WINDOW), p, 0.0)
        ds = p * (tl.dot(do, v.T, input_precision="ieee", out_dtype=dq.dtype) - less[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee", out_dtype=dq.dtype)
    return dq


@triton.jit
def query_kernel(
    query, key, value, d_output, d_query,  # descriptors [batch, head, row, dim]
    log_sum_exp, delta,  # pointers [batch, head, query]
    heads, group, queries, keys, window,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries."""
    plane, batch, head, first = own_tile(queries, heads, CAUSAL, QUERIES)
    row, shift = first + tl.arange(0, QUERIES), keys - queries
    bounds = key_bounds(first, shift, keys, window, CAUSAL, WINDOW, QUERIES, KEYS)
    q = query.load([batch, head, first, 0]).reshape(QUERIES, DIM)
    do = d_output.load([batch, head, first, 0]).reshape(QUERIES, DIM)
    rows = plane.to(tl.int64) * queries
    total, less = load_sums(log_sum_exp + rows, delta + rows, row, queries)
    dq = tl.zeros([QUERIES, DIM], WIDE)
    for part in tl.static_range(3):
        if WINDOW or part > 0:
            dq = answer(
                dq, q, do, key, value, total, less, batch, head // group, bounds[part],
                bounds[part + 1], row + shift, keys, window,
                SCALE, CAUSAL, WINDOW, part != 1, KEYS, DIM,
            )  # fmt: skip
    dq = (dq * (SCALE / LOG2_E)).to(d_query.dtype)
    d_query.store([batch, head, first, 0], dq.reshape(1, 1, QUERIES, DIM))


INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


class Tiles(NamedTuple):
    """What one program works on, and how."""

    queries: int
    keys: int
    warps: int
    stages: int


# Chosen among 8 to 16 shapes each on an H100, bfloat16, 16,384 tokens of width 2048; TFLOP/s.
def forward_tiles(dim: int, itemsize: int, keys: int) -> Tiles:
    """Tiles of the forward pass."""
    if itemsize > 2:  # no tensor cores without rounding: small tiles that fit
        return Tiles(32, 32, 4, 1) if dim <= 128 else Tiles(16, 16, 4, 1)
    if dim <= 64:
        return Tiles(64, 128, 4, 2)  # 461 at 4,096 keys; 64 x 64: 428, 128 x 128: 354
    if dim <= 128 and keys < 8192:
        return Tiles(64, 64, 4, 3)  # two programs on a multiprocessor: 449 at 1,024, against 402
    if dim <= 128:
        return Tiles(128, 128, 8, 3)  # reads K and V half as often: 539 at 16,384, against 512
    return Tiles(64, 64, 4, 2)


def key_tiles(dim: int, itemsize: int) -> Tiles:
    """Tiles of the kernel that makes dK and dV."""
    if itemsize > 2:
        return Tiles(32, 32, 4, 1) if dim <= 64 else Tiles(16, 16, 4, 1)
    if dim <= 64:
        return Tiles(128, 64, 4, 2)  # 498 at 4,096 keys; 64 x 64: 376, 64 x 128: 338
    return Tiles(64, 64, 4, 2) if dim <= 128 else Tiles(32, 64, 8, 2)  # 537; 64 x 128: 480


def query_tiles(dim: int, itemsize: int) -> Tiles:
    """Tiles of the kernel that makes dQ."""
    if itemsize > 2:
        return Tiles(32, 32, 4, 1) if dim <= 64 else Tiles(16, 16, 4, 1)
    return Tiles(64, 64, 4, 2) if dim <= 128 else Tiles(64, 32, 8, 2)  # 628; 64 x 128: 325


def tile_of(x: Tensor, rows: int, dim: int) -> TensorDescriptor:
    """How the copy engine finds `rows` rows of `x`; beyond the edge it reads zeros, writes nothing.

    Coordinates are counted by dimension, so no offset can overflow 32 bits.
    """
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, dim])


def fetchable(x: Tensor) -> Tensor:
    """`x`, or a copy if the copy engine cannot follow its strides."""
    if can_follow(x.stride(), x.dtype.itemsize) and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


@lru_cache(1024)
def can_follow(strides: tuple[int, ...], itemsize: int) -> bool:
    """The copy engine wants rows that are contiguous, lie apart and begin at multiples of 16 bytes.

    Kept, because a small launch on a GPU waits for every microsecond of this.
    """
    steps = [stride * itemsize for stride in strides[:-1]]
    return all(step > 0 and step % 16 == 0 for step in steps) and strides[-1] == 1


def empty_like(x: Tensor) -> Tensor:
    """Room for a result of x's shape, in memory [batch, row, head, dim]: models join the heads
    next, and then need no copy."""
    _, heads, rows, dim = x.shape
    return x.new_empty_strided(x.shape, (rows * heads * dim, dim, heads * dim, 1))


def settings(query: Tensor, causal: bool, window: int | None, scale: float) -> dict:
    """The compile-time constants that all kernels share."""
    return {
        "CAUSAL": causal,
        "WINDOW": window is not None,
        "SCALE": scale * LOG2_E.value,
        "DIM": triton.next_power_of_2(query.shape[-1]),
        "WIDE": tl.float64 if query.dtype == torch.float64 else tl.float32,
    }


@torch.library.custom_op("ml_studies::flash_attention", mutates_args=())
def forward(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; see `flash_attention_triton` for what they are."""
    (batch, heads, queries, dim), (key_heads, keys) = query.shape, key.shape[1:3]
    output, log_sum_exp = empty_results(query, key, value, causal, window, scale)
    query, key, value = map(fetchable, (query, key, value))
    constants = settings(query, causal, window, scale)
    tiles, padded = forward_tiles(dim, query.element_size(), keys), constants["DIM"]
    with torch.cuda.device_of(query):  # Triton launches on the current GPU
        forward_kernel[(batch * heads * triton.cdiv(queries, tiles.queries),)](
            tile_of(query, tiles.queries, padded),
            tile_of(key, tiles.keys, padded),
            tile_of(value, tiles.keys, padded),
            tile_of(output, tiles.queries, padded),
            log_sum_exp,
            *(heads, heads // key_heads, queries, keys, window or 0),
            **constants,
            QUERIES=tiles.queries,
            KEYS=tiles.keys,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    return output, log_sum_exp


@forward.register_fake
def empty_results(query, key, value, causal, window, scale):
    """The results, not yet written."""
    exact = torch.promote_types(query.dtype, torch.float32)
    return empty_like(query), query.new_empty(query.shape[:3], dtype=exact)


@torch.library.custom_op("ml_studies::flash_attention_backward", mutates_args=())
def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    d_output: Tensor,
    d_log_sum_exp: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    (batch, heads, queries, dim), (key_heads, keys) = query.shape, key.shape[1:3]
    d_query, d_key, d_value = (empty_like(x) for x in (query, key, value))
    query, key, value, output, d_output = map(fetchable, (query, key, value, output, d_output))
    constants, size = settings(query, causal, window, scale), query.element_size()
    padded, exact = constants["DIM"], constants["WIDE"]
    if d_log_sum_exp is None:
        delta = torch.zeros_like(log_sum_exp)
    else:
        delta = d_log_sum_exp.clone(memory_format=torch.contiguous_format)
    rows = 64 if size == 2 else 16
    with torch.cuda.device_of(query):  # Triton launches on the current GPU
        delta_kernel[(batch * heads * triton.cdiv(queries, rows),)](
            tile_of(output, rows, padded),
            tile_of(d_output, rows, padded),
            *(delta, heads, queries),
            QUERIES=rows,
            DIM=padded,
            WIDE=exact,
        )
        sizes = (heads // key_heads, queries, keys, window or 0)
        tiles = key_tiles(dim, size)
        key_kernel[(batch * key_heads * triton.cdiv(keys, tiles.keys),)](
            tile_of(query, tiles.queries, padded),
            tile_of(key, tiles.keys, padded),
            tile_of(value, tiles.keys, padded),
            tile_of(d_output, tiles.queries, padded),
            tile_of(d_key, tiles.keys, padded),
            tile_of(d_value, tiles.keys, padded),
            *(log_sum_exp, delta, key_heads, *sizes),
            **constants,
            QUERIES=tiles.queries,
            KEYS=tiles.keys,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        tiles = query_tiles(dim, size)
        query_kernel[(batch * heads * triton.cdiv(queries, tiles.queries),)](
            tile_of(query, tiles.queries, padded),
            tile_of(key, tiles.keys, padded),
            tile_of(value, tiles.keys, padded),
            tile_of(d_output, tiles.queries, padded),
            tile_of(d_query, tiles.queries, padded),
            *(log_sum_exp, delta, heads, *sizes),
            **constants,
            QUERIES=tiles.queries,
            KEYS=tiles.keys,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    return d_query, d_key, d_value


@backward.register_fake
def _(query, key, value, *others):
    return empty_like(query), empty_like(key), empty_like(value)


def remember(ctx, inputs, output) -> None:
    query, key, value, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, *output)
    ctx.set_materialize_grads(False)


def differentiate(backward, ctx, d_output, d_log_sum_exp):
    """By some backward; an option has no gradient."""
    query, key, value, output, log_sum_exp = ctx.saved_tensors
    if d_output is None:
        d_output = torch.zeros_like(output)
    saved = (query, key, value, output, log_sum_exp)
    gradients = backward(*saved, d_output, d_log_sum_exp, *ctx.options)
    return *gradients, *(None for _ in ctx.options)


forward.register_autograd(partial(differentiate, backward), setup_context=remember)


def flash_attention_triton(
    query: Float[Tensor, "*batch head query dim"],
    key: Float[Tensor, "*batch key_head key dim"],
    value: Float[Tensor, "*batch key_head key dim"],
    **options,
) -> Float[Tensor, "*batch head query dim"]:
    """softmax(query keyᵀ · scale) value; options and errors are those of the function below."""
    return flash_attention_triton_with_log_sum_exp(query, key, value, **options)[0]


def flash_attention_triton_with_log_sum_exp(
    query: Float[Tensor, "*batch head query dim"],
    key: Float[Tensor, "*batch key_head key dim"],
    value: Float[Tensor, "*batch key_head key dim"],
    *,
    causal: bool = False,
    window: int | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "*batch head query dim"], Float[Tensor, "*batch head query"]]:
    """The output and, in float32 or wider, log Σ exp(scores) of every query; both have gradients.

    A query whose scores are all -inf gets zeros and -inf. A NaN in a query spoils its own row; a
    NaN in a key or a value spoils every query that sees it and may spoil others.

    Args:
        causal: query i sees key j only if j <= i + keys - queries; the last query sees them all.
        window: how many keys a causal query sees at most, its own among them.
        mask: refused unless None; it is here because models pass one.
        scale: factor on the scores, dim ** -0.5 unless given; each value is compiled anew.

    Raises:
        ValueError: as `check_flash_inputs`; a dim, dtype or device that the kernels do not know, an
            empty batch, or a scale that is not positive.
    """
    check_flash_inputs(query, key, value, causal=causal, window=window, mask=mask)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    check_kernel_inputs(query, value, scale)
    check_runs(query)
    if window is not None and window >= key.shape[-2]:
        window = None
    return in_four_dimensions(forward, query, key, value, causal, window, scale)


def in_four_dimensions(
    operator: Callable, query: Tensor, key: Tensor, value: Tensor, *options
) -> tuple[Tensor, Tensor]:
    """What a kernel's operator, which wants one batch dimension, says of any number of them."""
    if query.ndim == 4:
        return operator(query, key, value, *options)
    planes = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    output, log_sum_exp = operator(*planes, *options)
    return output.reshape(query.shape), log_sum_exp.reshape(query.shape[:-1])


def check_kernel_inputs(
    query: Tensor,
    value: Tensor,
    scale: float,
    dims: tuple[int, ...] = DIMS,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> None:
    """What kernels that know these dims and dtypes ask beyond `check_flash_inputs`.

    Raises:
        ValueError: a sentence with the rule and the value.
    """
    if query.dtype not in dtypes:
        known = ", ".join(map(str, dtypes))
        raise ValueError(f"the kernels compute in {known}, got {query.dtype}")
    if query.shape[-1] not in dims or value.shape[-1] != query.shape[-1]:
        got = f"{query.shape[-1]} and values of {value.shape[-1]}"
        raise ValueError(f"the kernels know one dim of {dims} for all three, got {got}")
    if query.numel() == 0:
        raise ValueError(f"there is at least one text in the batch, got {list(query.shape)}")
    if not 0 < scale < math.inf:
        raise ValueError(f"the scale is positive and finite, got {scale}")


def check_runs(query: Tensor) -> None:
    """A GPU or the interpreter, which does not know bfloat16.

    Raises:
        ValueError: a sentence with the rule and the value.
    """
    if not (query.is_cuda or INTERPRETED):
        advice = "set TRITON_INTERPRET=1 to run the kernels on a CPU, slowly"
        raise ValueError(f"the kernels run on a CUDA GPU, got {query.device}: {advice}")
    if INTERPRETED and query.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter cannot multiply bfloat16: use another dtype")


def variants() -> Iterator[Variant]:
    """The kernels as they are launched for the usual models, and where they are most strained.

    The tiles are Hopper's: on an A100 they compile and are right, and spill more.
    """
    h100, a100 = (90,), (80,)
    yield variant(forward_kernel, forward_tiles(128, 2, 1024), 128, True, False, h100)
    yield variant(forward_kernel, forward_tiles(128, 2, 16384), 128, False, False, h100)
    yield variant(forward_kernel, forward_tiles(64, 2, 1024), 64, True, True, h100)
    yield variant(forward_kernel, forward_tiles(256, 2, 1024), 256, True, False, h100)
    yield variant(forward_kernel, forward_tiles(64, 2, 1024), 64, False, False, a100, 256)
    yield variant(key_kernel, key_tiles(128, 2), 128, True, False, h100, 256)
    yield variant(key_kernel, key_tiles(64, 2), 64, True, True, h100, 256)
    yield variant(query_kernel, query_tiles(128, 2), 128, True, False, h100)
    yield variant(query_kernel, query_tiles(64, 2), 64, False, False, a100, 64)
    delta = Tiles(64, 64, 4, 3)
    yield variant(delta_kernel, delta, 128, False, False, h100)


def variant(
    kernel, tiles: Tiles, dim: int, causal: bool, window: bool, gpus: tuple, most_spilled: int = 0
) -> Variant:
    """One kernel for bfloat16, its arguments told apart by their names."""
    per_key = ("key", "value", "d_key", "d_value")
    types, constants = {}, {"QUERIES": tiles.queries, "KEYS": tiles.keys, "WIDE": tl.float32}
    constants |= {"CAUSAL": causal, "WINDOW": window, "DIM": dim, "SCALE": dim**-0.5 * LOG2_E.value}
    for name in kernel.arg_names:
        rows = tiles.keys if name in per_key else tiles.queries
        if name in (*per_key, "query", "output", "d_output", "d_query"):
            types[name] = f"tensordesc<bf16[1, 1, {rows}, {dim}]>"
        elif name in ("log_sum_exp", "delta"):
            types[name] = "*fp32"
        elif name not in constants:
            types[name] = "i32"
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    label = f"{kernel.__name__}, dim {dim}, tiles {tiles.queries} x {tiles.keys}"
    label += ", causal" * causal + ", window" * window
    return Variant(label, kernel, types, constants, tiles.warps, tiles.stages, most_spilled, gpus)


def main() -> None:
    from implementations.attention_basic import attention_naive
    from implementations.lab.compare import allowed, error

    torch.manual_seed(0)
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float16)
    shape = (1, 8, 2048, 64) if gpu else (1, 1, 200, 64)
    query, key, value = (torch.randn(shape, dtype=dtype, device=device) for _ in range(3))
    print(f"causal, {list(shape)}, {dtype}, {'on the GPU' if gpu else 'interpreted on the CPU'}")
    exact = attention_naive(query.double(), key.double(), value.double(), causal=True)
    limit = allowed(attention_naive(query, key, value, causal=True), exact)
    seen = error(flash_attention_triton(query, key, value, causal=True), exact)
    print(f"  largest error {seen.largest:.1e}, allowed {limit.largest:.1e}")
    print(f"  mean error    {seen.mean:.1e}, allowed {limit.mean:.1e}")


if __name__ == "__main__":
    main()
