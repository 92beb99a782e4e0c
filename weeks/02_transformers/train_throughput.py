"""How much of a GPU does a readable GPT-2 use?

A training step of our 124-million-parameter GPT-2 (forward, backward, fused AdamW; bfloat16
autocast, torch.compile) on random tokens, in turn with transformers' GPT-2 under the same settings
and the same attention kernel, cuDNN's where there is one. Speed is counted as MFU: the operations
that the model needs, 6 a parameter and token and the attention's, over what the card's matrix units
can do.

Expected: for small GPTs on one H100, the best published figures lie between 39.8% and 46%.

Run     uv run python weeks/02_transformers/train_throughput.py --device cuda
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config, GPT2LMHeadModel

from implementations.attention.vendor import attention_sdpa
from implementations.lab.findings import Finding, at_least
from implementations.lab.script import run
from implementations.lab.timing import time_interleaved
from implementations.models.decoder import GPT2, Decoder, DecoderConfig
from implementations.training.throughput import training_step
from implementations.training.utilisation import flops_per_token, utilisation


@dataclass(frozen=True)
class Config:
    """One training step of GPT-2 124M, ours against transformers'."""

    device: str = "cpu"
    batch: int = 1
    """texts in a step: 64 fills an H200"""
    length: int = 256
    """tokens in a text"""
    layers: int = 12
    vocabulary: int = 50304
    """the next multiple of 128 after GPT-2's 50,257"""
    rounds: int = 3
    """timed rounds"""
    compiled: bool = False
    """through torch.compile"""
    peak: float = 0.0
    """the device's dense bfloat16 rate in FLOP/s, for MFU: 989e12 for an H200; 0 leaves it out"""


def transformers_gpt2(shape: DecoderConfig) -> nn.Module:
    """transformers' GPT-2 of the same sizes, without dropout, as ours has none."""
    config = GPT2Config(
        vocab_size=shape.vocabulary,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_positions=shape.positions,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return GPT2LMHeadModel(config)


@contextmanager
def fastest_attention(device: str) -> Iterator[None]:
    """cuDNN's attention on a GPU, torch's choice elsewhere."""
    if device == "cpu":
        yield
        return
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        yield


def main(config: Config) -> list[Finding]:
    torch.manual_seed(0)
    shape = replace(GPT2, layers=config.layers, vocabulary=config.vocabulary)
    ours = Decoder(shape, attention_sdpa).to(config.device)
    theirs = transformers_gpt2(shape).to(config.device)
    tokens = torch.randint(
        config.vocabulary, (config.batch, config.length + 1), device=config.device
    )
    how = {"device": config.device, "compiled": config.compiled}
    steps = {
        "ours": training_step(ours, ours.parameters(), **how),
        "transformers": training_step(lambda x: theirs(x).logits, theirs.parameters(), **how),
    }
    batch = tokens[:, :-1], tokens[:, 1:]
    with fastest_attention(config.device):
        timings = time_interleaved(steps, *batch, rounds=config.rounds, warmup=2)

    parameters = sum(p.numel() for p in ours.parameters())
    counted = parameters - ours.positions.table.numel()  # a lookup costs nothing
    work = flops_per_token(counted, shape.layers, shape.width, config.length)
    findings = [
        Finding("parameters of the model", parameters),
        Finding(
            "our training step, times transformers' speed",
            timings.ratio("ours", "transformers"),
            "x",
            goal=at_least(1.0),
            spread=timings.spread("ours", "transformers"),
        ),
    ]
    for name in steps:
        speed = config.batch * config.length / timings.median(name)
        findings.append(Finding(f"{name}: training throughput", speed, "tokens/s"))
        if config.peak:
            share = utilisation(speed, work, config.peak)
            goal = at_least(0.40) if name == "ours" else None
            findings.append(Finding(f"{name}: MFU", share, goal=goal))
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(length=32, layers=2, vocabulary=512, rounds=2))
