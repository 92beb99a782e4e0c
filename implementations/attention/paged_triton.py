"""Paged attention in Triton: the keys of a text are split among programs, and the parts combined.

    part i     O_i = softmax(S_i) V_i   and   L_i = log Σ exp(S_i)   of the i-th share of the keys
    together   O   = Σ e^(L_i - max L) O_i / Σ e^(L_i - max L)

Decoding reads every key for one query: it is as fast as memory. What fills a GPU is then not the
queries but the keys: each program takes a share of one text's keys for all query heads that share
them, packed as rows of one tile, so that a key is read once. Which page holds a tile's keys is
read from the table inside the loop, one step ahead of them.

The number of shares follows from sizes alone, never from what a tensor holds, and the parts are
combined in order: nothing waits for the GPU, a CUDA graph can be captured, and the bits are the
same every time. Several queries a text (a prompt, or a guess to be verified) are more rows: the
same kernel reads the pages, no gathering comes before it.

Paper   Dao et al. 2023, "Flash-Decoding for long-context inference" (the split);
        Kwon et al. 2023, arXiv:2309.06180 (the pages)
Naive   paged.py
Shapes  query, output [batch, head, query, dim]    key_pages, value_pages [block, page, key_head,
        dim]    block_table [batch, entry] and cache_seqlens [batch], int32
Legend  q k o: tiles of query, key, output
Run     uv run python implementations/attention/paged_triton.py
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated

import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from implementations.attention.flash_triton import LOG2_E, LOWEST, check_kernel_inputs
from implementations.attention.paged import check_table
from implementations.lab.ahead_of_time import Variant


@triton.jit
def share_kernel(
    query,  # pointer [batch, head, query, dim]
    key, value,  # pointers [block, page, key_head, dim]
    block_table, cache_seqlens,  # pointers [batch, entry], [batch]
    output, log_sum_exp,  # pointers [share, batch, query, head, dim] and without dim
    q_batch, q_head, q_row, k_block, k_token, k_head, v_block, v_token, v_head, table_row,
    texts, queries, heads, group, tiles, shares,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One share of a text's keys, for a tile of the rows that read them: query by query, the heads
    of one group."""
    plane, share = tl.program_id(0), tl.program_id(1)
    key_heads = heads // group
    tile, key_head, text = plane % tiles, plane // tiles % key_heads, plane // tiles // key_heads
    length = tl.load(cache_seqlens + text)
    row, d = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    head, number = key_head * group + row % group, row // group
    real = (row < queries * group)[:, None] & (d < DIM)[None, :]
    last = length - 1
    if CAUSAL:
        last = length - queries + number
        length = min(length, max(0, length - queries + 1 + (tile * ROWS + ROWS - 1) // group))
    each = tl.cdiv(tl.cdiv(length, shares), KEYS) * KEYS
    start = share * each
    stop = min(length, start + each)

    at = text.to(tl.int64) * q_batch + head.to(tl.int64) * q_head + number.to(tl.int64) * q_row
    q = tl.load(query + at[:, None] + d[None, :], mask=real, other=0.0)
    table = block_table + text.to(tl.int64) * table_row
    key += key_head.to(tl.int64) * k_head + d[None, :]
    value += key_head.to(tl.int64) * v_head + d[None, :]
    o = tl.zeros([ROWS, PADDED], WIDE)
    peak = tl.full([ROWS], LOWEST, WIDE)
    mass = tl.zeros([ROWS], WIDE)
    for first in tl.range(start, stop, KEYS):
        column = first + tl.arange(0, KEYS)
        inside = column < stop
        if PAGE % KEYS == 0:  # one page holds the tile: one entry is read
            block, place = tl.load(table + first // PAGE), first % PAGE + tl.arange(0, KEYS)
        else:
            block, place = tl.load(table + column // PAGE, mask=inside, other=0), column % PAGE
        block, place = block.to(tl.int64), place.to(tl.int64)
        wanted = inside[:, None] & (d < DIM)[None, :]  # beyond may be NaN, which no weight silences
        k = tl.load(key + (block * k_block + place * k_token)[:, None], mask=wanted, other=0.0)
        scores = tl.dot(q, k.T, input_precision="ieee", out_dtype=WIDE) * SCALE
        visible = inside[None, :]
        if CAUSAL:
            visible = visible & (column[None, :] <= last[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        p = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        mass = mass * shrink + tl.sum(p, 1)
        v = tl.load(value + (block * v_block + place * v_token)[:, None], mask=wanted, other=0.0)
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision="ieee", out_dtype=WIDE)
        peak = new_peak
    nothing = mass == 0.0
    mass = tl.where(nothing, 1.0, mass)
    to = ((share * texts + text).to(tl.int64) * queries + number) * heads + head
    tl.store(
        output + to[:, None] * DIM + d[None, :],
        (o / mass[:, None]).to(output.dtype.element_ty),
        mask=real,
    )
    total = tl.where(nothing, float("-inf"), peak + tl.log2(mass))
    tl.store(log_sum_exp + to, total, mask=row < queries * group)


@triton.jit
def combine_kernel(
    parts, log_sum_exp,  # pointers [share, row, dim], [share, row]; the sums to base 2
    output,  # pointer [row, dim]
    rows, shares,
    DIM: tl.constexpr, SHARES: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """One row of the output: the parts weighed by how much of the softmax each one saw."""
    row = tl.program_id(0).to(tl.int64)
    share, d = tl.arange(0, SHARES), tl.arange(0, PADDED)
    at = share * rows + row
    total = tl.load(log_sum_exp + at, mask=share < shares, other=float("-inf"))
    peak = tl.maximum(tl.max(total), LOWEST)  # a row that saw nothing has no peak
    weight = tl.exp2(total - peak)
    wanted = (share < shares)[:, None] & (d < DIM)[None, :]
    part = tl.load(parts + at[:, None] * DIM + d[None, :], mask=wanted, other=0.0)
    mass = tl.sum(weight)
    o = tl.sum(part * weight[:, None], 0) / tl.where(mass == 0.0, 1.0, mass)
    tl.store(output + row * DIM + d, o.to(output.dtype.element_ty), mask=d < DIM)


class Tiles(NamedTuple):
    """What one program works on, and how."""

    rows: int
    keys: int
    warps: int
    stages: int


def tiles_for(rows: int, dim: int, page: int, itemsize: int) -> Tiles:
    """Tiles for so many rows (queries times heads of a group) that read the same keys."""
    if itemsize > 2:  # no tensor cores without rounding: small tiles that fit
        return Tiles(16, 32, 4, 1)
    if rows <= 16 and dim <= 64 and page == 16:
        # A page a step and one warp: more programs at once. 244 texts of 32 to 760 keys, 9 heads of
        # 64 over 3 on an H200: 28 µs, with 64 keys and 4 warps 33, with 32 keys and 1 or 2 warps 33
        # or more.
        return Tiles(16, 16, 1, 5)
    if rows <= 16:
        return Tiles(16, 64, 4, 3) if dim <= 128 else Tiles(16, 32, 4, 3)
    return Tiles(64, 64, 4, 2)


LEAST_KEYS = 256  # of a share: below that a program's start and end cost more than its keys
MOST_SHARES = 128


def share_count(planes: int, keys: int, multiprocessors: int) -> int:
    """Into how many shares the keys are split so that every multiprocessor has work, and the last
    programs to end are a small part of all."""
    wanted = -(-8 * multiprocessors // planes)
    return max(1, min(wanted, keys // LEAST_KEYS, MOST_SHARES))


def multiprocessors(x: Tensor) -> int:
    """Of the GPU that holds x; the interpreter runs one program after the other."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


@torch.library.custom_op("ml_studies::attention_paged", mutates_args=())
def forward(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    causal: bool,
    scale: float,
    shares: int | None,
) -> Tensor:
    """The output; see `attention_paged_triton`."""
    (texts, heads, queries, dim), (_, page, key_heads, _) = query.shape, key_pages.shape
    group = heads // key_heads
    tiles = tiles_for(queries * group, dim, page, query.element_size())
    across = triton.cdiv(queries * group, tiles.rows)
    planes = texts * key_heads * across
    if shares is None:
        shares = share_count(planes, block_table.shape[1] * page, multiprocessors(query))
    exact = torch.promote_types(query.dtype, torch.float32)
    output = query.new_empty(texts, queries, heads, dim)
    parts = output if shares == 1 else output.new_empty(shares, *output.shape, dtype=exact)
    log_sum_exp = output.new_empty(shares, *output.shape[:-1], dtype=exact)
    padded = max(16, triton.next_power_of_2(dim))
    with torch.cuda.device_of(query):  # Triton launches on the current GPU
        share_kernel[(planes, shares)](
            *(query, key_pages, value_pages, block_table, cache_seqlens, parts, log_sum_exp),
            *query.stride()[:3],
            *key_pages.stride()[:3],
            *value_pages.stride()[:3],
            block_table.stride(0),
            *(texts, queries, heads, group, across, shares),
            SCALE=scale * LOG2_E.value,
            CAUSAL=causal and queries > 1,  # one query stands at the last key and sees them all
            PAGE=page,
            DIM=dim,
            ROWS=tiles.rows,
            KEYS=tiles.keys,
            PADDED=padded,
            WIDE=tl.float64 if query.dtype == torch.float64 else tl.float32,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        if shares > 1:
            rows = texts * queries * heads
            combine_kernel[(rows,)](
                *(parts, log_sum_exp, output, rows, shares),
                DIM=dim,
                SHARES=triton.next_power_of_2(shares),
                PADDED=padded,
            )
    return output.transpose(1, 2)


@forward.register_fake
def _(query, *others):
    batch, heads, queries, dim = query.shape
    return query.new_empty(batch, queries, heads, dim).transpose(1, 2)


def attention_paged_triton(
    query: Float[Tensor, "batch head query dim"],
    key_pages: Float[Tensor, "block page key_head dim"],
    value_pages: Float[Tensor, "block page key_head dim"],
    *,
    block_table: Int[Tensor, "batch entry"],
    cache_seqlens: Int[Tensor, " batch"],
    causal: bool = False,
    scale: float | None = None,
    shares: int | None = None,
    check: bool = False,
) -> Float[Tensor, "batch head query dim"]:
    """Attention of each text's queries to the keys of that text, read where they lie.

    For decoding: it has no gradient. What the tables hold is not looked at, because that would wait
    for the GPU: a length beyond its table or a block that does not exist reads memory of others.

    Args:
        block_table: which pages hold a text, in order; what stands beyond its length is not read.
        cache_seqlens: how many keys each text has, those of the queries among them. A text without
            keys gets zeros.
        causal: the last query stands at the text's last key; a query before the first key gets
            zeros.
        scale: factor on the scores, dim ** -0.5 unless given; each value is compiled anew.
        shares: into how many parts each text's keys are split; chosen from the sizes unless given.
            A text's bits depend on it: a fixed number makes them the same in every batch.
        check: look at the tables first, on the host, as `check_table`.

    Raises:
        ValueError: another shape, dtype or device than the kernels take, or what `check` finds.
    """
    check_pages(query, key_pages, value_pages)
    check_tables(query, block_table, cache_seqlens)
    if shares is not None and not 1 <= shares <= MOST_SHARES:
        raise ValueError(f"keys are split into 1 to {MOST_SHARES} shares, got {shares}")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    check_kernel_inputs(query, value_pages, scale)
    if check:
        check_table(block_table, cache_seqlens, key_pages)
    tables = (block_table, cache_seqlens)
    return forward(query, key_pages, value_pages, *tables, causal, scale, shares)


def check_pages(query: Tensor, key_pages: Tensor, value_pages: Tensor) -> None:
    """Raise ValueError unless the pages can serve the query."""
    inputs = {"query": query, "key_pages": key_pages, "value_pages": value_pages}
    for name, x in inputs.items():
        if x.ndim != 4:
            raise ValueError(f"{name} has four dimensions, got {list(x.shape)}")
        if (x.dtype, x.device) != (query.dtype, query.device):
            got, wanted = f"{x.dtype} on {x.device}", f"{query.dtype} on {query.device}"
            raise ValueError(f"{name} is {got}, the query {wanted}")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"the numbers of a head are neighbours, {name} has {x.stride()}")
    if key_pages.shape != value_pages.shape or key_pages.shape[-1] != query.shape[-1]:
        shapes = f"{list(query.shape)}, {list(key_pages.shape)} and {list(value_pages.shape)}"
        raise ValueError(f"query, keys and values share one dim, and the pages one shape: {shapes}")
    if key_pages.numel() == 0:
        raise ValueError(f"there is at least one page with a key, got {list(key_pages.shape)}")
    if query.shape[1] % key_pages.shape[2]:
        heads, key_heads = query.shape[1], key_pages.shape[2]
        raise ValueError(f"{key_heads} key heads cannot be shared evenly by {heads} query heads")


def check_tables(query: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> None:
    """Raise ValueError unless the tables have the form that is wanted; their contents are not
    read."""
    tables = {"block_table": (block_table, 2), "cache_seqlens": (cache_seqlens, 1)}
    for name, (table, dimensions) in tables.items():
        if table.dtype != torch.int32:
            raise ValueError(f"{name} is torch.int32, got {table.dtype}")
        if table.device != query.device:
            raise ValueError(f"{name} is on {table.device}, the query on {query.device}")
        if table.ndim != dimensions or len(table) != len(query):
            texts, shape = len(query), list(table.shape)
            raise ValueError(f"{name} has a row for each of {texts} texts, got {shape}")
        if table.stride(-1) != 1 and table.shape[-1] > 1:
            raise ValueError(f"the entries of {name} are neighbours, got {table.stride()}")


def variants() -> Iterator[Variant]:
    """Decoding from several pages a tile and from one, and a prompt, in bfloat16."""
    shapes = (16, 16, 128, 90), (16, 16, 64, 80), (64, 64, 128, 90)
    for rows, page, dim, gpu in shapes:
        tiles = tiles_for(rows, dim, page, 2)
        constants = {"SCALE": dim**-0.5 * LOG2_E.value, "CAUSAL": rows > 16, "PAGE": page}
        constants |= {"DIM": dim, "ROWS": tiles.rows, "KEYS": tiles.keys, "PADDED": dim}
        constants |= {"WIDE": tl.float32, "tiles": 1} if rows == 16 else {"WIDE": tl.float32}
        types = {name: "i32" for name in share_kernel.arg_names if name not in constants}
        types |= dict.fromkeys(("query", "key", "value"), "*bf16")
        types |= dict.fromkeys(("block_table", "cache_seqlens"), "*i32")
        types |= {"output": "*fp32" if rows == 16 else "*bf16", "log_sum_exp": "*fp32"}
        name = f"dim {dim}, pages of {page}, tiles of {tiles.rows} x {tiles.keys}"
        yield Variant(name, share_kernel, types, constants, tiles.warps, tiles.stages, 0, (gpu,))


def main() -> None:
    from implementations.attention.paged import attention_paged
    from implementations.lab.compare import allowed, error

    torch.manual_seed(0)
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float16)
    page, heads, key_heads, dim = 16, 8, 2, 64
    lengths = torch.tensor([3, 100, 257], dtype=torch.int32, device=device)
    table = torch.randperm(60, device=device)[:51].reshape(3, 17).int()
    pages = torch.randn(2, 60, page, key_heads, dim, dtype=dtype, device=device)
    query = torch.randn(3, heads, 1, dim, dtype=dtype, device=device)
    tables = {"block_table": table, "cache_seqlens": lengths}
    print(f"texts of {lengths.tolist()} keys, {dtype}, {'on the GPU' if gpu else 'interpreted'}")
    exact = attention_paged(query.double(), *pages.double(), **tables)
    limit = allowed(attention_paged(query, *pages, **tables), exact)
    for shares in (1, 2, 5):
        seen = error(attention_paged_triton(query, *pages, **tables, shares=shares), exact)
        print(f"  {shares} shares: largest error {seen.largest:.1e}, allowed {limit.largest:.1e}")


if __name__ == "__main__":
    main()
