"""How near to a copy's speed does decoding from pages come?

Decoding reads every key and value once for one query a text, and computes almost nothing. Its floor
is their bytes. A page table adds a number a page to read, and puts each page anywhere; splitting a
text among programs adds the partial results. Neither should be felt. On a CPU the readable form's
bytes are counted: it gathers the pages into a dense copy, and widens that, before it begins. On a
GPU the kernel is timed, in shares of what a copy on the same device moves a second, beside cuDNN's
kernel over keys in one piece.

Expected: the gathered form moves several times the floor, whatever the page. Goals for the kernel
on an H200: 0.90 of a copy with pages of 64 tokens and 0.85 with 16, for 64 texts of 8,192 keys;
0.80 for one text of 131,072, combining included; texts of ragged lengths within 5% of even ones.

Run     uv run python weeks/05_kv_cache/paged_decode_speed.py
        uv run python weeks/05_kv_cache/paged_decode_speed.py --device cuda
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from implementations.attention.paged import attention_paged
from implementations.attention.paged_triton import attention_paged_triton
from implementations.lab.findings import Finding, at_least
from implementations.lab.memory import moved_bytes
from implementations.lab.script import run
from implementations.lab.timing import time_interleaved


@dataclass(frozen=True)
class Config:
    """Decode attention over pages, for many texts, for a long one and for ragged ones."""

    device: str = "cpu"
    batch: int = 64
    keys: int = 8192
    """of each text; ragged texts have as many together"""
    heads: int = 32
    key_heads: int = 8
    dim: int = 128
    long: int = 131072
    """keys of one text alone"""
    pages: tuple[int, ...] = (16, 64, 256)
    rounds: int = 15
    counted: int = 4
    """texts whose bytes are counted on a CPU, of 512 keys each"""


GOALS = {16: 0.85, 64: 0.90}  # of a copy's speed


@dataclass(frozen=True)
class Texts:
    """Keys and values in shuffled pages, the tables that find them, and a query."""

    query: Tensor
    pages: Tensor  # [2, block, page, key_head, dim]
    tables: dict[str, Tensor]

    @classmethod
    def make(cls, config: Config, lengths: Tensor, page: int, dtype: torch.dtype) -> "Texts":
        like = {"device": config.device, "dtype": dtype}
        counts = -(-lengths // page)
        total, most = int(counts.sum()), int(counts.max())
        used = torch.arange(most) < counts[:, None]
        table = torch.zeros(len(lengths), most, dtype=torch.int32)
        table[used] = torch.randperm(total).int()
        pages = torch.randn(2, total, page, config.key_heads, config.dim, **like)
        query = torch.randn(len(lengths), config.heads, 1, config.dim, **like)
        tables = {"block_table": table, "cache_seqlens": lengths.int()}
        return cls(query, pages, {name: x.to(config.device) for name, x in tables.items()})

    def floor(self) -> int:
        """Bytes of all keys and values in use, of query, output and tables."""
        each = self.pages[:, 0, 0].nbytes
        tables = sum(x.nbytes for x in self.tables.values())
        used = int(self.tables["cache_seqlens"].sum())
        return used * each + 2 * self.query.nbytes + tables

    def paged(self, attention: Callable) -> Callable[[Tensor], Tensor]:
        return partial(attention, key_pages=self.pages[0], value_pages=self.pages[1], **self.tables)


def evenly(config: Config) -> Tensor:
    return torch.full((config.batch,), config.keys)


def ragged(config: Config) -> Tensor:
    """Between nearly nothing and twice as much, in random order; together as many keys as even."""
    lengths = torch.linspace(1, 2 * config.keys - 1, config.batch).round().long()
    return lengths[torch.randperm(config.batch, generator=torch.Generator().manual_seed(0))]


def count(config: Config) -> list[Finding]:
    """Bytes of the readable form over the floor."""
    findings, bars = [], {}
    for page in config.pages:
        texts = Texts.make(config, torch.full((config.counted,), 512), page, torch.float16)
        moved = moved_bytes(texts.paged(attention_paged), texts.query) / texts.floor()
        bars[f"pages of {page}"] = {"gathered": moved}
        findings.append(
            Finding(
                f"pages of {page}: the gathered form moves, times the floor",
                moved,
                "x",
                expected=at_least(3.0),
                source="a dense copy is written and read, then widened",
            )
        )
    draw(bars, "bytes moved, in units of the floor")
    return findings


def measure(config: Config) -> list[Finding]:
    """Shares of a copy's speed."""
    dtype = torch.bfloat16
    source = torch.randn(2**29, device=config.device, dtype=dtype)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes

    def shares(forms: dict[str, Callable], texts: Texts) -> dict[str, float]:
        calls = {"copy": lambda _: target.copy_(source), **forms}
        timings = time_interleaved(calls, texts.query, rounds=config.rounds)
        speed = copied / timings.median("copy") / 1e12
        findings.append(Finding("a copy reads and writes", speed, "TB/s"))
        return {name: timings.ratio(name, "copy") * texts.floor() / copied for name in forms}

    findings, bars, even = [], {}, {}
    for page in config.pages:
        texts = Texts.make(config, evenly(config), page, dtype)
        forms = {"kernel": texts.paged(attention_paged_triton)}
        if page == config.pages[-1]:
            order = texts.tables["block_table"].long()
            dense = texts.pages[:, order].flatten(2, 3).transpose(2, 3).contiguous()
            forms["cuDNN, in one piece"] = partial(cudnn, key=dense[0], value=dense[1])
        found = shares(forms, texts)
        even[page] = found["kernel"]
        goal = at_least(GOALS[page]) if page in GOALS else None
        label = f"{config.batch} texts of {config.keys:,} keys, pages of {page}"
        bars[label] = found
        findings.append(Finding(f"{label}: share of a copy", found["kernel"], goal=goal))
        for name in set(found) - {"kernel"}:
            findings.append(Finding(f"the same keys by {name}", found[name]))
    del texts, forms
    for page in config.pages[:2]:
        texts = Texts.make(config, ragged(config), page, dtype)
        found = shares({"kernel": texts.paged(attention_paged_triton)}, texts)
        bars[f"{config.batch} ragged texts, pages of {page}"] = found
        claim = f"ragged texts, pages of {page}: speed over that of even ones"
        findings.append(Finding(claim, found["kernel"] / even[page], goal=at_least(0.95)))
    for page in config.pages[:2]:
        texts = Texts.make(config, torch.tensor([config.long]), page, dtype)
        found = shares({"kernel": texts.paged(attention_paged_triton)}, texts)
        label = f"one text of {config.long:,} keys, pages of {page}"
        bars[label] = found
        claim = f"{label}, combining included: share of a copy"
        findings.append(Finding(claim, found["kernel"], goal=at_least(0.80)))
    draw(bars, "share of a copy's bytes a second")
    copies = [f for f in findings if f.claim == "a copy reads and writes"]
    return [copies[0], *(f for f in findings if f not in copies)]


def cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(query, key, value, enable_gqa=True)


def draw(bars: dict[str, dict[str, float]], label: str) -> None:
    """A group of horizontal bars for each case."""
    forms = list(dict.fromkeys(form for group in bars.values() for form in group))
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(bars) + 1.2), layout="constrained")
    for offset, form in enumerate(forms):
        cases = {i: group[form] for i, group in enumerate(bars.values()) if form in group}
        axes.barh([i + 0.3 * offset for i in cases], list(cases.values()), 0.28, label=form)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlabel(label)
    figure.legend(loc="outside lower center", ncols=len(forms), frameon=False)


def main(config: Config) -> list[Finding]:
    torch.manual_seed(0)
    return count(config) if config.device == "cpu" else measure(config)


if __name__ == "__main__":
    quick = Config(heads=4, key_heads=2, dim=64, batch=2, keys=512, long=1024, counted=2, rounds=3)
    run(main, Config(), quick=quick)
