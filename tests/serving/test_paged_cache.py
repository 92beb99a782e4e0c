"""One pass over a ragged row against each text alone, and what the pass may not take."""

import pytest
import torch

from implementations.models.decoder import Decoder
from implementations.serving.block_manager import BlockManager, Copy
from implementations.serving.paged_cache import Batch, PagedCache
from implementations.serving.scheduler import Chunk, Request


def chunks_of(texts: list[list[int]], manager: BlockManager) -> list[Chunk]:
    made = []
    for tokens in texts:
        request = Request(tokens, len(tokens))
        request.text, _ = manager.allocate(tokens)
        made.append(Chunk(request, 0, len(tokens)))
    return made


@torch.no_grad()
@pytest.mark.parametrize("page", [1, 3, 16])
def test_a_row_of_texts_is_read_as_each_alone(tiny, page):
    """All logits of all texts, in memory that was NaN before."""
    texts = [torch.randint(29, (n,)).tolist() for n in (1, 4, 4, 11)]
    cache, manager = PagedCache(tiny, 30, page), BlockManager(30, page)
    assert cache.pages.isnan().all()
    batch = Batch.of(chunks_of(texts, manager), page, torch.device("cpu"))
    assert [group.lengths.tolist() for group in batch.groups] == [[1], [4, 4], [8, 11]]
    made = cache.of(batch)
    assert made.length + batch.tokens.shape[1] == 11
    row = tiny(batch.tokens, made)[0]
    expected = torch.cat([tiny(torch.tensor([text]))[0] for text in texts])
    torch.testing.assert_close(row, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(row[batch.ends], expected[[0, 4, 8, 19]], rtol=1e-10, atol=1e-10)
    assert cache.pages[:, :, cache.spare].isnan().all()


@torch.no_grad()
def test_chunks_of_any_length_are_cut_into_tiles(tiny):
    """Each of 1 to 200 new tokens is asked for once or more, after what was read before."""
    manager = BlockManager(2000, 16)
    for before in (0, 5):
        chunks = []
        for count in range(1, 201):
            request = Request(list(range(before + count)), 300)
            request.text, _ = manager.allocate(request.tokens)
            chunks.append(Chunk(request, before, before + count))
        batch = Batch.of(chunks, 16, torch.device("cpu"))
        asked = torch.cat([group.rows for group in batch.groups])
        assert asked[batch.order].equal(torch.arange(len(batch.positions)))
        for group in batch.groups:
            rows = group.rows.reshape(len(group.lengths), -1)
            queries = rows.shape[1]
            place = group.lengths[:, None] - queries + torch.arange(queries)
            assert batch.positions[rows].equal(place)  # the last query stands at the last key
            found = group.block_table.gather(1, place // 16) * 16 + place % 16
            assert batch.slots[rows].equal(found)
        assert len(batch.groups) == 7 and len(asked) < 1.3 * len(batch.positions)
        for chunk in chunks:
            manager.free(chunk.request.text)


@torch.no_grad()
def test_copies_are_read_before_any_is_written(tiny):
    cache = PagedCache(tiny, 3, 2)
    cache.pages.copy_(torch.randn_like(cache.pages.nan_to_num()))
    before = cache.pages.clone()
    cache.copy([Copy(0, 1), Copy(1, 2)])
    for target, source in ((0, 0), (1, 0), (2, 1), (3, 3)):
        assert torch.equal(cache.pages[:, :, target], before[:, :, source])


def test_learned_positions_and_masks_are_refused(tiny):
    from dataclasses import replace

    with pytest.raises(ValueError, match="rotary positions, not learned"):
        PagedCache(Decoder(replace(tiny.config, position="learned")), 3, 2)
    cache, manager = PagedCache(tiny, 3, 2), BlockManager(3, 2)
    layer = cache.of(Batch.of(chunks_of([[1]], manager), 2, torch.device("cpu"))).layers[0]
    attention, x = tiny.blocks[0].attention, torch.randn(1, 1, 16).double()
    with pytest.raises(ValueError, match="attends causally"):
        attention(x, cache=layer)
    with pytest.raises(ValueError, match="attends causally"):
        attention(x, cache=layer, causal=True, mask=torch.ones(1, 1, dtype=torch.bool))
