"""CUDA graphs for decoding: the hundreds of launches of a pass become one.

A pass in which every text reads one token has the same kernels on the same memory for every batch
of one size, so it is captured once and replayed: new tokens, positions and tables are copied into
the memory that the graph reads. There is a graph for each of a few sizes; a batch takes the next
larger one, its places left over filled with texts of one token in the cache's spare block.

A few tokens of a prompt go the same way. Each is a text of its own that ends there: all keys of a
layer are written before any query looks, so it finds its neighbours' keys in the blocks of their
table. Keys are then read once for each token and not once for a tile of them, which is little
beside the launches as long as the chunk is short.

Paper   NVIDIA, CUDA C++ Programming Guide, section CUDA Graphs; PyTorch's torch.cuda.CUDAGraph
Run     uv run python implementations/serving/decode_graphs.py
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from implementations.models.decoder import Decoder
from implementations.serving.block_manager import Text
from implementations.serving.paged_cache import Batch, Group, PagedCache, Reader, reader
from implementations.serving.scheduler import Chunk


def sizes(most: int) -> list[int]:
    """1, 2, 4, 8, 16, then every multiple of 16 below `most`, and `most` itself.

    Tensor cores take 16 rows at a time, so that the fill costs no multiplication.
    """
    steps = [1, 2, 4, 8, *range(16, most, 16)]
    return [size for size in steps if size < most] + [most]


class DecodeGraphs:
    """Logits after the last token of each chunk, by replaying a captured pass.

    Args:
        decoder: on a GPU.
        cache: its pages, with an attention function that can be captured.
        most: how many tokens a pass reads at most.
        longest: the longest text.
        read: the pass that is captured; `reader(decoder, cache)` unless given.

    Raises:
        ValueError: the decoder is not on a GPU.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: PagedCache,
        most: int,
        longest: int,
        read: Reader | None = None,
    ):
        device = cache.pages.device
        self.read, self.page, self.most = read or reader(decoder, cache), cache.page, most
        # tokens, positions, and which of the tables is theirs
        self.row = torch.zeros(3, most, dtype=torch.long, device=device)
        self.tables = Tables(most, -(-longest // cache.page), cache.spare, device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        for size in reversed(sizes(most)):  # the largest first: the others fit into its memory
            self.capture(size)

    def forward(self, size: int) -> Float[Tensor, "text vocabulary"]:
        """The pass over `size` tokens, from what `fill` has left on the device."""
        tokens, positions, whose = self.row[:, :size]
        table = self.tables.table[whose]
        rows, page = torch.arange(size, device=table.device), self.page
        slots = table[rows, positions // page] * page + positions % page
        group = Group(slice(size), table, (positions + 1).int())
        return self.read(Batch(tokens[None], positions, slots, [group], slice(size), rows, size))

    @torch.no_grad()
    def capture(self, size: int) -> None:
        """Record the pass over `size` tokens."""
        if not self.row.is_cuda:
            raise ValueError(f"CUDA graphs need a GPU, the decoder is on {self.row.device}")
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
        """Logits after each chunk's last token; they are overwritten by the next call."""
        count = sum(end - start for _, start, end in chunks)
        size = min(size for size in self.graphs if size >= count)
        self.fill(chunks, size - count)
        graph, logits = self.graphs[size]
        graph.replay()
        if count == len(chunks):
            return logits[:count]
        ends = torch.tensor([end - start for _, start, end in chunks]).cumsum(0) - 1
        return logits[ends.to(logits.device)]

    def fill(self, chunks: Sequence[Chunk], left: int) -> None:
        """Copy what the graph reads: each token of the chunks as the end of a text, and then as
        many texts of one token in the spare block as places are left."""
        ends = [(request, at) for request, start, end in chunks for at in range(start, end)]
        tokens = [request.tokens[at] for request, at in ends] + [0] * left
        places = [at for _, at in ends] + [0] * left
        tables = self.tables.rows([request.text for request, _ in ends]) + [self.most] * left
        self.row[:, : len(tokens)] = torch.from_numpy(np.array([tokens, places, tables]))


class Tables:
    """Block tables on the device. A text keeps its row while it is read, and few tables change from
    pass to pass: what changed is written in a copy on the host that travels as a whole.

    Args:
        most: how many there are. One more row stands last, for the places left over.
        entries: of the longest text's table.
        spare: the block of places left over.
        device: where the tables are read.
    """

    def __init__(self, most: int, entries: int, spare: int, device: torch.device):
        self.host = torch.full((most + 1, entries), spare, dtype=torch.int32)
        if device.type == "cuda":
            self.host = self.host.pin_memory()
        self.table = self.host.to(device)
        self.idle = list(range(most))
        self.written: dict[Text, tuple[int, int, int]] = {}
        """a text's row, the entries of its table and the last of them"""

    def rows(self, texts: Sequence[Text]) -> list[int]:
        """The row of each text, with its table as it is now."""
        host, rows = self.host.numpy(), []
        for text in texts:
            row, count, last = self.written.get(text, NOWHERE)
            table = text.table
            if len(table) != count or table[-1] != last:
                if not count:
                    row = self.take(texts)
                # A table only grows, but for its last block, which is copied when it was shared.
                known = max(count - 1, 0)
                host[row, known : len(table)] = table[known:]
                self.written[text] = row, len(table), table[-1]
            rows.append(row)
        self.table.copy_(self.host)
        return rows

    def take(self, texts: Sequence[Text]) -> int:
        """A row that is free, or was that of a text which is not among these."""
        if not self.idle:
            for gone in self.written.keys() - set(texts):
                self.idle.append(self.written.pop(gone)[0])
        return self.idle.pop()


NOWHERE = -1, 0, -1  # of a text that is not written


def main() -> None:
    print("a batch of up to 256 texts takes one of", sizes(256))


if __name__ == "__main__":
    main()
