"""Replayed graphs against passes that are launched kernel by kernel."""

from types import SimpleNamespace

import pytest
import torch

from implementations.attention.paged_triton import attention_paged_triton
from implementations.models.decoder import Decoder, DecoderConfig
from implementations.serving.block_manager import BlockManager
from implementations.serving.decode_graphs import DecodeGraphs, Tables, sizes
from implementations.serving.engine import Engine, Parameters
from implementations.serving.paged_cache import PagedCache, reader
from implementations.serving.paged_cache_triton import reader_triton

CONFIG = DecoderConfig(
    vocabulary=97, width=64, layers=2, heads=4, hidden=96, positions=128, key_value_heads=2
)


def test_sizes_hold_every_batch():
    for most in (1, 2, 7, 16, 17, 64, 100):
        found = sizes(most)
        assert found == sorted(set(found)) and found[-1] == most
        # A batch is filled to less than twice itself, and by fewer than 16 texts.
        for count in range(1, most + 1):
            size = min(size for size in found if size >= count)
            assert size < 2 * count + (count == 1) and size - count < 16


def test_graphs_without_a_gpu_are_refused(tiny):
    with pytest.raises(ValueError, match="need a GPU, the decoder is on cpu"):
        DecodeGraphs(tiny, PagedCache(tiny, 4, 4), 4, 16)


class Launched(DecodeGraphs):
    """The same passes on a CPU, launched and not replayed."""

    def capture(self, size):
        logits = torch.full((size, 29), torch.nan, dtype=torch.float64)
        replay = SimpleNamespace(replay=torch.no_grad()(lambda: logits.copy_(self.forward(size))))
        self.graphs[size] = replay, logits


@pytest.mark.parametrize("most", [4, 64])
def test_a_token_of_a_prompt_is_a_text_that_ends_there(tiny, most):
    """Too little memory, greedy and sampled; passes with prompts in them go by graphs or not."""
    prompts = [torch.randint(29, (n,)).tolist() for n in (3, 30, 17, 8, 40, 5, 21)]
    wanted = [Parameters(5 + 3 * i, temperature=(i % 2) * 0.8, seed=i) for i in range(7)]
    sizes = {"blocks": 15, "page": 4, "batch": 4, "budget": 64, "longest": 64}
    plain = Engine(tiny, **sizes).generate(prompts, wanted)
    engine = Engine(tiny, **sizes)
    engine.graphs = Launched(tiny, engine.cache, most, 64)
    replayed, fill = [], engine.graphs.fill
    engine.graphs.fill = lambda chunks, left: replayed.append(chunks) or fill(chunks, left)
    assert [g.tokens for g in engine.generate(prompts, wanted)] == [g.tokens for g in plain]
    assert len(replayed) > 20 and engine.scheduler.preemptions > 0
    longest = [max(end - start for _, start, end in chunks) for chunks in replayed]
    assert min(longest) == 1 and (max(longest) > 30) == (most == 64)


@pytest.mark.cuda
@pytest.mark.parametrize("read", [reader, reader_triton], ids=lambda read: read.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
def test_graphs_write_the_same_texts(dtype, read):
    """Batches that grow, shrink and are filled up; too little memory; greedy and sampled."""
    decoder = Decoder(CONFIG).to("cuda", dtype).eval()
    for parameter in decoder.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.4)
    prompts = [torch.randint(97, (n,)).tolist() for n in (3, 30, 17, 8, 40, 5, 21)]
    wanted = [Parameters(5 + 4 * i, temperature=(i % 2) * 0.8, seed=i) for i in range(7)]
    sizes = {"blocks": 20, "page": 16, "batch": 6, "budget": 64, "longest": 96}
    plain = Engine(decoder, **sizes).generate(prompts, wanted)
    engine = Engine(decoder, **sizes, attention=attention_paged_triton, graphs=True, reader=read)
    replayed, fill = [], engine.graphs.fill
    engine.graphs.fill = lambda chunks, left: replayed.append(chunks) or fill(chunks, left)
    assert [g.tokens for g in engine.generate(prompts, wanted)] == [g.tokens for g in plain]
    assert len(replayed) > 20
    longest = [max(end - start for _, start, end in chunks) for chunks in replayed]
    assert min(longest) == 1 and max(longest) > 30  # prompts too, all of them


def test_tables_follow_their_texts():
    """Rows that are kept, grow, are copied on write, are freed and come back: as written anew."""
    manager, tables = BlockManager(60, 2), Tables(5, 20, 60, torch.device("cpu"))
    texts = [manager.allocate([i] * (3 + 2 * i))[0] for i in range(4)]
    twin = manager.fork(texts[0])
    orders = [[0, 1, 2, 3], [0, 4, 1, 2, 3], [3, 1], [4, 0, 0, 2], [1, 1, 1, 1, 1]]
    texts.append(twin)
    tables.rows([texts[0], twin])  # before one of them gets a last block of its own
    for turn in range(30):
        batch = [texts[i] for i in orders[turn % 5]]
        for text in set(batch):
            manager.append(text, [turn])
        if turn % 4 == 3:  # another text, longer or shorter: more of them than there are rows
            manager.free(texts[2])
            texts[2], _ = manager.allocate([9 + turn] * (2 + turn % 5))
            batch = [texts[i] for i in (2, 0)]
        before = dict(tables.written)
        rows = tables.rows(batch)
        for row, text in zip(rows, batch, strict=True):
            assert tables.table[row].tolist()[: len(text.table)] == text.table
            assert text not in before or before[text][0] == row
        assert tables.table[5].tolist() == [60] * 20
    assert len(set(tables.rows(texts))) == 5
