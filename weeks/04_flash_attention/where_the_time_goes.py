"""How much of a language model's time is attention?

SmolLM2's blocks read texts of growing length, with attention as the equation, with a fast kernel,
and with none at all (the queries are handed through); what is missing then is attention's share.
Beside it stands the share that the operations alone would give: with width w, length n and P
parameters in a block, attention takes 4 n² w operations of 4 n² w + 2 n P, softmax not counted.

Expected: the share grows with the length, from a few hundredths to most of the time. The equation
takes more than its operations say, because it carries its matrices through memory; a fast kernel
takes less on long texts, because it leaves out the half of them that a causal mask hides.

Run     uv run python weeks/04_flash_attention/where_the_time_goes.py
        uv run python weeks/04_flash_attention/where_the_time_goes.py --device cuda --layers 30
        --tokens 32768 --lengths 512 1024 2048 4096 8192
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from implementations.attention.vendor import attention_sdpa
from implementations.attention_basic import attention_naive
from implementations.lab.findings import Finding, at_most
from implementations.lab.script import run
from implementations.lab.timing import Timings, time_interleaved
from implementations.models.decoder import SMOLLM2, Decoder, DecoderConfig


@dataclass(frozen=True)
class Config:
    """Attention's share of the blocks of SmolLM2, random weights."""

    lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    """texts of so many tokens"""
    tokens: int = 2048
    """tokens in a pass: short texts come in large batches, so that a GPU is as full for each"""
    layers: int = 4
    """the share is nearly the same for any number: the final scores are left out"""
    rounds: int = 5
    device: str = "cpu"


STYLES = {"operations": "k--", "no attention": "C7o-", "naive": "C0o-"}  # the fast form is orange


def no_attention(query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
    """Costs nothing and has the right shape."""
    return query


def fast_attention(device: str) -> tuple[str, Callable[..., Tensor]]:
    """Our kernel on a GPU, torch's on a CPU."""
    if device == "cpu":
        return "torch", attention_sdpa
    from implementations.attention.flash_triton import flash_attention_triton

    return "flash", flash_attention_triton


def operations(shape: DecoderConfig, length: int, attention: Callable[..., Tensor]) -> int:
    """Operations in the matrix products of the blocks, counted without computing anything."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        decoder = Decoder(shape, attention)
        decoder.hidden(torch.zeros(1, length, dtype=torch.long))
    return counter.get_total_flops()


def share(timings: Timings, name: str) -> float:
    """The part of the time that goes when attention does."""
    return 1 - 1 / timings.ratio("no attention", name)


def draw(config: Config, shares: dict[str, list[float]], seconds: dict[str, list[float]]) -> None:
    """The share, and where it comes from: time per token."""
    _, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, values in shares.items():
        panels[0].semilogx(config.lengths, values, STYLES.get(name, "C1o-"), label=name)
    for name, values in seconds.items():
        micro = [1e6 * value for value in values]
        panels[1].semilogx(config.lengths, micro, STYLES.get(name, "C1o-"), label=name)
    panels[0].set(title="attention's share of the blocks", xlabel="tokens", ylim=(0, 1))
    panels[1].set(title="microseconds a token", xlabel="tokens", ylim=(0, None))
    for axes in panels:
        axes.set_xticks(config.lengths, [f"{length:,}" for length in config.lengths])
        axes.xaxis.minorticks_off()
        axes.legend()


def main(config: Config) -> list[Finding]:
    torch.manual_seed(0)
    shape = replace(SMOLLM2, layers=config.layers, positions=max(config.lengths))
    dtype = torch.float32 if config.device == "cpu" else torch.bfloat16
    fast, kernel = fast_attention(config.device)
    forms = {"no attention": no_attention, "naive": attention_naive, fast: kernel}
    decoders = {
        name: Decoder(shape, form).to(config.device, dtype).eval() for name, form in forms.items()
    }
    shares: dict[str, list[float]] = {"operations": [], "naive": [], fast: []}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    away = 0
    # A block's parameters in matrix products: all but the two norms.
    parameters = sum(p.numel() for p in decoders["naive"].blocks.parameters() if p.ndim > 1)
    for length in tqdm(config.lengths, desc="lengths", unit="length"):
        all_, rest = (operations(shape, length, f) for f in (attention_naive, no_attention))
        attention = 4 * length**2 * shape.width * shape.layers
        away = max(away, abs(all_ - rest - attention), abs(rest - 2 * length * parameters))
        shares["operations"].append(1 - rest / all_)
        batch = max(1, config.tokens // length)
        tokens = torch.randint(shape.vocabulary, (batch, length), device=config.device)
        calls = {name: decoder.hidden for name, decoder in decoders.items()}
        with torch.no_grad():
            timings = time_interleaved(calls, tokens, rounds=config.rounds, warmup=1)
        for name in (fast, "naive"):
            shares[name].append(share(timings, name))
        for name in forms:
            seconds[name].append(timings.median(name) / tokens.numel())
    draw(config, shares, seconds)
    half = parameters / (2 * shape.width * shape.layers)
    findings = [
        Finding(
            "operations counted, away from 4 n² w + 2 n P by at most", away, expected=at_most(0)
        ),
        Finding("attention is half of the operations at", round(half), "tokens"),
    ]
    for place in (0, -1):
        length = config.lengths[place]
        findings += [
            Finding(f"attention's share at {length} tokens, {name}", values[place])
            for name, values in shares.items()
        ]
    longest = (
        f"the blocks with {fast} attention at {config.lengths[-1]} tokens, times naive's speed"
    )
    ratio, spread = timings.ratio(fast, "naive"), timings.spread(fast, "naive")
    return [*findings, Finding(longest, ratio, "x", spread=spread)]


if __name__ == "__main__":
    run(main, Config(), quick=Config(lengths=(64, 256), tokens=256, layers=1, rounds=2))
