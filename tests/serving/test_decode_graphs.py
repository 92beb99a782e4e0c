"""Replayed graphs against passes that are launched kernel by kernel."""

import pytest
import torch

from implementations.attention.paged_triton import attention_paged_triton
from implementations.models.decoder import Decoder, DecoderConfig
from implementations.serving.decode_graphs import DecodeGraphs, sizes
from implementations.serving.engine import Engine, Parameters
from implementations.serving.paged_cache import PagedCache

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


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
def test_graphs_write_the_same_texts(dtype):
    """Batches that grow, shrink and are filled up; too little memory; greedy and sampled."""
    decoder = Decoder(CONFIG).to("cuda", dtype).eval()
    for parameter in decoder.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.4)
    prompts = [torch.randint(97, (n,)).tolist() for n in (3, 30, 17, 8, 40, 5, 21)]
    wanted = [Parameters(5 + 4 * i, temperature=(i % 2) * 0.8, seed=i) for i in range(7)]
    sizes = {"blocks": 20, "page": 16, "batch": 6, "budget": 64, "longest": 96}
    plain = Engine(decoder, **sizes).generate(prompts, wanted)
    engine = Engine(decoder, **sizes, attention=attention_paged_triton, graphs=True)
    replayed = []
    graphs, engine.graphs = engine.graphs, lambda chunks: replayed.append(1) or graphs(chunks)
    assert [g.tokens for g in engine.generate(prompts, wanted)] == [g.tokens for g in plain]
    assert len(replayed) > 20
