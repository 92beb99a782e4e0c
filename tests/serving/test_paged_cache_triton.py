"""The pass of fused kernels against the same pass part by part."""

from dataclasses import replace

import pytest
import torch

from implementations.attention.paged_triton import attention_paged_triton
from implementations.attention.positions import rotate_half_split
from implementations.lab.compare import allowed, error
from implementations.models.decoder import Decoder, DecoderConfig
from implementations.serving.block_manager import BlockManager
from implementations.serving.engine import Engine, Parameters
from implementations.serving.paged_cache import Batch, PagedCache, reader
from implementations.serving.paged_cache_triton import reader_triton, turn_and_keep
from implementations.serving.scheduler import Chunk, Request

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("heads", "key_heads", "dim", "dtype"),
    [(9, 3, 64, torch.float32), (5, 1, 6, torch.float64), (2, 2, 2, torch.float64)],
    ids=str,
)
def test_a_row_is_turned_and_kept(heads, key_heads, dim, dtype):
    """Heads and pairs that fill no power of two; the rest of the pages stays as it was."""
    row = torch.randn(7, (heads + 2 * key_heads) * dim, dtype=dtype, device=DEVICE)
    pages = torch.randn(2, 5, 4, key_heads, dim, dtype=dtype, device=DEVICE)
    positions = torch.tensor([3, 0, 1, 500, 700, 9, 2], device=DEVICE)
    slots = torch.tensor([0, 19, 4, 7, 1, 18, 10], device=DEVICE)
    query, key, value = row.clone().unflatten(1, (-1, dim)).split([heads, key_heads, key_heads], 1)
    turned = [rotate_half_split(x.transpose(0, 1), positions, 300.0) for x in (query, key)]
    expected = pages.clone()
    expected[0].flatten(0, 1)[slots] = turned[1].transpose(0, 1)
    expected[1].flatten(0, 1)[slots] = value
    got = turn_and_keep(row, pages, positions, slots, 300.0)
    tolerance = 1e-10 if dtype == torch.float64 else 5e-4  # 4 times the last bit of an angle of 700
    close = {"rtol": 0, "atol": tolerance}
    torch.testing.assert_close(got, turned[0].transpose(0, 1), **close)
    torch.testing.assert_close(pages, expected, **close)


def test_other_rows_are_refused():
    row, pages = torch.zeros(3, 40, device=DEVICE), torch.zeros(2, 4, 4, 2, 8, device=DEVICE)
    places = torch.zeros(3, dtype=torch.long, device=DEVICE)
    for wrong, words in (
        ((row[:, :32], pages), "no queries beside 2 key heads of 8 in 32"),
        ((row[:, :36], pages), "no queries beside 2 key heads of 8 in 36"),
        ((row.double(), pages), "the row is torch.float64"),
        ((row.t().contiguous().t(), pages), "one after another"),
        ((row, pages.transpose(1, 2)), "one after another"),
    ):
        with pytest.raises(ValueError, match=words):
            turn_and_keep(*wrong, places, places)


def awake(config: DecoderConfig, dtype: torch.dtype) -> Decoder:
    decoder = Decoder(config).to(DEVICE, dtype).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return decoder


def batch_of(manager: BlockManager, *lengths: int) -> Batch:
    """Random texts of these lengths, none of them read."""
    chunks = []
    for length in lengths:
        request = Request(torch.randint(29, (length,)).tolist(), length)
        request.text, _ = manager.allocate(request.tokens)
        chunks.append(Chunk(request, 0, length))
    return Batch.of(chunks, manager.page, torch.device(DEVICE))


CONFIG = DecoderConfig(29, 24, 2, 6, 20, positions=64, key_value_heads=2, rotary_base=300.0)


@torch.no_grad()
def test_a_pass_has_the_same_logits():
    """Texts of several lengths; the weights stay the decoder's, changes and all."""
    decoder, manager = awake(CONFIG, torch.float64), BlockManager(20, 3)
    before = {name: weight.clone() for name, weight in decoder.state_dict().items()}
    caches = PagedCache(decoder, 20, 3), PagedCache(decoder, 20, 3)
    naive, fast = reader(decoder, caches[0]), reader_triton(decoder, caches[1])
    batch = batch_of(manager, 1, 2, 2, 7)
    torch.testing.assert_close(fast(batch), naive(batch), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(*(c.pages for c in caches), rtol=1e-10, atol=1e-10, equal_nan=True)
    assert all(torch.equal(decoder.state_dict()[name], weight) for name, weight in before.items())
    decoder.blocks[1].attention.key.weight.mul_(2)  # in place: both read it
    decoder.blocks[0].feed_forward.expand.weight.mul_(2)
    torch.testing.assert_close(fast(batch), naive(batch), rtol=1e-10, atol=1e-10)


def test_an_engine_writes_the_same_texts():
    """Too little memory, chunks of prompts, greedy and sampled."""
    decoder = awake(CONFIG, torch.float64)
    prompts = [torch.randint(29, (n,)).tolist() for n in (3, 9, 5)]
    wanted = [Parameters(6 + 2 * i, temperature=(i % 2) * 0.8, seed=i) for i in range(3)]
    sizes = {"blocks": 5, "page": 4, "batch": 3, "budget": 8}
    engines = Engine(decoder, **sizes), Engine(decoder, **sizes, reader=reader_triton)
    naive, fast = (engine.generate(prompts, wanted) for engine in engines)
    assert [g.tokens for g in fast] == [g.tokens for g in naive]
    assert engines[1].scheduler.preemptions > 0


def test_other_styles_are_refused():
    for options, words in (({"norm": "layer"}, "rms, rotary, swiglu"), ({"bias": True}, "biases")):
        decoder = Decoder(replace(CONFIG, **options))
        with pytest.raises(ValueError, match=words):
            reader_triton(decoder, PagedCache(decoder, 4, 4))


@pytest.mark.cuda
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_pass_is_as_accurate(dtype):
    """SmolLM2's heads, compiled, against the same weights in float64."""
    config = DecoderConfig(97, 576, 2, 9, 1536, positions=600, key_value_heads=3)
    decoder, manager = Decoder(config).to(DEVICE, dtype).eval(), BlockManager(200, 16)
    batch = batch_of(manager, *range(1, 60), 300)
    naive = reader(decoder, PagedCache(decoder, 200, 16))(batch)
    fast = reader_triton(decoder, PagedCache(decoder, 200, 16, attention_paged_triton))(batch)
    exact = decoder.double()
    exact = reader(exact, PagedCache(exact, 200, 16))(batch)
    limit, seen = allowed(naive, exact), error(fast, exact)
    assert seen.largest <= limit.largest and seen.mean <= limit.mean
