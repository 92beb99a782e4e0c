"""Why does a language model keep keys and values?

A causal decoder's keys and values of the tokens before never change. Without a cache each new token
is paid for with a pass over the whole text; with one, with a pass over one token that looks at what
is kept. SmolLM2-135M reads texts of growing length; the next token's operations are counted, and
both ways are timed in turn.

Expected, with P weights, L layers of width w and n tokens: without a cache a token costs
2 P n + 4 L w n² operations, with one 2 P + 4 L w n. The exponents of n are near 1 and near 0, until
attention outgrows the weights: then 2 and 1. At 512 tokens a cache should make a token at least ten
times as fast.

Run     uv run python weeks/05_kv_cache/why_a_cache.py
"""

from collections.abc import Callable
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from implementations.attention.vendor import attention_sdpa
from implementations.lab.findings import Finding, at_least, at_most, equals, within
from implementations.lab.script import run
from implementations.lab.timing import time_interleaved
from implementations.models.decoder import Decoder, DecoderConfig
from implementations.serving.kv_cache import CachedDecoder
from implementations.sources.text import bible_verses
from implementations.sources.weights import smollm2_tokenizer
from implementations.text.sampling import generate


@dataclass(frozen=True)
class Config:
    """The next token after texts of several lengths, with a cache and without."""

    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """tokens that the text has; exponents are fitted to all of them"""
    at: int = 512
    """the length whose ratio is set against the goal"""
    written: int = 24
    """tokens written both ways, to see that they are the same"""
    rounds: int = 7
    small: bool = False
    """a small random model instead of SmolLM2"""


STYLES = {"without a cache": "C0o-", "with a cache": "C1s-"}


def model(config: Config) -> Decoder:
    if not config.small:
        return Decoder.from_smollm2(attention_sdpa)
    sizes = {"vocabulary": 1000, "width": 128, "layers": 4, "heads": 4, "hidden": 512}
    return Decoder(DecoderConfig(**sizes, positions=2048), attention_sdpa).eval()


def text(config: Config, decoder: Decoder) -> Tensor:
    """As many tokens of the World English Bible as the longest text has."""
    longest = max(config.lengths)
    if config.small:
        return torch.randint(decoder.config.vocabulary, (1, longest))
    verses = " ".join(bible_verses("web").values())[: 8 * longest]
    return torch.tensor([smollm2_tokenizer().encode(verses).ids[:longest]])


def forms(decoder: Decoder, length: int, tokens: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """The pass that gives the logits after a text, both ways; the cached one can be repeated."""
    cache = decoder.empty_cache(1, length)
    decoder(tokens[:, : length - 1], cache)

    def cached(tokens: Tensor) -> Tensor:
        cache.truncate(length - 1)
        return decoder(tokens[:, length - 1 : length], cache)[:, -1]

    return {
        "without a cache": lambda tokens: decoder(tokens[:, :length])[:, -1],
        "with a cache": cached,
    }


def counted(call: Callable[[Tensor], Tensor], tokens: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        call(tokens)
    return counter.get_total_flops()


def formula(decoder: Decoder, length: int, new: int) -> int:
    """2 P + 4 L w n operations for each of the new tokens; the table counts once, as the head."""
    config = decoder.config
    weights = sum(p.numel() for p in decoder.parameters() if p.ndim == 2)
    return new * (2 * weights + 4 * config.layers * config.width * length)


def exponent(lengths: tuple[int, ...], costs: list[float]) -> float:
    return float(np.polyfit(np.log(lengths), np.log(costs), 1)[0])


def main(config: Config) -> list[Finding]:
    with torch.no_grad():
        return compare(config)


def compare(config: Config) -> list[Finding]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    decoder = model(config)
    tokens = text(config, decoder)
    seconds: dict[str, list[float]] = {name: [] for name in STYLES}
    operations: dict[str, list[float]] = {name: [] for name in STYLES}
    ratio, spread, apart, off = 0.0, 0.0, 0.0, 0
    for length in tqdm(config.lengths, desc="lengths", unit="length"):
        both = forms(decoder, length, tokens)
        results = [call(tokens) for call in both.values()]
        apart = max(apart, (results[0] - results[1]).abs().max().item())
        timings = time_interleaved(both, tokens, rounds=config.rounds, warmup=1)
        for name, call in both.items():
            seconds[name].append(timings.median(name))
            operations[name].append(counted(call, tokens))
        for name, new in (("without a cache", length), ("with a cache", 1)):
            off = max(off, abs(operations[name][-1] - formula(decoder, length, new)))
        if length == config.at:
            ratio = timings.ratio("with a cache", "without a cache")
            spread = timings.spread("with a cache", "without a cache")
    prompt = tokens[:, :32]
    cached = CachedDecoder(decoder, decoder.empty_cache(1, 32 + config.written))
    same = torch.equal(
        generate(cached, prompt, config.written), generate(decoder, prompt, config.written)
    )
    draw(config, seconds, operations)
    slopes = {name: exponent(config.lengths, times) for name, times in seconds.items()}
    place = config.lengths.index(config.at)
    counts = {name: exponent(config.lengths, numbers) for name, numbers in operations.items()}
    return [
        Finding("operations counted, away from the formulas by at most", off, expected=equals(0)),
        Finding(
            "operations of a token grow with the text to the power, without a cache",
            counts["without a cache"],
            expected=within(1.0, 2.0),
        ),
        Finding(
            "and with one", counts["with a cache"], expected=within(0.0, 1.0)
        ),
        Finding("time of a token, without a cache", slopes["without a cache"]),
        Finding("and with one", slopes["with a cache"], goal=at_most(0.3)),
        *(
            Finding(f"a token after {config.at}, {name}", 1e3 * times[place], "ms")
            for name, times in seconds.items()
        ),
        Finding(
            f"at {config.at} tokens, with a cache, times the speed without",
            ratio,
            "x",
            spread=spread,
            goal=at_least(10.0),
        ),
        Finding("the two logits differ by at most", apart, expected=at_most(1e-2)),
        Finding(f"the same {config.written} tokens are written", same, expected=equals(True)),
    ]  # fmt: skip


def draw(config: Config, seconds: dict, operations: dict) -> None:
    _, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, lines, label in (
        (left, operations, "operations of the next token"),
        (right, seconds, "seconds of the next token"),
    ):
        for name, values in lines.items():
            axes.loglog(config.lengths, values, STYLES[name], label=name)
        axes.set_xticks(config.lengths, [f"{length:,}" for length in config.lengths])
        axes.xaxis.minorticks_off()
        axes.set(xlabel="tokens of the text", ylabel=label)
        axes.legend()


if __name__ == "__main__":
    quick = Config(lengths=(32, 64, 128), at=128, written=8, rounds=3, small=True)
    run(main, Config(), quick=quick)
