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
        entries = -(-longest // cache.page)
        self.row = torch.zeros(3, batch, dtype=torch.long, device=device)
        self.lengths = torch.ones(batch, dtype=torch.int32, device=device)
        self.table = torch.zeros(batch, entries, dtype=torch.int32, device=device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.fill([], batch)
        for size in reversed(sizes(batch)):  # the largest first: the others fit into its memory
            self.capture(size)

    @torch.no_grad()
    def capture(self, size: int) -> None:
        """Record the pass over `size` texts."""
        group = Group(0, size, self.table[:size], self.lengths[:size])
        tokens, positions, slots = self.row[:, :size]
        ends = torch.arange(size, device=self.row.device)
        batch = Batch(tokens[None], positions, slots, [group], ends, longest=size)
        cache = self.cache.of(batch)

        def forward() -> Tensor:
            return self.decoder.logits(self.decoder.hidden(batch.tokens, cache)[0])

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            forward()  # compiles kernels and makes workspaces, which a capture must not
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None
        with torch.cuda.graph(graph, pool=pool):
            logits = forward()
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
        page, left = self.cache.page, size - len(chunks)
        places = [chunk.start for chunk in chunks]
        tables = [chunk.request.text.table for chunk in chunks]
        tokens = [c.request.tokens[place] for c, place in zip(chunks, places, strict=True)]
        slots = [
            table[place // page] * page + place % page
            for table, place in zip(tables, places, strict=True)
        ]
        spare = self.cache.spare
        entries = max(map(len, tables), default=1)
        tables = [table + [0] * (entries - len(table)) for table in tables]
        tables += [[spare] + [0] * (entries - 1)] * left
        row = [tokens + [0] * left, places + [0] * left, slots + [spare * page] * left]
        lengths = [place + 1 for place in places] + [1] * left
        self.row[:, :size] = torch.tensor(row).to(self.row.device)
        self.lengths[:size] = torch.tensor(lengths, dtype=torch.int32).to(self.row.device)
        made = torch.tensor(tables, dtype=torch.int32).to(self.row.device)
        self.table[:size, :entries] = made


def main() -> None:
    print("a batch of up to 256 texts takes one of", sizes(256))


if __name__ == "__main__":
    main()
