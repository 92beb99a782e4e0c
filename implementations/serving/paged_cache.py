"""The paged cache: one decoder pass over texts of any length, none padded to another's.

    row         the new tokens of all texts, one after another: [1, token]
    positions   where each stands in its own text
    slots       where its keys go: block · page + place in the block
    tiles       1, 2, 4, ... or 64 neighbours of one text, and its table
    groups      tiles of one size, which attend in one call

Everything but attention works on each token alone, so it takes the row as it is. Attention takes
equally many queries of every text, and prompts differ: they are cut into tiles, the last of which
overlaps the one before, so that nothing is filled up and seven calls serve any lengths. All keys of
a pass are written before any query of that layer looks, so that a text may share a block that is
written in the same pass.

Paper   Kwon et al. 2023, arXiv:2309.06180; Yu et al. 2022, Orca (OSDI '22): selective batching
Fast    paged_cache_triton.py: the pass in ten launches a layer
Shapes  query, key, value [1, head, token, dim]    pages [block, page, key_head, dim]
Run     uv run python implementations/serving/paged_cache.py
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from implementations.attention.paged import attention_paged
from implementations.models.decoder import Decoder
from implementations.serving.block_manager import Copy
from implementations.serving.kv_cache import KeyValueCache
from implementations.serving.scheduler import Chunk


@dataclass
class Group:
    """Tiles of one size: so many neighbours in a text, the last of which stands at its length."""

    rows: slice | Int[Tensor, " query"]
    """where its queries stand in the row, tile by tile"""
    block_table: Int[Tensor, "tile entry"]
    lengths: Int[Tensor, " tile"]


@dataclass
class Batch:
    """The new tokens of several texts in one row, and where they belong."""

    tokens: Int[Tensor, "1 token"]
    positions: Int[Tensor, " token"]
    slots: Int[Tensor, " token"]
    groups: list[Group]
    order: slice | Int[Tensor, " token"]
    """where each token stands among the queries of all groups"""
    ends: Int[Tensor, " text"]
    """the place of each text's last new token in the row"""
    longest: int
    """the length of the longest text"""

    @classmethod
    def of(cls, chunks: Sequence[Chunk], page: int, device: torch.device) -> "Batch":
        """The chunks, which are in order of their lengths, as one row."""
        requests, starts, stops = zip(*chunks, strict=True)
        tables = [request.text.table for request in requests]
        entries = max(map(len, tables))
        table = torch.tensor([row + [0] * (entries - len(row)) for row in tables])
        tokens = torch.tensor([t for r, start, end in chunks for t in r.tokens[start:end]])
        start, count = torch.tensor(starts), torch.tensor(stops) - torch.tensor(starts)
        first = count.cumsum(0) - count  # of each text, in the row

        text = torch.arange(len(chunks)).repeat_interleave(count)
        place = torch.arange(len(tokens)) - first[text]
        positions = start[text] + place
        slots = table[text, positions // page] * page + positions % page

        size = torch.tensor([tile_size(end - start) for _, start, end in chunks])
        tiles = -(-count // size)
        whose = torch.arange(len(chunks)).repeat_interleave(tiles)
        tile = torch.arange(len(whose)) - (tiles.cumsum(0) - tiles)[whose]
        shift = torch.minimum(tile * size[whose], (count - size)[whose])  # the last may overlap
        groups = []
        for queries in size.unique().tolist():
            group = size[whose] == queries
            owner, begin = whose[group], shift[group]
            rows = ((first[owner] + begin)[:, None] + torch.arange(queries)).flatten()
            lengths = start[owner] + begin + queries
            tensors = rows, table[owner].int(), lengths.int()
            groups.append(Group(*(tensor.to(device) for tensor in tensors)))
        before = (tiles * size).cumsum(0) - tiles * size
        whole = place // size[text] * size[text]
        order = before[text] + whole + place - torch.minimum(whole, (count - size)[text])
        row = tokens[None], positions, slots
        row, positions, slots, order, ends = (
            tensor.to(device) for tensor in (*row, order, first + count - 1)
        )
        return cls(row, positions, slots, groups, order, ends, max(stops))


MOST_QUERIES = 64  # of a tile: the most rows that a program of attention/paged_triton.py takes


def tile_size(new: int) -> int:
    """The largest power of two that so many new tokens hold, at most 64."""
    return min(MOST_QUERIES, 1 << (new.bit_length() - 1))


class PagedLayer:
    """One layer's pages as a pass sees them: the keys of the batch go in, the queries look.

    Args:
        pages: its keys and its values.
        batch: where the new tokens belong.
        attention: any function with the signature of `attention_paged`.
    """

    def __init__(
        self,
        pages: Float[Tensor, "2 block page key_head dim"],
        batch: Batch,
        attention: Callable[..., Tensor],
    ):
        self.pages, self.batch, self.attention = pages, batch, attention
        self.positions = batch.positions

    def attend(
        self,
        query: Float[Tensor, "1 head token dim"],
        key: Float[Tensor, "1 key_head token dim"],
        value: Float[Tensor, "1 key_head token dim"],
    ) -> Float[Tensor, "1 head token dim"]:
        """Write all keys and values, then let each group's queries look at their texts."""
        for pages, new in zip(self.pages, (key, value), strict=True):
            pages.flatten(0, 1)[self.batch.slots] = new[0].transpose(0, 1)
        return self.look(query[0].transpose(0, 1)).transpose(0, 1)[None]

    def look(self, query: Float[Tensor, "token head dim"]) -> Float[Tensor, "token head dim"]:
        """Each group's queries look at their texts, whose keys are written."""
        outputs = [self.attend_group(query[group.rows], group) for group in self.batch.groups]
        together = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return together[self.batch.order]

    def attend_group(
        self, query: Float[Tensor, "row head dim"], group: Group
    ) -> Float[Tensor, "row head dim"]:
        rows = "(tile query) head dim", "tile head query dim"
        apart = rearrange(query, " -> ".join(rows), tile=len(group.lengths))
        tables = {"block_table": group.block_table, "cache_seqlens": group.lengths}
        output = self.attention(apart, *self.pages, **tables, causal=True)
        return rearrange(output, " -> ".join(reversed(rows)))


class BatchCache(KeyValueCache):
    """What a decoder takes as its cache in one pass over a batch."""

    def __init__(self, layers: list[PagedLayer], batch: Batch):
        self.layers, self.batch = layers, batch

    @property
    def length(self) -> int:
        """So many tokens before the row that its last would be the longest text's last."""
        return self.batch.longest - self.batch.tokens.shape[1]


class PagedCache:
    """Every layer's pages, in the dtype and on the device of the decoder's weights.

    One block more than asked for stands last and belongs to no text.

    Args:
        decoder: whose keys and values are kept.
        blocks: how many blocks there are.
        page: how many tokens a block holds.
        attention: any function with the signature of `attention_paged`.

    Raises:
        ValueError: the decoder adds learned positions, which it counts from the row's start.
    """

    def __init__(
        self,
        decoder: Decoder,
        blocks: int,
        page: int,
        attention: Callable[..., Tensor] = attention_paged,
    ):
        config, weight = decoder.config, decoder.embedding.weight
        if config.position == "learned":
            raise ValueError("texts of several lengths in a row need rotary positions, not learned")
        heads, dim = config.key_value_heads or config.heads, config.width // config.heads
        shape = (config.layers, 2, blocks + 1, page, heads, dim)
        self.pages = weight.new_empty(shape)
        self.page, self.spare, self.attention = page, blocks, attention

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy blocks in every layer, all read before one is written."""
        if copies:
            sources, targets = (
                torch.tensor(blocks, device=self.pages.device)
                for blocks in zip(*copies, strict=True)
            )
            self.pages[:, :, targets] = self.pages[:, :, sources]

    def of(self, batch: Batch) -> BatchCache:
        """The decoder's cache for one pass over the batch."""
        return BatchCache([PagedLayer(pages, batch, self.attention) for pages in self.pages], batch)


Reader = Callable[[Batch], Float[Tensor, "text vocabulary"]]


def reader(decoder: Decoder, cache: PagedCache) -> Reader:
    """A function that makes a pass over a batch: logits after each text's last token."""

    def read(batch: Batch) -> Float[Tensor, "text vocabulary"]:
        hidden = decoder.hidden(batch.tokens, cache.of(batch))
        return decoder.logits(hidden[0, batch.ends])

    return read


@torch.no_grad()
def main() -> None:
    from implementations.models.decoder import DecoderConfig
    from implementations.serving.block_manager import BlockManager
    from implementations.serving.scheduler import Request

    torch.manual_seed(0)
    config = DecoderConfig(97, 32, 2, 4, 80, positions=64, key_value_heads=2)
    decoder, page = Decoder(config).double(), 4
    manager, cache = BlockManager(20, page), PagedCache(decoder, 20, page)
    texts = [torch.randint(97, (length,)).tolist() for length in (3, 3, 10)]
    chunks = []
    for tokens in texts:
        request = Request(tokens, len(tokens))
        request.text, _ = manager.allocate(tokens)
        chunks.append(Chunk(request, 0, len(tokens)))
    batch = Batch.of(chunks, page, torch.device("cpu"))
    together = reader(decoder, cache)(batch)
    for tokens, logits in zip(texts, together, strict=True):
        apart = (decoder(torch.tensor([tokens]))[0, -1] - logits).abs().max()
        print(f"{len(tokens):2} tokens: largest difference from the text alone {apart:.1e}")


if __name__ == "__main__":
    main()
