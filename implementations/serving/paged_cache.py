"""The paged cache: one decoder pass over texts of any length, none padded to another's.

    row         the new tokens of all texts, one after another: [1, token]
    positions   where each stands in its own text
    slots       where its keys go: block · page + place in the block
    groups      texts with equally many new tokens, which attend in one call

Everything but attention works on each token alone, so it takes the row as it is; attention takes
it group by group, each text with its own table and length. All keys of a pass are written before
any query of that layer looks, so that a text may share a block that is written in the same pass.

Paper   Kwon et al. 2023, arXiv:2309.06180; Yu et al. 2022, Orca (OSDI '22): selective batching
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
    """Texts with equally many new tokens, which stand in the row from `start` to `end` - 1."""

    start: int
    end: int
    block_table: Int[Tensor, "text entry"]
    lengths: Int[Tensor, " text"]


@dataclass
class Batch:
    """The new tokens of several texts in one row, and where they belong."""

    tokens: Int[Tensor, "1 token"]
    positions: Int[Tensor, " token"]
    slots: Int[Tensor, " token"]
    groups: list[Group]
    ends: Int[Tensor, " text"]
    """the place of each text's last new token in the row"""
    longest: int
    """the length of the longest text"""

    @classmethod
    def of(cls, chunks: Sequence[Chunk], page: int, device: torch.device) -> "Batch":
        """The chunks, which are in order of their lengths, as one row."""
        tokens, positions, slots, ends = [], [], [], []
        groups: dict[int, list[Chunk]] = {}
        for chunk in chunks:
            request, start, end = chunk
            table = request.text.table
            tokens += request.tokens[start:end]
            positions += range(start, end)
            slots += [table[i // page] * page + i % page for i in range(start, end)]
            ends.append(len(tokens) - 1)
            groups.setdefault(end - start, []).append(chunk)
        made, first = [], 0
        for count, members in groups.items():
            tables = [chunk.request.text.table for chunk in members]
            entries = max(map(len, tables))
            padded = [table + [0] * (entries - len(table)) for table in tables]
            last = first + count * len(members)
            block_table = torch.tensor(padded, dtype=torch.int32, device=device)
            lengths = torch.tensor([c.end for c in members], dtype=torch.int32, device=device)
            made.append(Group(first, last, block_table, lengths))
            first = last
        row, places, where, last = (
            torch.tensor(values, device=device) for values in (tokens, positions, slots, ends)
        )
        longest = max(chunk.end for chunk in chunks)
        return cls(row[None], places, where, made, last, longest)


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
        outputs = [self.attend_group(query[0], group) for group in self.batch.groups]
        return torch.cat(outputs, 1)[None]

    def attend_group(
        self, query: Float[Tensor, "head token dim"], group: Group
    ) -> Float[Tensor, "head new dim"]:
        texts = len(group.lengths)
        rows = "head (text query) dim", "text head query dim"
        apart = rearrange(query[:, group.start : group.end], " -> ".join(rows), text=texts)
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
    together = decoder(batch.tokens, cache.of(batch))[0, batch.ends]
    for tokens, logits in zip(texts, together, strict=True):
        apart = (decoder(torch.tensor([tokens]))[0, -1] - logits).abs().max()
        print(f"{len(tokens):2} tokens: largest difference from the text alone {apart:.1e}")


if __name__ == "__main__":
    main()
