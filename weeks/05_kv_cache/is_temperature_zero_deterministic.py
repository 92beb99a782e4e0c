"""The same prompt at temperature zero, alone and in company: the same bits?

A prompt is read alone and as the first row of batches of other prompts. Nothing of the other rows
enters its logits, in mathematics. In a computer the shape of a matrix product decides how its sums
are cut, and sums in another order round otherwise.

Expected: read token by token, as texts are written, the bits of the logits depend on how many rows
there are: one text is a matrix times a vector, several are a product of matrices. Read whole, a
prompt is a product of matrices either way, and its bits may well be the same. Where two tokens are
nearly equal the likeliest changes, oftener in bfloat16, and from there the texts part. Filled up to
one fixed shape the products are the same whoever else is there, and so are all bits: batch
invariance, paid with the work on what fills up. On a GPU the weights are random in SmolLM2's shape
(`--weights random`), so that near ties are commoner than in a trained model; and there attention
too is cut by how many texts share the GPU, unless the number of cuts is fixed.

Run     uv run python weeks/05_kv_cache/is_temperature_zero_deterministic.py
        uv run python weeks/05_kv_cache/is_temperature_zero_deterministic.py --device cuda
        --weights random --batches 1 2 4 8 16 64
"""

from dataclasses import dataclass
from typing import Literal

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from implementations.attention.vendor import attention_sdpa
from implementations.lab.findings import Finding, equals
from implementations.lab.script import run
from implementations.models.decoder import SMOLLM2, Decoder
from implementations.sources.text import bible_verses
from implementations.sources.weights import smollm2_tokenizer


@dataclass(frozen=True)
class Config:
    """A prompt alone and in batches."""

    device: str = "cpu"
    weights: Literal["smollm2", "random"] = "smollm2"
    """the packaged ones, or random ones of that shape"""
    prompts: int = 4
    """how many"""
    length: int = 16
    """tokens of each"""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    """how many rows a prompt stands among"""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """of the weights"""


@torch.no_grad()
def logits_in(
    decoder: Decoder, rows: Tensor, first: int, batch: int, fill: int, whole: bool
) -> Tensor:
    """Logits of one prompt, the first of a batch of others, filled up with copies of the last.

    Token by token over a cache, as a server decodes: a product has one row for each text.
    """
    others = [(first + i) % len(rows) for i in range(batch)]
    others += others[-1:] * (fill - batch)
    cache = decoder.empty_cache(len(others), rows.shape[1])
    steps = rows[others].split(rows.shape[1] if whole else 1, dim=1)
    return torch.cat([decoder(tokens, cache)[0] for tokens in steps])


def compare(
    decoder: Decoder, rows: Tensor, config: Config, *, fixed: bool = False, whole: bool = False
) -> tuple[dict[int, float], int, int]:
    """Largest distance from alone for each batch size, turned tokens, and prompts whose bits are
    the same in every batch."""
    apart, turned, same = dict.fromkeys(config.batches, 0.0), 0, 0
    most = max(config.batches)
    for first in range(config.prompts):
        found = [
            logits_in(decoder, rows, first, batch, most if fixed else batch, whole)
            for batch in config.batches
        ]
        for batch, logits in zip(config.batches, found, strict=True):
            distance = (logits.float() - found[0].float()).abs().max().item()
            apart[batch] = max(apart[batch], distance)
            turned += int((logits.argmax(-1) != found[0].argmax(-1)).sum())
        same += all(torch.equal(logits, found[0]) for logits in found)
    return apart, turned, same


def attention_in_company(config: Config) -> list[Finding]:
    """One text's attention from pages, alone and among others: the keys cut by sizes, or always
    into four shares."""
    from implementations.attention.paged_triton import attention_paged_triton

    most, keys, page = max(config.batches), 2048, 16
    pages = torch.randn(2, most * keys // page, page, 3, 64, dtype=torch.bfloat16).cuda()
    query = torch.randn(most, 9, 1, 64, dtype=torch.bfloat16).cuda()
    table = torch.arange(most * keys // page).reshape(most, -1).int().cuda()
    lengths = torch.full((most,), keys, dtype=torch.int32).cuda()
    findings = []
    for name, shares in {"cut by sizes": None, "four shares": 4}.items():
        outputs = [
            attention_paged_triton(
                query[:batch],
                *pages,
                block_table=table[:batch],
                cache_seqlens=lengths[:batch],
                shares=shares,
            )[0]
            for batch in config.batches
        ]
        claim = f"attention, {name}: batch sizes in which a text's bits are those alone"
        same = sum(output.equal(outputs[0]) for output in outputs)
        expected = None if shares is None else equals(len(outputs))
        source = "" if shares is None else "the same sums in the same order"
        findings.append(Finding(claim, same, f"of {len(outputs)}", expected, source=source))
    return findings


def main(config: Config) -> list[Finding]:
    torch.manual_seed(0)
    if config.weights == "smollm2":
        tokens = smollm2_tokenizer().encode(" ".join(list(bible_verses("web").values())[:200])).ids
    else:
        tokens = torch.randint(SMOLLM2.vocabulary, (9999,)).tolist()
    count = max(config.prompts, *config.batches)
    rows = torch.tensor(tokens[: count * config.length]).reshape(count, config.length)
    rows = rows.to(config.device)
    findings, drawn = [], {}
    for dtype in config.dtypes:
        if config.weights == "smollm2":
            decoder = Decoder.from_smollm2(attention_sdpa)
        else:
            decoder = Decoder(SMOLLM2, attention_sdpa).eval()
        decoder = decoder.to(config.device, getattr(torch, dtype))
        apart, turned, same = compare(decoder, rows, config)
        _, still, fixed = compare(decoder, rows, config, fixed=True)
        _, _, whole = compare(decoder, rows, config, whole=True)
        drawn[dtype] = apart
        places = config.prompts * config.length * (len(config.batches) - 1)
        findings += [
            Finding(
                f"{dtype}, token by token: prompts whose bits are the same in every batch",
                same,
                f"of {config.prompts}",
            ),
            Finding(
                f"{dtype}, read whole: prompts whose bits are the same in every batch",
                whole,
                f"of {config.prompts}",
            ),
            Finding(f"{dtype}: largest difference of a logit", max(apart.values())),
            Finding(f"{dtype}: likeliest tokens that changed", turned, f"of {places:,}"),
            Finding(
                f"{dtype}, one fixed shape: prompts whose bits are the same",
                fixed,
                expected=equals(config.prompts),
                source="the same products in the same order",
            ),
            Finding(f"{dtype}, one fixed shape: likeliest tokens that changed", still),
        ]
    draw(drawn)
    return findings + (attention_in_company(config) if config.device == "cuda" else [])


def draw(drawn: dict[str, dict[int, float]]) -> None:
    _, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for dtype, apart in drawn.items():
        axes.plot([str(batch) for batch in apart], list(apart.values()), "o-", label=dtype)
    axes.set_yscale("symlog", linthresh=1e-6)
    axes.set(xlabel="texts in the batch", ylabel="largest difference of a logit")
    axes.set_title("The same prompt, token by token, against itself alone", fontsize=10)
    axes.legend()


if __name__ == "__main__":
    quick = Config(prompts=2, length=4, batches=(1, 2), dtypes=("float32",))
    run(main, Config(), quick=quick)
