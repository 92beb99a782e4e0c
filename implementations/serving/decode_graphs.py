"""CUDA graphs for decoding: the hundreds of launches of a pass become one.

A pass in which every text reads one token has the same kernels on the same memory for every batch
of one size, so it is captured once and replayed: new tokens, positions and tables are copied into
the memory that the graph reads. There is a graph for each of a few sizes; a batch takes the next
larger one, its places left over filled with texts of one token in the cache's spare block.

Paper   NVIDIA, CUDA C++ Programming Guide, section CUDA Graphs; PyTorch's torch.cuda.CUDAGraph
Run     uv run python implementations/serving/decode_graphs.py
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from implementations.models.decoder import Decoder
from implementations.serving.block_manager import Text
from implementations.serving.paged_cache import Batch, Group, PagedCache
from implementations.serving.scheduler import Chunk


def sizes(most: int) -> list[int]:
    """1, 2, 4, 8, 16, then every multiple of 16 below `most`, and `most` itself.

    Tensor cores take 16 rows at a time, so that the fill costs no multiplication.
    """
    steps = [1, 2, 4, 8, *range(16, most, 16)]
    return [size for size in steps if size < most] + [most]


class DecodeGraphs:
    """Logits of texts that read one token each, by replaying a captured pass.

    Args:
        decoder: on a GPU.
        cache: its pages, with an attention function that can be captured.
        batch: how many texts there are at most.
        longest: the longest text.

    Raises:
        ValueError: the decoder is not on a GPU.
    """

    def __init__(self, decoder: Decoder, cache: PagedCache, batch: int, longest: int):
        device = cache.pages.device
        if device.type != "cuda":
            raise ValueError(f"CUDA graphs need a GPU, the decoder is on {device.type}")
        self.decoder, self.cache = decoder, cache
        self.row = torch.zeros(2, batch, dtype=torch.long, device=device)  # tokens and positions
        self.tables = Tables(batch, -(-longest // cache.page), cache.spare, device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        for size in reversed(sizes(batch)):  # the largest first: the others fit into its memory
            self.capture(size)

    def forward(self, size: int) -> Float[Tensor, "text vocabulary"]:
        """The pass over `size` texts, from what `fill` has left on the device."""
        (tokens, positions), table = self.row[:, :size], self.tables.table[:size]
        rows, page = torch.arange(size, device=table.device), self.cache.page
        slots = table[rows, positions // page] * page + positions % page
        group = Group(slice(size), table, (positions + 1).int())
        batch = Batch(tokens[None], positions, slots, [group], slice(size), rows, longest=size)
        return self.decoder.logits(self.decoder.hidden(batch.tokens, self.cache.of(batch))[0])

    @torch.no_grad()
    def capture(self, size: int) -> None:
        """Record the pass over `size` texts."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.forward(size)  # compiles kernels and makes workspaces, which a capture must not
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None
        with torch.cuda.graph(graph, pool=pool):
            logits = self.forward(size)
        self.graphs[size] = graph, logits

    def __call__(self, chunks: Sequence[Chunk]) -> Float[Tensor, "text vocabulary"]:
        """Logits after each text's token; they are overwritten by the next call."""
        size = min(size for size in self.graphs if size >= len(chunks))
        self.fill(chunks, size)
        graph, logits = self.graphs[size]
        graph.replay()
        return logits[: len(chunks)]

    def fill(self, chunks: Sequence[Chunk], size: int) -> None:
        """Copy what the graph reads: the chunks, and texts of one token in the spare block."""
        left = [0] * (size - len(chunks))
        places = [chunk.start for chunk in chunks]
        tokens = [chunk.request.tokens[chunk.start] for chunk in chunks]
        self.row[:, :size] = torch.tensor([tokens + left, places + left])
        self.tables.fill([chunk.request.text for chunk in chunks], size)


class Tables:
    """Block tables on the device. Few change from pass to pass, so only those are written anew, in
    a copy on the host that travels as a whole.

    Args:
        batch: how many texts there are at most.
        entries: of the longest text's table.
        spare: the block of places left over.
        device: where the tables are read.
    """

    def __init__(self, batch: int, entries: int, spare: int, device: torch.device):
        self.host = torch.full((batch, entries), spare, dtype=torch.int32)
        if device.type == "cuda":
            self.host = self.host.pin_memory()
        self.table, self.spare = self.host.to(device), spare
        self.written: list[tuple[Text | None, int, int]] = [(None, 1, spare)] * batch

    def fill(self, texts: Sequence[Text], size: int) -> None:
        """The first rows are those of the texts, the rest up to `size` the spare block's."""
        rows = self.host.numpy()
        left = [None] * (size - len(texts))
        for row, text in enumerate([*texts, *left]):
            table = [self.spare] if text is None else text.table
            # A table only grows, but for its last block, which is copied when it was shared.
            now = text, len(table), table[-1]
            if now != self.written[row]:
                rows[row, : len(table)] = table
                self.written[row] = now
        self.table[:size] = self.host[:size]


def main() -> None:
    print("a batch of up to 256 texts takes one of", sizes(256))


if __name__ == "__main__":
    main()
