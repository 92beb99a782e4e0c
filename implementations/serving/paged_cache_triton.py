"""A pass over pages in ten launches a layer, where the parts one by one take over twenty.

    stream, x  = add and norm                        one launch, of layers/rms_norm_triton.py
    q, k, v    = x · (W_q, W_k, W_v)ᵀ                one product, the matrices below one another
    q' = turned q;   pages[slot] = turned k, v       one launch, here
    heads      = q' looks at its text                two, of attention/paged_triton.py
    update     = heads · W_oᵀ
    stream, x  = add and norm
    g, e       = x · (W_gate, W_expand)ᵀ             one product
    update     = silu(g) e · W_contractᵀ             two

A pass over a few hundred tokens is as long as its kernels are many: each of them reads a megabyte
at most, which takes less time than its start and its end. Queries, keys and values leave the first
product side by side in a token's row, so that one program a token turns its queries where they lie
and writes its keys and values where they belong.

Naive   paged_cache.py: `reader` around the parts of models/decoder.py
Shapes  row [token, (head dim)]: the heads of queries, of keys, of values    pages [2, block, page,
        key_head, dim]    positions, slots [token]
Run     uv run python implementations/serving/paged_cache_triton.py
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
from torch import Tensor, nn
from torch.nn.functional import linear

from implementations.attention.positions_triton import frequencies
from implementations.lab.ahead_of_time import Variant
from implementations.layers.feed_forward_triton import swiglu_triton
from implementations.layers.rms_norm_triton import add_rms_norm_triton
from implementations.layers.row_tiles import launch, power_of_two, wide_dtype
from implementations.models.decoder import Decoder
from implementations.serving.paged_cache import Batch, PagedCache, Reader

WARPS = 2


@triton.jit
def turn_and_keep_kernel(
    row,  # pointer [token, head, dim]: queries, keys, values
    pages,  # pointer [2, slot, key_head, dim]
    positions, slots,  # pointers [token]
    frequencies,  # pointer [dim / 2]
    row_token, side,  # steps to the next token, and from the keys to the values
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One token: its queries are turned in place, its keys turned and written, its values
    written."""
    wide = frequencies.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, PAIRS)[None, :]
    inside = (head < QUERIES + 2 * KEYS) & (pair < DIM // 2)
    source = row + token * row_token + head * DIM + pair
    first = tl.load(source, inside, 0.0).to(wide)
    second = tl.load(source + DIM // 2, inside, 0.0).to(wide)
    angle = tl.load(positions + token).to(wide) * tl.load(frequencies + pair, pair < DIM // 2, 0.0)
    cos, sin = tl.cos(angle), tl.sin(angle)
    turns = head < QUERIES + KEYS
    turned = tl.where(turns, first * cos - second * sin, first)
    other = tl.where(turns, first * sin + second * cos, second)
    is_query = inside & (head < QUERIES)
    tl.store(source, turned, is_query)
    tl.store(source + DIM // 2, other, is_query)
    kept = head - QUERIES  # the keys' heads, then the values'
    slot = tl.load(slots + token).to(tl.int64)
    target = pages + kept // KEYS * side + (slot * KEYS + kept % KEYS) * DIM + pair
    is_kept = inside & (kept >= 0)
    tl.store(target, turned, is_kept)
    tl.store(target + DIM // 2, other, is_kept)


@torch.library.custom_op("ml_studies::turn_and_keep", mutates_args=("row", "pages"))
def turn_and_keep_op(
    row: Tensor, pages: Tensor, positions: Tensor, slots: Tensor, base: float
) -> None:
    """See `turn_and_keep`."""
    key_heads, dim = pages.shape[-2:]
    heads = row.shape[1] // dim
    launch(
        turn_and_keep_kernel,
        (len(row),),
        *(row, pages, positions, slots, frequencies(dim, base, wide_dtype(row), row.device)),
        *(row.stride(0), pages.stride(0)),
        QUERIES=heads - 2 * key_heads,
        KEYS=key_heads,
        DIM=dim,
        HEADS=power_of_two(heads),
        PAIRS=power_of_two(dim // 2),
        num_warps=WARPS,
    )


def turn_and_keep(
    row: Float[Tensor, "token heads_dim"],
    pages: Float[Tensor, "2 block page key_head dim"],
    positions: Int[Tensor, " token"],
    slots: Int[Tensor, " token"],
    base: float = 10000.0,
) -> Float[Tensor, "token head dim"]:
    """The queries of a row, turned by their positions (half split) where they lie; its keys, turned
    too, and its values go to their slots.

    Raises:
        ValueError: the row does not hold the pages' key heads twice and queries besides, or has
            another dtype or device; pages or a token's numbers that are not one after another.
    """
    key_heads, dim = pages.shape[-2:]
    queries = row.shape[1] // dim - 2 * key_heads
    if row.shape[1] % dim or queries < 1:
        raise ValueError(f"no queries beside {key_heads} key heads of {dim} in {row.shape[1]}")
    if (row.dtype, row.device) != (pages.dtype, pages.device):
        given, wanted = f"{row.dtype} on {row.device}", f"{pages.dtype} on {pages.device}"
        raise ValueError(f"the row is {given}, the pages {wanted}")
    if row.stride(1) != 1 or not pages.is_contiguous():
        raise ValueError("the numbers of a token, and those of the pages, stand one after another")
    turn_and_keep_op(row, pages, positions, slots, base)
    return row[:, : queries * dim].unflatten(1, (queries, dim))


class Layer(NamedTuple):
    """The weights of a block, as the pass multiplies with them."""

    attention_norm: Tensor
    projections: Tensor
    output: Tensor
    feed_forward_norm: Tensor
    gates: Tensor
    contract: Tensor


def stack(*parts: nn.Linear) -> Float[Tensor, "output input"]:
    """One matrix that holds those of the layers, which become views of it: none is stored twice."""
    matrix = torch.cat([part.weight.data for part in parts])
    pieces = matrix.split([part.out_features for part in parts])
    for part, piece in zip(parts, pieces, strict=True):
        part.weight.data = piece
    return matrix


def reader_triton(decoder: Decoder, cache: PagedCache) -> Reader:
    """As `reader`, for a decoder of Llama's style. Its weights stay what they are, but stand below
    one another in memory: those that change later have to be changed in place.

    Raises:
        ValueError: the decoder is not of Llama's style, or has biases.
    """
    decoder.config.require_llama()
    if decoder.config.bias:
        raise ValueError("the pass adds no biases, and the decoder has some")
    layers = []
    for block in decoder.blocks:
        attention, gated = block.attention, block.feed_forward
        projections = stack(attention.query, attention.key, attention.value)
        first = block.attention_norm.weight, projections, attention.output.weight
        gates = stack(gated.gate, gated.expand)
        second = block.feed_forward_norm.weight, gates, gated.contract.weight
        layers.append(Layer(*first, *second))
    base, epsilon = decoder.config.rotary_base, decoder.config.epsilon

    def read(batch: Batch) -> Float[Tensor, "text vocabulary"]:
        stream = decoder.embedding(batch.tokens)[0]
        update = torch.zeros_like(stream)
        for layer, pages in zip(layers, cache.of(batch).layers, strict=True):
            x, stream = add_rms_norm_triton(update, stream, layer.attention_norm, epsilon)
            row = linear(x, layer.projections)
            query = turn_and_keep(row, pages.pages, batch.positions, batch.slots, base)
            update = linear(pages.look(query).flatten(1), layer.output)
            x, stream = add_rms_norm_triton(update, stream, layer.feed_forward_norm, epsilon)
            gate, expand = linear(x, layer.gates).chunk(2, -1)
            update = linear(swiglu_triton(gate, expand), layer.contract)
        x, _ = add_rms_norm_triton(update, stream, decoder.norm.weight, epsilon)
        return decoder.logits(x[batch.ends])

    return read


def variants() -> Iterator[Variant]:
    """SmolLM2's heads in bfloat16."""
    types = {"row": "*bf16", "pages": "*bf16", "positions": "*i64", "slots": "*i64"}
    types |= {"frequencies": "*fp32", "row_token": "i32", "side": "i64"}
    constants = {"QUERIES": 9, "KEYS": 3, "DIM": 64, "HEADS": 16, "PAIRS": 32}
    yield Variant(
        "turn and keep", turn_and_keep_kernel, types, constants, WARPS, capabilities=(90,)
    )


@torch.no_grad()
def main() -> None:
    from implementations.models.decoder import DecoderConfig
    from implementations.serving.block_manager import BlockManager
    from implementations.serving.paged_cache import reader
    from implementations.serving.scheduler import Chunk, Request

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config, page = DecoderConfig(97, 64, 2, 4, 80, positions=64, key_value_heads=2), 4
    decoder, manager = Decoder(config).to(device), BlockManager(20, page)
    chunks = []
    for length in (3, 3, 10):
        request = Request(torch.randint(97, (length,)).tolist(), length)
        request.text, _ = manager.allocate(request.tokens)
        chunks.append(Chunk(request, 0, length))
    batch = Batch.of(chunks, page, torch.device(device))
    naive = reader(decoder, PagedCache(decoder, 20, page))(batch)
    fast = reader_triton(decoder, PagedCache(decoder, 20, page))(batch)
    apart = (fast - naive).abs().max()
    print(f"three texts on {device}: largest difference of a logit from the parts' {apart:.1e}")


if __name__ == "__main__":
    main()
