"""Paged attention against torch's kernel on each text alone, and tables that lie."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.testing import assert_close

from implementations.attention.paged import attention_paged, gather_pages

LENGTHS = torch.tensor([1, 16, 17, 63], dtype=torch.int32)
SAME = {"rtol": 1e-10, "atol": 1e-10}


def paged(texts: list[torch.Tensor], page: int, entries: int, spare: int = 3):
    """Texts [token, head, dim] in shuffled pages; whatever they do not fill is NaN.

    Entries beyond a text's pages are -1, as vLLM fills them.
    """
    counts = [-(-len(text) // page) for text in texts]
    blocks = sum(counts) + spare
    pages = torch.full((blocks, page, *texts[0].shape[1:]), torch.nan, dtype=texts[0].dtype)
    order = torch.Generator().manual_seed(page)
    free = torch.randperm(blocks, generator=order).tolist()
    table = torch.full((len(texts), entries), -1, dtype=torch.int32)
    for text, row, count in zip(texts, table, counts, strict=True):
        for entry in range(count):
            row[entry] = block = free.pop()
            part = text[entry * page : (entry + 1) * page]
            pages[block, : len(part)] = part
    return pages, table


def case(page: int, heads: int, key_heads: int, queries: int, value_dim: int = 5):
    """Queries, dense keys and values of every text, and the same in pages."""
    lengths = [max(length, queries) for length in LENGTHS.tolist()]
    shape = {"dtype": torch.float64}
    query = torch.randn(len(lengths), heads, queries, 8, **shape)
    keys = [torch.randn(n, key_heads, 8, **shape) for n in lengths]
    values = [torch.randn(n, key_heads, value_dim, **shape) for n in lengths]
    entries = -(-max(lengths) // page) + 2
    key_pages, table = paged(keys, page, entries)
    value_pages, _ = paged(values, page, entries)
    tables = {"block_table": table, "cache_seqlens": torch.tensor(lengths, dtype=torch.int32)}
    return query, keys, values, key_pages, value_pages, tables


@pytest.mark.parametrize("heads, key_heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("page", [1, 16, 64, 256])
@pytest.mark.parametrize("queries, causal", [(1, False), (1, True), (9, False), (9, True)])
def test_equals_torch_on_each_text_alone(page, heads, key_heads, queries, causal):
    """Ragged lengths around a page's end; NaN in what no text fills."""
    query, keys, values, key_pages, value_pages, tables = case(page, heads, key_heads, queries)
    got = attention_paged(query, key_pages, value_pages, causal=causal, **tables)
    for text, (key, value) in enumerate(zip(keys, values, strict=True)):
        key, value = (x.transpose(0, 1)[None] for x in (key, value))
        visible = torch.ones(queries, key.shape[2]).tril(key.shape[2] - queries).bool()
        options = {"attn_mask": visible if causal else None, "enable_gqa": True}
        expected = sdpa(query[text, None], key, value, **options)[0]
        assert_close(got[text], expected, **SAME)


def test_gathered_by_hand():
    """Three tokens in pages of two: block 2, then the first half of block 0; then nothing."""
    pages = torch.arange(6.0).reshape(3, 2, 1, 1)
    table = torch.tensor([[2, 0], [1, 7]], dtype=torch.int32)
    tokens = gather_pages(pages, table, torch.tensor([3, 1], dtype=torch.int32))
    assert tokens.flatten(1).tolist() == [[4.0, 5.0, 0.0], [2.0, 0.0, 0.0]]


def test_texts_may_share_their_start():
    _, _, _, key_pages, value_pages, _ = case(4, 2, 2, 1)
    key_pages, value_pages = key_pages.nan_to_num(), value_pages.nan_to_num()
    table = torch.tensor([[5, 2, 1], [5, 2, 3]], dtype=torch.int32)
    tables = {"block_table": table, "cache_seqlens": torch.tensor([8, 11], dtype=torch.int32)}
    query = torch.randn(1, 2, 1, 8, dtype=torch.float64).repeat(2, 1, 1, 1)
    got = attention_paged(query, key_pages, value_pages, **tables)
    for text, length in enumerate((8, 11)):
        alone = {"block_table": table[text, None], "cache_seqlens": torch.tensor([length]).int()}
        assert_close(got[text, None], attention_paged(query[:1], key_pages, value_pages, **alone))


def test_a_text_without_keys_gets_zeros():
    query, _, _, key_pages, value_pages, tables = case(16, 4, 2, 1)
    tables["cache_seqlens"] = torch.tensor([0, 16, 0, 3], dtype=torch.int32)
    got = attention_paged(query, key_pages, value_pages, **tables)
    assert (got[[0, 2]] == 0).all() and got.isfinite().all() and (got[[1, 3]] != 0).all()
    tables["cache_seqlens"] = torch.zeros(4, dtype=torch.int32)
    assert (attention_paged(query, key_pages, value_pages, **tables) == 0).all()
    with pytest.raises(ValueError, match="queries <= keys, got 1 > 0"):
        attention_paged(query, key_pages, value_pages, causal=True, **tables)


def test_gradients_reach_the_pages():
    query, _, _, key_pages, value_pages, tables = case(16, 4, 2, 3, value_dim=2)
    tables = {name: tensor[:2] for name, tensor in tables.items()}
    tables["cache_seqlens"] = torch.tensor([3, 2], dtype=torch.int32)
    inputs = [x.nan_to_num()[:, :3].requires_grad_() for x in (key_pages, value_pages)]
    assert torch.autograd.gradcheck(
        lambda *pages: attention_paged(query[:2], *pages, **tables), inputs
    )


def int32(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "table, lengths, sentence",
    [
        (int32([0, 1], [2, 5]), int32(8, 5), "text 1 lies in block 5, there are 5"),
        (int32([0, -1], [2, 3]), int32(5, 8), "text 0 lies in block -1"),
        (int32([0, 0], [2, 3]), int32(5, 8), r"text 0 has a block twice: \[0, 0\]"),
        (int32([0, 1], [2, 3]), int32(8, 9), "text 1 has length 9, its table has room for 8"),
        (int32([0, 1], [2, 3]), int32(-1, 8), "text 0 has length -1"),
        (int32([0, 1], [2, 3]), int32(8), r"2 texts need as many cache_seqlens, .* \[1\]"),
        (int32([0, 1], [2, 3]).long(), int32(8, 8), "block_table is torch.int32, got torch.int64"),
        (int32([0, 1], [2, 3]), int32(8, 8).long(), "cache_seqlens is torch.int32, got"),
        (int32([0, 1], [2, 3]).to("meta"), int32(8, 8), "block_table is on meta, the pages are"),
    ],
)
def test_bad_tables_are_sentences(table, lengths, sentence, unchecked):
    query, pages = torch.randn(2, 2, 1, 8), torch.randn(5, 4, 2, 8)
    with pytest.raises(ValueError, match=sentence):
        attention_paged(query, pages, pages, block_table=table, cache_seqlens=lengths)
    good = {"block_table": int32([0, 9], [2, 3]), "cache_seqlens": int32(4, 8)}
    attention_paged(query, pages, pages, **good)  # an entry that is not used may say anything
