"""Why does fp16 need a loss scale, and bf16 none?

The gradients of a small decoder on the World English Bible, after some steps of training: those of
its activations, where fp16 training first loses them. How many are below the formats' smallest
numbers, how many a scale saves, and how the dynamic scale finds its place.

Expected: a share of fp16's gradients is zero without a scale, and hardly any with the scale that
the dynamic rule finds; bf16 loses none.

Paper   Micikevicius et al. 2017, arXiv:1710.03740, figure 3
Run     uv run python weeks/06_mixed_precision/loss_scaling.py
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from implementations.lab.findings import Finding, at_least, at_most
from implementations.lab.script import run
from implementations.models.decoder import Decoder, DecoderConfig
from implementations.precision.formats import BF16, FP16, rounded
from implementations.precision.loss_scaling import DYNAMIC, next_scale
from implementations.sources.text import bible_characters
from implementations.training.accumulation import next_token_loss

LENGTH, BATCH = 64, 16


@dataclass(frozen=True)
class Config:
    """Look at gradients."""

    width: int = 96
    layers: int = 3
    steps: int = 150
    """training before the look"""
    trace: int = 120
    """steps of the dynamic scale"""


def main(config: Config) -> list[Finding]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text, alphabet = bible_characters("web")
    sizes = {"width": config.width, "layers": config.layers, "heads": 4}
    decoder = Decoder(
        DecoderConfig(len(alphabet), hidden=2 * config.width, positions=LENGTH, **sizes)
    )
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    kept: list[Tensor] = []
    for block in decoder.blocks:
        block.register_full_backward_hook(lambda module, into, out: kept.append(out[0]))

    def backward() -> None:
        kept.clear()
        rows = text[torch.randint(len(text) - LENGTH, (BATCH, 1)) + torch.arange(LENGTH + 1)]
        total, count = next_token_loss(decoder, rows)
        optimizer.zero_grad()
        (total / count).backward()

    for _ in range(config.steps):
        backward()
        optimizer.step()
    backward()
    gradients = torch.cat([g.flatten() for g in kept])
    gradients = gradients[gradients != 0]
    size = gradients.abs().log2()

    scale, count, trace, skipped = 2.0**24, 0, [], 0
    rule = DYNAMIC._replace(growth_interval=20)
    for _ in range(config.trace):
        backward()
        largest = max(g.abs().max().item() for g in kept)
        finite = largest * scale <= FP16.largest
        trace.append(scale)
        skipped += not finite
        scale, count = next_scale(scale, count, finite, rule)
        optimizer.step()

    _, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.hist(size.numpy(), bins=80, density=True)
    left.axvline(-24, color="C3", label="fp16's smallest number, 2⁻²⁴")
    left.axvline(-14, color="C1", label="fp16 is precise from 2⁻¹⁴ on")
    left.set(xlabel="log2 |gradient|", ylabel="density", title="Gradients of the activations")
    left.legend()
    right.semilogy(trace, base=2)
    right.set(xlabel="step", ylabel="loss scale", title="The dynamic scale")

    def lost(scale: float, target) -> float:
        return (rounded(gradients * scale, target) == 0).double().mean().item()

    settled = sorted(trace[config.trace // 2 :])[0]
    precise = lambda s: ((gradients * s).abs() >= FP16.smallest_normal).double().mean().item()  # noqa: E731
    return [
        Finding("gradients looked at", len(gradients)),
        Finding("median size of a gradient, as a power of two", size.median().item()),
        Finding("become zero in fp16 without a scale", lost(1.0, FP16)),
        Finding(
            "become zero in fp16 under the dynamic scale",
            lost(settled, FP16),
            expected=at_most(1e-3),
        ),
        Finding("become zero in bf16", lost(1.0, BF16), expected=at_most(0.0)),
        Finding("are fp16's normal numbers without a scale", precise(1.0)),
        Finding(
            "are normal numbers under the dynamic scale", precise(settled), expected=at_least(0.9)
        ),
        Finding(
            "the scale that the rule settles at, as a power of two",
            torch.tensor(settled).log2().item(),
        ),
        Finding("steps skipped on the way, of all", skipped / config.trace),
    ]


if __name__ == "__main__":
    run(main, Config(), quick=Config(width=32, layers=2, steps=10, trace=40))
