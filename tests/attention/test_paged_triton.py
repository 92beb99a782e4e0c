"""The paged kernels against the readable form: pages, groups, shares, ragged lengths.

Without a GPU they run in Triton's interpreter, on small shapes; tests marked `cuda` compile them.
"""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from implementations.attention.paged import attention_paged
from implementations.attention.paged_triton import attention_paged_triton, forward, share_count
from implementations.lab.compare import assert_same_accuracy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.float16  # the interpreter cannot multiply bfloat16
# As in test_flash_triton.py: a GPU's exp2 in float32, and the scale's rounding.
EXP2 = 2.0**-20 if torch.cuda.is_available() else 0.0
SAME = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def case(lengths, page, heads, key_heads, dim, queries=1, dtype=torch.float64, spare=2):
    """Query, pages and tables. What no text fills is NaN, table entries beyond a text are -1."""
    like = {"dtype": dtype, "device": DEVICE}
    counts = [-(-length // page) for length in lengths]
    blocks = torch.randperm(sum(counts) + 3).split([*counts, 3])
    table = torch.full((len(lengths), max(counts) + spare), -1, dtype=torch.int32)
    pages = torch.full((2, sum(counts) + 3, page, key_heads, dim), torch.nan, **like)
    for row, block, length in zip(table, blocks, lengths, strict=False):
        row[: len(block)] = block
        places = torch.arange(length)
        at = row[places // page].long(), places % page
        pages[:, *at] = torch.randn(2, length, key_heads, dim, **like)
    query = torch.randn(len(lengths), heads, queries, dim, **like)
    lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return (query, *pages), {"block_table": table.to(DEVICE), "cache_seqlens": lengths}


@pytest.mark.parametrize("shares", [1, 2, 5])
@pytest.mark.parametrize("page", [1, 16, 24, 64, 256])
def test_pages_of_any_size_and_ragged_lengths(page, shares):
    """Lengths around the ends of pages, of tiles and of shares; one text has no key."""
    inputs, tables = case([0, 1, 16, 31, 33, 64, 65, 257], page, 2, 1, 16)
    got = attention_paged_triton(*inputs, **tables, shares=shares)
    assert_close(got, attention_paged(*inputs, **tables), **SAME)
    assert (got[0] == 0).all()


@pytest.mark.parametrize("heads, key_heads", [(1, 1), (4, 4), (6, 2), (9, 3), (4, 1), (20, 1)])
def test_a_group_of_heads_reads_its_own_keys(heads, key_heads):
    """Twenty heads of one group do not fit into one tile of rows."""
    inputs, tables = case([40, 70], 16, heads, key_heads, 16)
    got = attention_paged_triton(*inputs, **tables, shares=2)
    assert_close(got, attention_paged(*inputs, **tables), **SAME)


@pytest.mark.parametrize("dim", [16, 32, 64, 80, 128, 256])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_dims_and_scales(dim, scale):
    inputs, tables = case([40, 70], 16, 4, 2, dim)
    got = attention_paged_triton(*inputs, **tables, shares=3, scale=scale)
    assert_close(got, attention_paged(*inputs, **tables, scale=scale), **SAME)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries, shares", [(2, 1), (7, 3), (33, 2)])
def test_several_queries(queries, shares, causal):
    """A prompt, or a guess to be verified: the last query stands at the last key."""
    inputs, tables = case([queries, 64, 90], 16, 4, 2, 16, queries)
    got = attention_paged_triton(*inputs, **tables, shares=shares, causal=causal)
    assert_close(got, attention_paged(*inputs, **tables, causal=causal), **SAME)


def test_queries_before_the_first_key_see_nothing():
    """The readable form refuses them; here their number is not known to the host."""
    inputs, tables = case([3, 0], 16, 2, 1, 16, queries=5)
    got = attention_paged_triton(*inputs, **tables, causal=True)
    assert (got[0, :, :2] == 0).all() and (got[1] == 0).all()
    last = (inputs[0][:1, :, 2:], *inputs[1:])
    tables = {name: table[:1] for name, table in tables.items()}
    assert_close(got[:1, :, 2:], attention_paged(*last, **tables, causal=True), **SAME)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("shares", [1, 4])
def test_as_accurate_as_the_readable_form(dtype, shares):
    inputs, tables = case([1, 100, 257], 16, 4, 2, 64, dtype=dtype)
    fast = partial(attention_paged_triton, **tables, shares=shares)
    known = EXP2 if dtype == torch.float32 else 0.0
    assert_same_accuracy(fast, partial(attention_paged, **tables), *inputs, known=known)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("page", [16, 64, 256])
@pytest.mark.parametrize(
    "heads, key_heads, queries", [(32, 8, 1), (9, 3, 1), (8, 2, 5), (8, 2, 70)]
)
def test_as_accurate_as_the_readable_form_when_compiled(
    heads, key_heads, queries, page, dim, dtype
):
    lengths = [70, 255, 1024, 2500, 777]
    inputs, tables = case(lengths, page, heads, key_heads, dim, queries, dtype)
    options = {**tables, "causal": queries > 1}
    fast, readable = partial(attention_paged_triton, **options), partial(attention_paged, **options)
    known = EXP2 if dtype == torch.float32 else 0.0
    assert_same_accuracy(fast, readable, *inputs, known=known)


def test_shares_that_see_little_count_little():
    """One key of a hundred has nearly all the weight: the other shares hardly matter."""
    inputs, tables = case([100], 16, 2, 1, 16)
    query, keys, values = inputs
    block = tables["block_table"][0, 3].long()
    keys[block, 5, 0] = 20 * query[0, 1, 0]
    got = attention_paged_triton(*inputs, **tables, shares=3)
    assert_close(got, attention_paged(*inputs, **tables), **SAME)
    assert_close(got[0, 1, 0], values[block, 5, 0], rtol=1e-6, atol=1e-6)


def test_strided_queries_and_pages():
    """Heads cut from a projection, and both kinds of pages in one tensor, as engines keep them."""
    (query, keys, values), tables = case([40, 70], 16, 4, 2, 16)
    wanted = attention_paged_triton(query, keys, values, **tables)
    rows = torch.cat([query, query], 2).transpose(1, 2).contiguous()[:, 1:].transpose(1, 2)
    both = torch.stack([keys, values], 2)
    table = torch.cat([tables["block_table"]] * 2, 1)[:, : tables["block_table"].shape[1]]
    got = attention_paged_triton(
        rows, both[:, :, 0], both[:, :, 1], block_table=table, cache_seqlens=tables["cache_seqlens"]
    )
    assert not rows.is_contiguous() and not table.is_contiguous() and torch.equal(got, wanted)


def test_a_text_has_the_same_bits_in_every_batch_with_fixed_shares():
    inputs, tables = case([40, 70, 300], 16, 4, 2, 16, dtype=torch.float32)
    together = attention_paged_triton(*inputs, **tables, shares=4)
    for text in range(3):
        query, *pages = inputs
        alone = {name: table[text, None] for name, table in tables.items()}
        got = attention_paged_triton(query[text, None], *pages, **alone, shares=4)
        assert torch.equal(got[0], together[text])


def test_how_many_shares():
    """All multiprocessors have work, a share has enough keys, and never more than the most."""
    assert share_count(planes=512, keys=8192, multiprocessors=132) == 3
    assert share_count(planes=8, keys=131072, multiprocessors=132) == 128
    assert share_count(planes=8, keys=1024, multiprocessors=132) == 4
    assert share_count(planes=5000, keys=8192, multiprocessors=132) == 1
    assert share_count(planes=1, keys=1, multiprocessors=132) == 1


@pytest.mark.cuda
@pytest.mark.parametrize("queries", [1, 4])
def test_captured_in_a_graph_it_follows_the_tables(queries):
    """Lengths, table and query change in place; the graph is the one captured before."""
    inputs, tables = case([70, 300, 2500], 16, 8, 2, 64, queries, torch.bfloat16, spare=10)
    pages = [x.nan_to_num() for x in inputs[1:]]
    query, options = inputs[0], {**tables, "causal": True}
    attention_paged_triton(query, *pages, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = attention_paged_triton(query, *pages, **options)
    for lengths in ([4, 2000, 16], [500, 33, 2501]):
        query.normal_()
        tables["block_table"].copy_(torch.randperm(len(pages[0]))[: tables["block_table"].shape[1]])
        tables["cache_seqlens"].copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(output, attention_paged_triton(query, *pages, **options))
        wanted = attention_paged(query, *pages, **options)
        assert_close(output, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.cuda
def test_a_thousand_calls_give_the_same_bits():
    inputs, tables = case([2000, 3000], 16, 8, 2, 128, dtype=torch.bfloat16)
    first = attention_paged_triton(*inputs, **tables)
    assert all(torch.equal(attention_paged_triton(*inputs, **tables), first) for _ in range(1000))


@pytest.mark.cuda
def test_more_elements_than_32_bits_can_count():
    """Pages at the far end of 5 GB of keys."""
    blocks = 2**31 // (64 * 8 * 128) + 100
    keys = torch.randn(blocks, 64, 8, 128, dtype=HALF, device="cuda")
    query = torch.randn(1, 8, 1, 128, dtype=HALF, device="cuda")
    table = torch.arange(blocks - 20, blocks, dtype=torch.int32, device="cuda")[None]
    length = torch.tensor([20 * 64 - 7], dtype=torch.int32, device="cuda")
    far = attention_paged_triton(query, keys, keys, block_table=table, cache_seqlens=length)
    copy = keys[-20:].clone()
    table = torch.arange(20, dtype=torch.int32, device="cuda")[None]
    near = attention_paged_triton(query, copy, copy, block_table=table, cache_seqlens=length)
    assert torch.equal(far, near)


@pytest.mark.parametrize("queries, shares", [(1, 1), (1, 3), (5, 2)])
def test_the_operator_is_registered_as_torch_asks(queries, shares):
    inputs, tables = case([9, 40], 16, 4, 2, 16, queries)
    inputs = [x.nan_to_num() for x in inputs]
    torch.library.opcheck(forward, (*inputs, *tables.values(), True, 0.25, shares))


def test_compiled_whole_it_gives_the_same(unchecked):
    inputs, tables = case([9, 40], 16, 4, 2, 16, dtype=torch.float32)
    step = lambda *x: 2 * attention_paged_triton(*x, **tables)  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")  # inductor takes 25 s more
    assert_close(compiled(*inputs), step(*inputs))


def test_it_has_no_gradient():
    inputs, tables = case([9, 40], 16, 4, 2, 16)
    with torch.enable_grad():
        output = attention_paged_triton(inputs[0].requires_grad_(), *inputs[1:], **tables)
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            output.sum().backward()


def other(**changes):
    inputs, tables = case([9, 40], 16, 4, 2, 16, dtype=torch.float32)
    names = ("query", "key_pages", "value_pages")
    return {**dict(zip(names, inputs, strict=True)), **tables} | changes


TABLE, LENGTHS = torch.zeros(2, 3, dtype=torch.int32), torch.tensor([9, 40], dtype=torch.int32)
BAD = {
    "three dimensions": ({"query": torch.randn(4, 1, 16)}, "query has four dimensions"),
    "flat pages": ({"value_pages": torch.randn(7, 16, 32)}, "value_pages has four dimensions"),
    "keys of another dim": ({"key_pages": torch.randn(7, 16, 2, 32)}, "share one dim"),
    "pages of another size": ({"value_pages": torch.randn(7, 8, 2, 16)}, "share one dim"),
    "another dtype": ({"value_pages": torch.randn(7, 16, 2, 16).half()}, "value_pages is .*16"),
    "another device": ({"key_pages": torch.randn(7, 16, 2, 16, device="meta")}, "on meta"),
    "no blocks": ({name: torch.randn(0, 16, 2, 16) for name in ("key_pages", "value_pages")},
                  "at least one page"),
    "heads that do not share": ({"query": torch.randn(2, 3, 1, 16)}, "cannot be shared evenly"),
    "columns": ({"query": torch.randn(2, 4, 16, 16).mT}, "neighbours"),
    "dim 24": ({"query": torch.randn(2, 4, 1, 24), "key_pages": torch.randn(7, 16, 2, 24),
                "value_pages": torch.randn(7, 16, 2, 24)}, "one dim of"),
    "no queries": ({"query": torch.randn(2, 4, 0, 16)}, "at least one"),
    "a table of longs": ({"block_table": TABLE.long()}, "block_table is torch.int32"),
    "lengths of longs": ({"cache_seqlens": LENGTHS.long()}, "cache_seqlens is torch.int32"),
    "a table elsewhere": ({"block_table": TABLE.to("meta")}, "block_table is on meta"),
    "lengths elsewhere": ({"cache_seqlens": LENGTHS.to("meta")}, "cache_seqlens is on meta"),
    "a table of one text": ({"block_table": TABLE[:1]}, "a row for each of 2 texts"),
    "a flat table": ({"block_table": TABLE[:, 0].contiguous()}, "a row for each of 2 texts"),
    "lengths of one text": ({"cache_seqlens": LENGTHS[:1]}, "a row for each of 2 texts"),
    "a table in columns": ({"block_table": torch.zeros(3, 2, dtype=torch.int32).mT}, "neighbours"),
    "no share": ({"shares": 0}, "1 to 128 shares, got 0"),
    "many shares": ({"shares": 129}, "1 to 128 shares, got 129"),
    "a scale of zero": ({"scale": 0.0}, "positive"),
    "a block twice, checked": ({"block_table": TABLE, "check": True}, "a block twice"),
    "a block too far, checked": ({"block_table": TABLE + 99, "check": True}, "in block 99"),
    "a length too long, checked": (
        {"cache_seqlens": LENGTHS + 999, "check": True}, "has room for",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_the_rule(name, unchecked):
    changes, rule = BAD[name]
    here = {
        key: x.to(DEVICE) if isinstance(x, torch.Tensor) and x.device.type == "cpu" else x
        for key, x in changes.items()
    }
    with pytest.raises(ValueError, match=rule):
        attention_paged_triton(**other(**here))
