"""A decoder over pages: block manager, page table and gathering together write the same text."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from implementations.attention.paged import attention_paged, gather_pages
from implementations.models.decoder import Decoder, DecoderConfig
from implementations.serving.block_manager import BlockManager, Text
from implementations.serving.kv_cache import KeyValueCache, LayerCache
from implementations.text.sampling import generate

CONFIG = DecoderConfig(
    vocabulary=97, width=32, layers=2, heads=4, hidden=80, positions=64, key_value_heads=2
)
LENGTH = 12


class PagedLayer(LayerCache):
    """One text's keys and values of one layer, written to and gathered from shared pages."""

    def __init__(self, key_pages: Tensor, value_pages: Tensor, table: list[int], length: int):
        self.key, self.value, self.length = key_pages, value_pages, length
        self.table = torch.tensor([table], dtype=torch.int32)

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        page, start = self.key.shape[1], self.length
        self.length = start + key.shape[2]
        places = torch.arange(start, self.length)
        blocks = self.table[0, places // page].long()
        for pages, new in ((self.key, key), (self.value, value)):
            pages[blocks, places % page] = new[0].transpose(0, 1)
        lengths = torch.tensor([self.length], dtype=torch.int32)
        return tuple(gather_pages(pages, self.table, lengths) for pages in (self.key, self.value))


@dataclass
class Server:
    """A decoder, its pages, and who owns them."""

    decoder: Decoder
    manager: BlockManager
    pages: list[Tensor]

    @classmethod
    def make(cls, decoder: Decoder, page: int, blocks: int) -> "Server":
        shape = (2, blocks, page, CONFIG.key_value_heads, CONFIG.width // CONFIG.heads)
        pages = [torch.full(shape, torch.nan).double() for _ in decoder.blocks]
        return cls(decoder, BlockManager(blocks, page), pages)

    def read(self, text: Text, start: int) -> int:
        """Read the text from `start` on; the likeliest next token."""
        layers = [PagedLayer(*pages, text.table, start) for pages in self.pages]
        return self.decoder(torch.tensor([text.tokens[start:]]), KeyValueCache(layers))[
            0, -1
        ].argmax()

    def begin(self, prompt: list[int]) -> tuple[Text, int]:
        """The text with its first new token appended but not read, and how much was cached."""
        text, known = self.manager.allocate(prompt)
        self.append(text, int(self.read(text, known)))
        return text, known

    def append(self, text: Text, token: int) -> None:
        for source, target in self.manager.append(text, [token]):
            for pages in self.pages:
                pages[:, target] = pages[:, source]

    def go_on(self, texts: list[Text], length: int) -> None:
        """Greedy, every text in turn, until each has `length` tokens."""
        while unfinished := [text for text in texts if len(text.tokens) < length]:
            for text in unfinished:
                self.append(text, int(self.read(text, len(text.tokens) - 1)))


@pytest.fixture
def decoder() -> Decoder:
    decoder = Decoder(CONFIG).double().eval()
    for parameter in decoder.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return decoder


@torch.no_grad()
@pytest.mark.parametrize("page", [1, 4, 16, 64])
def test_the_same_text_with_full_and_partial_prefixes(decoder, page):
    """Prompts alone, one again, one that parts in the middle: what a dense decoder writes."""
    prompts = torch.randint(97, (4, 20))
    prompts[2] = prompts[0]
    prompts[3, :10] = prompts[1, :10]
    expected = generate(decoder, prompts, LENGTH)
    server = Server.make(decoder, page, 4 * (-(-32 // page) + 1))
    texts, known = zip(*(server.begin(prompt) for prompt in prompts.tolist()), strict=True)
    assert known == (0, 0, 19 // page * page, 10 // page * page)
    server.go_on(list(texts), 20 + LENGTH)
    assert [text.tokens for text in texts] == expected.tolist()


@torch.no_grad()
@pytest.mark.parametrize("page", [1, 4, 16])
def test_forks_write_what_they_would_alone(decoder, page):
    """Three forks in the middle of a page, pushed apart by a token each."""
    prompt = torch.randint(97, (1, 10))
    server = Server.make(decoder, page, 4 * (-(-22 // page) + 1))
    text, _ = server.begin(prompt[0].tolist())
    server.read(text, 10)
    texts = [text, *(server.manager.fork(text) for _ in range(2))]
    for fork, token in zip(texts, (5, 6, 7), strict=True):
        server.append(fork, token)
    starts = torch.tensor([fork.tokens for fork in texts])
    server.go_on(texts, 12 + LENGTH - 2)
    assert [fork.tokens for fork in texts] == generate(decoder, starts, LENGTH - 2).tolist()


@torch.no_grad()
def test_freed_pages_serve_another_text(decoder):
    """Room for one text only: each is written over the one before, and the first comes back."""
    server = Server.make(decoder, 4, 8)
    prompts = torch.randint(97, (3, 20))
    expected = generate(decoder, prompts, LENGTH).tolist()
    for i in (0, 1, 2, 0):
        text, known = server.begin(prompts[i].tolist())
        server.go_on([text], 20 + LENGTH)
        assert known == 0 and text.tokens == expected[i]
        server.manager.free(text)


@torch.no_grad()
def test_a_batch_of_ragged_texts_attends_in_one_call(decoder):
    """`attention_paged` over the tables of texts of different lengths: each as if alone."""
    server = Server.make(decoder, 4, 30)
    texts = [server.begin(torch.randint(97, (n,)).tolist())[0] for n in (3, 4, 17)]
    for text in texts:
        server.read(text, len(text.tokens) - 1)
    entries = max(len(text.table) for text in texts)
    table = torch.tensor([t.table + [-1] * (entries - len(t.table)) for t in texts]).int()
    lengths = torch.tensor([len(text.tokens) for text in texts]).int()
    query = torch.randn(3, 4, 1, 8, dtype=torch.float64)
    key_pages, value_pages = server.pages[1]
    tables = {"block_table": table, "cache_seqlens": lengths}
    got = attention_paged(query, key_pages, value_pages, **tables)
    for i, text in enumerate(texts):
        cache = decoder.empty_cache(1, len(text.tokens))
        decoder(torch.tensor([text.tokens]), cache)
        dense = cache.layers[1]
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[i, None], dense.key, dense.value, enable_gqa=True
        )
        torch.testing.assert_close(got[i, None], expected, rtol=1e-10, atol=1e-10)
