"""FlashAttention: the same output as the equation, without ever holding the matrix of scores.

    summary of some keys   m = max s,   l = Σ exp(s - m),   a = Σ exp(s - m) value
    two summaries merged   m = max(m₁, m₂),   l = e^(m₁-m) l₁ + e^(m₂-m) l₂,   a likewise
    after the last key     output = a / l,   log_sum_exp L = m + log l

    backward, weights made anew   P = exp(scale query keyᵀ - L),   Δ = rowsum(dO ∘ O) - dL
    dS = P ∘ (dO valueᵀ - Δ),   dvalue = Pᵀ dO,   dquery = scale dS key,   dkey = scale dSᵀ query

A small fast memory holds a tile of queries while tiles of keys and values stream past it, and the
other way round in the backward. What must outlive a tile is one number a query, L. All heads take
each step together here; on a GPU every head and query tile is a program of its own.

Every tile is carried by a `Traffic`, which counts the bytes: pass one in to measure the algorithm.

Paper   Dao et al. 2022, arXiv:2205.14135; loop order of Dao 2023, arXiv:2307.08691
Shapes  query [..., head, query, dim]    key, value [..., key_head, key, dim]
Run     uv run python implementations/attention/flash.py
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from implementations.attention_basic import Mask, attention_naive
from implementations.lab.compare import error


@dataclass
class Traffic:
    """Bytes that went from large memory to small (read) and back (written), tile by tile."""

    read: int = 0
    written: int = 0

    @property
    def moved(self) -> int:
        return self.read + self.written

    def load(self, x: Float[Tensor, "*batch row dim"], rows: slice) -> Float[Tensor, "..."]:
        """Some rows of `x`, widened to float32 on arrival."""
        tile = x[..., rows, :]
        self.read += tile.nbytes
        return tile.to(torch.promote_types(x.dtype, torch.float32))

    def store(self, x: Float[Tensor, "*batch row dim"], rows: slice, tile: Tensor) -> None:
        """Write a tile to some rows of `x`, rounded to its dtype."""
        x[..., rows, :] = tile
        self.written += x[..., rows, :].nbytes


class Summary(NamedTuple):
    """What attention has to remember of the keys that it has read, for each query."""

    maximum: Float[Tensor, "*batch query 1"]
    total: Float[Tensor, "*batch query 1"]
    weighted: Float[Tensor, "*batch query value_dim"]


def summarize(
    scores: Float[Tensor, "*batch query key"], value: Float[Tensor, "*values key value_dim"]
) -> Summary:
    """The summary of one tile of keys, hidden ones having a score of -inf."""
    maximum = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - finite(maximum))
    return Summary(maximum, weights.sum(-1, keepdim=True), weights @ value)


def merge(left: Summary, right: Summary) -> Summary:
    """The summary of both sets of keys: associative, and a summary of hidden keys adds nothing."""
    maximum = torch.maximum(left.maximum, right.maximum)
    left_scale = torch.exp(left.maximum - finite(maximum))
    right_scale = torch.exp(right.maximum - finite(maximum))
    return Summary(
        maximum,
        left.total * left_scale + right.total * right_scale,
        left.weighted * left_scale + right.weighted * right_scale,
    )


def finite(maximum: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """What to subtract from scores: nothing where all are -inf, because -inf - -inf is NaN."""
    return maximum.masked_fill(maximum == -torch.inf, 0.0)


@dataclass(frozen=True)
class Plan:
    """Which query sees which key, and in what tiles. Query i stands at key i + keys - queries."""

    queries: int
    keys: int
    causal: bool
    window: int | None
    query_tile: int
    key_tile: int

    def query_tiles(self) -> Iterator[slice]:
        return tiles(0, self.queries, self.query_tile)

    def key_tiles(self) -> Iterator[slice]:
        return tiles(0, self.keys, self.key_tile)

    def keys_of(self, rows: slice) -> Iterator[slice]:
        """Tiles of the keys that some query of the rows sees; the others are never read."""
        shift = self.keys - self.queries
        start = 0 if self.window is None else max(0, rows.start + shift - self.window + 1)
        stop = rows.stop + shift if self.causal else self.keys
        return tiles(start, stop, self.key_tile)

    def queries_of(self, columns: slice) -> Iterator[slice]:
        """Tiles of the queries that see some key of the columns."""
        shift = self.keys - self.queries
        start = max(0, columns.start - shift) if self.causal else 0
        last = self.keys if self.window is None else columns.stop - 1 + self.window
        stop = min(self.queries, last - shift)
        return tiles(start, stop, self.query_tile)

    def hidden(
        self, rows: slice, columns: slice, device: torch.device
    ) -> Bool[Tensor, "query key"]:
        """True where a query of the rows must not see a key of the columns."""
        query = torch.arange(rows.start, rows.stop, device=device) + self.keys - self.queries
        distance = query[:, None] - torch.arange(columns.start, columns.stop, device=device)
        hidden = distance < 0
        return hidden if self.window is None else hidden | (distance >= self.window)

    def scores(
        self,
        query: Float[Tensor, "*batch query dim"],
        key: Float[Tensor, "*keys key dim"],
        rows: slice,
        columns: slice,
        scale: float,
    ) -> Float[Tensor, "*batch query key"]:
        """Scores of one tile of queries with one tile of keys, -inf where hidden."""
        scores = scale * (query @ key.mT)
        if not self.causal:
            return scores
        return scores.masked_fill(self.hidden(rows, columns, scores.device), -torch.inf)


def tiles(start: int, stop: int, size: int) -> Iterator[slice]:
    """Slices of `size` rows; the last one may be shorter."""
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))


class FlashAttention(torch.autograd.Function):
    """query [..., key_head, group, query, dim]; key, value [..., key_head, 1, key, dim]."""

    @staticmethod
    def forward(ctx, query, key, value, scale: float, plan: Plan, traffic: Traffic):
        wide = torch.promote_types(query.dtype, torch.float32)
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sum_exp = query.new_empty(*query.shape[:-1], 1, dtype=wide)
        for rows in plan.query_tiles():
            q = traffic.load(query, rows)
            nothing = q.new_full((*q.shape[:-1], 1), -torch.inf)
            summary = Summary(
                nothing, torch.zeros_like(nothing), q.new_zeros(*q.shape[:-1], value.shape[-1])
            )
            for columns in plan.keys_of(rows):
                k, v = traffic.load(key, columns), traffic.load(value, columns)
                summary = merge(summary, summarize(plan.scores(q, k, rows, columns, scale), v))
            maximum, total, weighted = summary
            sees_nothing = total == 0
            traffic.store(output, rows, weighted / total.masked_fill(sees_nothing, 1.0))
            traffic.store(log_sum_exp, rows, maximum + total.log())
        ctx.save_for_backward(query, key, value, output, log_sum_exp)
        ctx.scale, ctx.plan, ctx.traffic = scale, plan, traffic
        return output, log_sum_exp

    @staticmethod
    @once_differentiable
    def backward(ctx, d_output, d_log_sum_exp):
        query, key, value, output, log_sum_exp = ctx.saved_tensors
        scale, plan, traffic = ctx.scale, ctx.plan, ctx.traffic
        delta = torch.empty_like(log_sum_exp)
        for rows in plan.query_tiles():
            do, o = traffic.load(d_output, rows), traffic.load(output, rows)
            dl = traffic.load(d_log_sum_exp, rows)
            traffic.store(delta, rows, (do * o).sum(-1, keepdim=True) - dl)
        # Every key tile adds to d_query, so it stays wide until the last one has.
        d_query = torch.zeros_like(query, dtype=delta.dtype)
        d_key, d_value = torch.empty_like(key), torch.empty_like(value)
        for columns in plan.key_tiles():
            k, v = traffic.load(key, columns), traffic.load(value, columns)
            dk, dv = torch.zeros_like(k), torch.zeros_like(v)
            for rows in plan.queries_of(columns):
                q, do = traffic.load(query, rows), traffic.load(d_output, rows)
                log_sum, row = traffic.load(log_sum_exp, rows), traffic.load(delta, rows)
                weights = torch.exp(plan.scores(q, k, rows, columns, scale) - finite(log_sum))
                d_scores = weights * (do @ v.mT - row)
                dv += (weights.mT @ do).sum(-3, keepdim=True)  # all heads of a group read this key
                dk += scale * (d_scores.mT @ q).sum(-3, keepdim=True)
                dq = traffic.load(d_query, rows)
                traffic.store(d_query, rows, dq + scale * d_scores @ k)
            traffic.store(d_key, columns, dk)
            traffic.store(d_value, columns, dv)
        return d_query.to(query.dtype), d_key, d_value, None, None, None


def flash_attention(
    query: Float[Tensor, "*batch head query dim"],
    key: Float[Tensor, "*batch key_head key dim"],
    value: Float[Tensor, "*batch key_head key value_dim"],
    **options,
) -> Float[Tensor, "*batch head query value_dim"]:
    """softmax(query keyᵀ · scale) value; options and errors are those of the function below."""
    return flash_attention_with_log_sum_exp(query, key, value, **options)[0]


def flash_attention_with_log_sum_exp(
    query: Float[Tensor, "*batch head query dim"],
    key: Float[Tensor, "*batch key_head key dim"],
    value: Float[Tensor, "*batch key_head key value_dim"],
    *,
    causal: bool = False,
    window: int | None = None,
    mask: Mask | None = None,
    scale: float | None = None,
    query_tile: int = 64,
    key_tile: int = 64,
    traffic: Traffic | None = None,
) -> tuple[Float[Tensor, "*batch head query value_dim"], Float[Tensor, "*batch head query"]]:
    """The output and, in float32 or wider, log Σ exp(scores) of every query; both have gradients.

    A query that sees no key, all its scores being -inf, gets zeros and -inf.

    Args:
        causal: query i sees key j only if j <= i + keys - queries; the last query sees them all.
        window: how many keys a causal query sees at most, its own among them.
        mask: refused unless None; it is here because models pass one.
        scale: factor on the scores, dim ** -0.5 unless given.
        query_tile, key_tile: rows of a tile.
        traffic: counts the bytes moved, in the backward too.

    Raises:
        ValueError: as `check_flash_inputs`, or a tile is empty.
    """
    check_flash_inputs(query, key, value, causal=causal, window=window, mask=mask)
    if min(query_tile, key_tile) < 1:
        raise ValueError(f"a tile holds at least one row, got {query_tile} and {key_tile}")
    plan = Plan(query.shape[-2], key.shape[-2], causal, window, query_tile, key_tile)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    grouped = query.unflatten(-3, (key.shape[-3], -1))
    one_a_group = key[..., None, :, :], value[..., None, :, :]
    output, log_sum_exp = FlashAttention.apply(
        grouped, *one_a_group, scale, plan, Traffic() if traffic is None else traffic
    )
    return output.flatten(-4, -3), log_sum_exp.flatten(-4, -3).squeeze(-1)


def check_flash_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    mask: Tensor | None = None,
) -> None:
    """What every form of flash attention asks of its arguments, the fast ones included.

    Raises:
        ValueError: a sentence with the rule and the value.
    """
    if mask is not None:
        raise ValueError("flash attention hides keys by causal and window, and takes no mask")
    q, k, v = query.shape, key.shape, value.shape
    if min(len(q), len(k), len(v)) < 3:
        raise ValueError(f"inputs are [..., heads, positions, dim], got {named(q, k, v)}")
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        dtypes = f"{query.dtype}, {key.dtype}, {value.dtype}"
        raise ValueError(f"query, key and value share one floating-point dtype, got {dtypes}")
    if not query.device == key.device == value.device:
        devices = f"{query.device}, {key.device}, {value.device}"
        raise ValueError(f"query, key and value are on one device, got {devices}")
    (*batch, heads, queries, dim), (*key_batch, key_heads, keys, key_dim) = q, k
    *value_batch, value_heads, values, value_dim = v
    if not batch == key_batch == value_batch:
        raise ValueError(f"query, key and value have the same batch sizes, got {named(q, k, v)}")
    if dim != key_dim:
        raise ValueError(f"a query and a key have the same dim, got {named(q, k, v)}")
    if (key_heads, keys) != (value_heads, values):
        raise ValueError(f"every key has a value, got {named(q, k, v)}")
    if 0 in (heads, queries, dim, key_heads, keys, value_dim):
        raise ValueError(f"there is at least one head, position and dim, got {named(q, k, v)}")
    if heads % key_heads:
        raise ValueError(f"{key_heads} key heads cannot be shared evenly by {heads} query heads")
    if causal and queries > keys:
        raise ValueError(f"causal attention needs queries <= keys, got {queries} > {keys}")
    if window is not None and not causal:
        raise ValueError("a window looks back from its query: causal must be True")
    if window is not None and window < 1:
        raise ValueError(f"a window holds at least the query's own token, got {window}")


def named(query: torch.Size, key: torch.Size, value: torch.Size) -> str:
    """The shapes, for an error's sentence."""
    return f"query {list(query)}, key {list(key)}, value {list(value)}"


def main() -> None:
    torch.manual_seed(0)
    print("float32, 4 heads, dim 64, tiles of 64; bytes between large and small memory")
    for length in (256, 512, 1024, 2048):
        inputs = [torch.randn(1, 4, length, 64) for _ in range(3)]
        traffic = Traffic()
        output = flash_attention(*inputs, traffic=traffic)
        wrong = error(output, attention_naive(*(x.double() for x in inputs))).largest
        matrix = 4 * length**2 * 4
        print(
            f"  {length:5} tokens: error {wrong:.1e}, {traffic.moved / 2**20:6.1f} MiB moved; "
            f"the scores are {matrix / 2**20:4.0f} MiB each time they are touched"
        )


if __name__ == "__main__":
    main()
