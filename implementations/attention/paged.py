"""Paged attention: keys and values lie in pages anywhere in memory, and a table says where.

    token j of text b    is  pages[block_table[b, j // page], j % page]
    output               =   attention(query, keys and values in the table's order)

A text then needs no memory of its length in one piece: it grows a page at a time, and texts with
the same start can share pages (serving/block_manager.py). What a table says beyond a text's length
is never looked at, nor is the rest of its last page, whatever stands there.

Paper   Kwon et al. 2023, arXiv:2309.06180, section 4.1
Shapes  query [batch, head, query, dim]    key_pages, value_pages [block, page, key_head, dim]
        block_table [batch, entry] and cache_seqlens [batch], int32: flash-attn's names and layout
Run     uv run python implementations/attention/paged.py
"""

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from implementations.attention_basic import attention_naive


def attention_paged(
    query: Float[Tensor, "batch head query dim"],
    key_pages: Float[Tensor, "block page key_head dim"],
    value_pages: Float[Tensor, "block page key_head value_dim"],
    *,
    block_table: Int[Tensor, "batch entry"],
    cache_seqlens: Int[Tensor, " batch"],
    causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "batch head query value_dim"]:
    """Attention of each text's queries to the keys of that text, gathered and masked.

    Args:
        block_table: which pages hold a text, in order.
        cache_seqlens: how many keys each text has, those of the queries among them. A text without
            keys gets zeros.
        causal: the last query stands at the text's last key.
        scale: factor on the scores, dim ** -0.5 unless given.

    Raises:
        ValueError: as `check_table`, or causal with more queries than a text has keys.
    """
    check_table(block_table, cache_seqlens, key_pages)
    check_table(block_table, cache_seqlens, value_pages)
    queries = query.shape[-2]
    if causal and (cache_seqlens < queries).any():
        fewest = cache_seqlens.min().item()
        raise ValueError(f"causal attention needs queries <= keys, got {queries} > {fewest}")
    key = gather_pages(key_pages, block_table, cache_seqlens)
    value = gather_pages(value_pages, block_table, cache_seqlens)
    last = cache_seqlens[:, None].expand(-1, queries) - 1  # the last key each query sees
    if causal:
        last = last - torch.arange(queries - 1, -1, -1, device=last.device)
    visible = torch.arange(key.shape[-2], device=last.device) <= last[..., None]
    mask = rearrange(visible, "batch query key -> batch 1 query key")
    return attention_naive(query, key, value, mask=mask, scale=scale)


def gather_pages(
    pages: Float[Tensor, "block page key_head dim"],
    block_table: Int[Tensor, "batch entry"],
    cache_seqlens: Int[Tensor, " batch"],
) -> Float[Tensor, "batch key_head key dim"]:
    """Every text's keys in order, filled up with zeros to the longest text.

    Zeros, because what stands beyond may be NaN, which a weight of zero would not silence.
    """
    page, longest = pages.shape[1], int(cache_seqlens.max()) if len(cache_seqlens) else 0
    inside = within(cache_seqlens, longest)
    entries = block_table[:, : -(-longest // page)]
    used = within(-(-cache_seqlens // page), entries.shape[1])
    gathered = pages[entries.where(used, 0).long()]
    tokens = rearrange(gathered, "batch entry page head dim -> batch head (entry page) dim")
    return tokens[:, :, :longest].where(inside[:, None, :, None], 0.0)


def within(lengths: Int[Tensor, " batch"], most: int) -> Bool[Tensor, "batch most"]:
    """True for the first `lengths` of each row."""
    return torch.arange(most, device=lengths.device) < lengths[:, None]


def check_table(
    block_table: Int[Tensor, "batch entry"],
    cache_seqlens: Int[Tensor, " batch"],
    pages: Float[Tensor, "block page key_head dim"],
) -> None:
    """Raise ValueError unless the entries that are used name pages that exist, each text's once.

    Two texts may share a page. Reads the table on the host: a kernel's caller checks when a table
    is made, not in every layer.
    """
    for name, tensor in (("block_table", block_table), ("cache_seqlens", cache_seqlens)):
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} is torch.int32, got {tensor.dtype}")
        if tensor.device != pages.device:
            raise ValueError(f"{name} is on {tensor.device}, the pages are on {pages.device}")
    if cache_seqlens.shape != block_table.shape[:1]:
        lengths, texts = list(cache_seqlens.shape), len(block_table)
        raise ValueError(f"{texts} texts need as many cache_seqlens, got the shape {lengths}")
    blocks, page = pages.shape[:2]
    room = block_table.shape[1] * page
    for text, length in enumerate(cache_seqlens.tolist()):
        if not 0 <= length <= room:
            raise ValueError(f"text {text} has length {length}, its table has room for {room}")
        used = block_table[text, : -(-length // page)].tolist()
        wrong = [block for block in used if not 0 <= block < blocks]
        if wrong:
            raise ValueError(f"text {text} lies in block {wrong[0]}, there are {blocks}")
        if len(set(used)) < len(used):
            raise ValueError(f"text {text} has a block twice: {used}")


def main() -> None:
    torch.manual_seed(0)
    page, lengths = 16, torch.tensor([5, 40, 33], dtype=torch.int32)
    key_pages, value_pages = torch.randn(2, 20, page, 2, 8, dtype=torch.float64)
    table = torch.randperm(20)[:9].reshape(3, 3).int()
    query = torch.randn(3, 4, 1, 8, dtype=torch.float64)
    tables = {"block_table": table, "cache_seqlens": lengths}
    output = attention_paged(query, key_pages, value_pages, **tables)
    for text, length in enumerate(lengths.tolist()):
        blocks = table[text, : -(-length // page)].tolist()
        dense = (pages[blocks].flatten(0, 1)[:length] for pages in (key_pages, value_pages))
        key, value = (x.transpose(0, 1) for x in dense)
        apart = (output[text] - attention_naive(query[text], key, value)).abs().max()
        print(f"{length:2} keys in blocks {blocks!s:12} largest difference from dense {apart:.1e}")


if __name__ == "__main__":
    main()
