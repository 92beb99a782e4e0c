"""A decoder over pages: block manager, page table and gathering together write the same text."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from implementations.attention.paged import attention_paged, gather_pages
from implementations.attention.paged_triton import attention_paged_triton
from implementations.attention.vendor import attention_sdpa
from implementations.lab.compare import allowed, error
from implementations.models.decoder import Decoder, DecoderConfig
from implementations.serving.block_manager import BlockManager, Text
from implementations.serving.kv_cache import CachedDecoder, KeyValueCache, LayerCache
from implementations.sources.text import bible_verses
from implementations.sources.weights import smollm2_tokenizer
from implementations.text.sampling import generate

CONFIG = DecoderConfig(
    vocabulary=97, width=32, layers=2, heads=4, hidden=80, positions=64, key_value_heads=2
)
LENGTH = 8


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
        config, dtype = decoder.config, decoder.embedding.weight.dtype
        shape = (2, blocks, page, config.key_value_heads, config.width // config.heads)
        pages = [torch.full(shape, torch.nan, dtype=dtype) for _ in decoder.blocks]
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
@pytest.mark.parametrize("page", [1, 16, 64, 256])
def test_the_same_text_with_full_and_partial_prefixes(decoder, page):
    """Forty prompts: twenty alone, ten of them again, ten others up to the middle. Each is what a
    dense decoder writes."""
    prompts = torch.randint(97, (40, 20))
    prompts[20:30] = prompts[:10]
    prompts[30:, :10] = prompts[10:20, :10]
    expected = generate(decoder, prompts, LENGTH)
    server = Server.make(decoder, page, 40 * (-(-32 // page) + 1))
    texts, known = zip(*(server.begin(prompt) for prompt in prompts.tolist()), strict=True)
    assert all(length == 19 // page * page for length in known[20:30])
    assert all(length >= 10 // page * page for length in known[30:])
    server.go_on(list(texts), 20 + LENGTH)
    assert [text.tokens for text in texts] == expected.tolist()


@torch.no_grad()
@pytest.mark.parametrize("page", [4, 64])
def test_forks_write_what_they_would_alone(decoder, page):
    """Forty texts: twenty prompts, each forked in the middle of a page and pushed apart."""
    server = Server.make(decoder, page, 41 * (-(-22 // page) + 1))
    texts = []
    for prompt in torch.randint(97, (20, 10)).tolist():
        text, _ = server.begin(prompt)
        server.read(text, 10)
        for fork, token in ((text, 5), (server.manager.fork(text), 6)):
            texts.append(fork)
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


class KernelLayer:
    """Texts of one length in shuffled pages, read where they lie."""

    def __init__(self, pages: Tensor, table: Tensor, positions: Tensor):
        self.pages, self.table, self.positions = pages, table, positions

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        page = self.pages.shape[2]
        blocks = self.table[:, self.positions // page].long()
        for pages, new in zip(self.pages, (key, value), strict=True):
            pages[blocks, self.positions % page] = new.transpose(1, 2)
        lengths = (self.positions[-1:] + 1).int().expand(len(query)).contiguous()
        tables = {"block_table": self.table, "cache_seqlens": lengths}
        return attention_paged_triton(query, *self.pages, **tables, causal=True)


class KernelCache(KeyValueCache):
    def __init__(self, decoder: Decoder, texts: int, capacity: int, page: int):
        config, like = decoder.config, decoder.embedding.weight
        entries = -(-capacity // page)
        table = torch.randperm(texts * entries).reshape(texts, entries).int().to(like.device)
        shape = (2, texts * entries, page, config.key_value_heads, config.width // config.heads)
        self.known, self.table = 0, table
        self.pages = [like.new_full(shape, torch.nan) for _ in decoder.blocks]

    @property
    def length(self) -> int:
        return self.known

    def read(self, decoder: Decoder, tokens: Tensor) -> Tensor:
        """Logits after the text's last token; the new ones are kept."""
        end = self.known + tokens.shape[1]
        positions = torch.arange(self.known, end, device=tokens.device)
        self.layers = [KernelLayer(pages, self.table, positions) for pages in self.pages]
        logits = decoder(tokens, self)[:, -1]
        self.known = end
        return logits


def check_kernel(page: int, texts: int, count: int, device: str) -> None:
    """The decoder over the kernel, a prompt of 20 tokens first."""
    config = DecoderConfig(97, 64, 2, 4, 80, positions=64, key_value_heads=2)
    decoder = Decoder(config).double().to(device).eval()
    for parameter in decoder.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(97, (texts, 20), device=device)
    expected = generate(decoder, tokens, count)
    cache = KernelCache(decoder, texts, 20 + count, page)
    unread = tokens
    for _ in range(count):
        unread = cache.read(decoder, unread).argmax(-1, keepdim=True)
        tokens = torch.cat((tokens, unread), 1)
    assert torch.equal(tokens, expected)


@torch.no_grad()
def test_the_kernel_writes_the_same_text():
    check_kernel(page=16, texts=2, count=4, device="cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.cuda
@torch.no_grad()
@pytest.mark.parametrize("page", [16, 64, 256])
def test_the_compiled_kernel_writes_the_same_forty_texts(page):
    check_kernel(page, texts=40, count=30, device="cuda")


# SmolLM2


def verses(count: int, length: int) -> Tensor:
    """Tokens of the World English Bible, in `count` pieces."""
    text = " ".join(bible_verses("web").values())[: 10 * count * length]
    ids = smollm2_tokenizer().encode(text).ids[: count * length]
    return torch.tensor(ids).reshape(count, length)


@pytest.mark.full
@torch.no_grad()
def test_smollm2_cached_is_as_accurate_as_uncached():
    """Against the same weights in float64."""
    decoder, tokens = Decoder.from_smollm2(attention_sdpa), verses(2, 64)
    cache = decoder.empty_cache(2, 64)
    pieces = [decoder(piece, cache) for piece in tokens.split([40] + [1] * 24, 1)]
    uncached = decoder(tokens)
    exact = decoder.double()(tokens)
    limit, seen = allowed(uncached, exact), error(torch.cat(pieces, 1), exact)
    assert seen.largest <= limit.largest and seen.mean <= limit.mean


@pytest.mark.full
@torch.no_grad()
def test_smollm2_writes_the_same_forty_texts():
    """Without a cache, with one, and in pages of each size, with prompts in full and in part."""
    decoder, prompts = Decoder.from_smollm2(attention_sdpa), verses(40, 20)
    prompts[20:30] = prompts[:10]
    prompts[30:, :10] = prompts[10:20, :10]
    expected = generate(decoder, prompts, LENGTH)
    cached = CachedDecoder(decoder, decoder.empty_cache(40, 20 + LENGTH))
    assert torch.equal(generate(cached, prompts, LENGTH), expected)
    for page in (16, 64, 256):
        server = Server.make(decoder, page, 40 * (-(-32 // page) + 1))
        texts = [server.begin(prompt)[0] for prompt in prompts.tolist()]
        server.go_on(texts, 20 + LENGTH)
        assert [text.tokens for text in texts] == expected.tolist()
