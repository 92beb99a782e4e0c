"""Is the readable decoder as fast as transformers on a laptop?

SmolLM2-135M reads the same tokens twice, in our decoder with torch's attention kernel and in
transformers' Llama with the same weights, the same kernel, the same threads and float32. Round by
round, in turn.

Expected: nearly all of the time is in matrix products that both leave to the same library, so
neither can win by much; a readable model need not be slower.

Run     uv run python weeks/02_transformers/forward_speed.py
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from implementations.attention.vendor import attention_sdpa
from implementations.lab.compare import error
from implementations.lab.findings import Finding, at_least, at_most
from implementations.lab.script import run
from implementations.lab.timing import time_interleaved
from implementations.models.decoder import SMOLLM2, Decoder
from implementations.models.llama_in_transformers import llama_in_transformers


@dataclass(frozen=True)
class Config:
    """One forward pass, ours against transformers'."""

    tokens: int = 512
    """length of the text"""
    layers: int = 30
    """layers of SmolLM2's shape; with fewer, its first ones"""
    rounds: int = 15
    """timed rounds"""


def main(config: Config) -> list[Finding]:
    torch.manual_seed(0)
    shape = replace(SMOLLM2, layers=config.layers)
    naive, vendor = Decoder(shape).eval(), Decoder(shape, attention_sdpa).eval()
    if config.layers == SMOLLM2.layers:
        naive = Decoder.from_smollm2()
    vendor.load_state_dict(naive.state_dict())
    theirs = llama_in_transformers(naive)
    tokens = torch.randint(SMOLLM2.vocabulary, (1, config.tokens))

    def transformers_logits(tokens: Tensor) -> Tensor:
        return theirs(tokens, use_cache=False).logits

    functions = {"ours": vendor, "naive": naive, "transformers": transformers_logits}
    with torch.no_grad():
        apart = error(vendor(tokens), transformers_logits(tokens)).mean
        timings = time_interleaved(functions, tokens, rounds=config.rounds)
    return [
        Finding("logits differ from transformers' on average by", apart, expected=at_most(1e-3)),
        Finding("our forward pass", timings.median("ours"), "s"),
        Finding("transformers' forward pass", timings.median("transformers"), "s"),
        Finding(
            "ours with torch's attention, times transformers' speed",
            timings.ratio("ours", "transformers"),
            "x",
            goal=at_least(1.0),
            spread=timings.spread("ours", "transformers"),
        ),
        Finding(
            "ours with attention as the equation, times transformers' speed",
            timings.ratio("naive", "transformers"),
            "x",
            spread=timings.spread("naive", "transformers"),
        ),
    ]


if __name__ == "__main__":
    run(main, Config(), quick=Config(tokens=64, layers=2, rounds=3))
