"""How many tokens a second does the engine write, next to transformers and next to the memory?

Requests of mixed lengths, all there at the start, through the engine and through transformers'
`generate` with a static cache at each of several batch sizes: prompts filled up on the left to the
longest, every batch written to the longest answer. The weights are random, in SmolLM2's shape:
nobody reads these texts, and each has the length that was asked for. Tokens count that were asked
for.

The bound: a pass reads every weight once and every key and value of its texts once. Those bytes,
at the speed at which this machine copies, are the least time that decoding can take.

Expected: a static batch reads keys for places that hold none and goes on until its longest text
ends, so continuous batching wins several times over; small kernels stay far from the bound.
On a GPU:

Run     uv run python weeks/05_kv_cache/engine_speed.py

    uv run python weeks/05_kv_cache/engine_speed.py --device cuda --dtype bfloat16 --layers 30 \
        --requests 256 --prompts 32 512 --answers 32 512 --static 64 128 256 --rounds 3
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import LlamaForCausalLM
from transformers.utils import logging

from implementations.attention.paged import attention_paged
from implementations.lab.findings import Finding, at_least
from implementations.lab.script import run
from implementations.models.decoder import SMOLLM2, Decoder, DecoderConfig
from implementations.models.llama_in_transformers import llama_in_transformers
from implementations.serving.engine import Engine, Generation, Parameters


@dataclass(frozen=True)
class Config:
    """The engine against transformers' static batches."""

    device: str = "cpu"
    """cpu or cuda; on cuda with this repository's kernels and CUDA graphs"""
    dtype: str = "float32"
    """of weights and keys"""
    layers: int = 4
    """layers of SmolLM2's shape"""
    requests: int = 32
    """how many"""
    prompts: tuple[int, int] = (8, 64)
    """shortest and longest prompt"""
    answers: tuple[int, int] = (8, 64)
    """fewest and most tokens to write"""
    static: tuple[int, ...] = (8, 32)
    """batch sizes of transformers"""
    rounds: int = 3
    """timed runs of each, in turn"""
    page: int = 16
    """tokens a block"""


Work = list[tuple[list[int], int]]  # prompts, and how many tokens each asks for


def work_of(config: Config) -> Work:
    """The requests, the same for everybody."""
    generator = torch.Generator().manual_seed(0)

    def between(bounds: tuple[int, int]) -> list[int]:
        return torch.randint(bounds[0], bounds[1] + 1, (config.requests,), generator=generator)

    lengths, answers = between(config.prompts).tolist(), between(config.answers).tolist()
    prompts = [torch.randint(SMOLLM2.vocabulary, (n,), generator=generator) for n in lengths]
    return [(p.tolist(), answer) for p, answer in zip(prompts, answers, strict=True)]


def decoder_of(config: Config, shape: DecoderConfig) -> tuple[Decoder, Callable]:
    """A decoder and its attention from pages: readable on a CPU, kernels on a GPU."""
    dtype = getattr(torch, config.dtype)
    if config.device == "cpu":
        return Decoder(shape).to(dtype).eval(), attention_paged
    from implementations.attention.paged_triton import attention_paged_triton
    from implementations.attention.positions_triton import rotate_half_split_triton
    from implementations.layers.feed_forward_triton import swiglu_triton
    from implementations.layers.rms_norm_triton import rms_norm_triton

    kernels = {"norm": rms_norm_triton, "rotate": rotate_half_split_triton, "gated": swiglu_triton}
    return Decoder(shape, **kernels).to(config.device, dtype).eval(), attention_paged_triton


def static_batches(theirs: LlamaForCausalLM, work: Work, size: int) -> None:
    """All requests in batches in order of arrival, each to the longest answer."""
    longest, count = max(len(prompt) for prompt, _ in work), max(answer for _, answer in work)
    for first in range(0, len(work), size):
        prompts = [prompt for prompt, _ in work[first : first + size]]
        tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        theirs.generate(
            tokens.to(theirs.device),
            attention_mask=seen.to(theirs.device),
            max_new_tokens=count,
            do_sample=False,
            cache_implementation="static",
        )


class Counted(Engine):
    """The engine, and the least bytes that its passes read."""

    read_bytes = passes = 0

    def step(self) -> list[Generation]:
        weights = sum(p.numel() * p.element_size() for p in self.decoder.parameters())
        pages = self.cache.pages
        token = pages[:, :, 0, 0].numel() * pages.element_size()
        generations = super().step()
        keys = sum(len(generation.tokens) - 1 for generation in generations)
        self.read_bytes += weights + keys * token
        self.passes += 1
        return generations


def serve(engine: Counted, work: Work) -> list[Generation]:
    prompts, answers = zip(*work, strict=True)
    engine.read_bytes = engine.passes = 0
    return engine.generate(prompts, [Parameters(answer) for answer in answers])


def seconds(function: Callable, *inputs) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function(*inputs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def copy_speed(device: str) -> float:
    """Bytes read and written a second when a large tensor is copied."""
    source = torch.randn(2**28 if device.startswith("cuda") else 2**24, device=device)
    target = torch.empty_like(source)
    fastest = min(seconds(target.copy_, source) for _ in range(6))
    return 2 * source.numel() * source.element_size() / fastest


def main(config: Config) -> list[Finding]:
    logging.set_verbosity_error()
    torch.manual_seed(0)
    shape, work = replace(SMOLLM2, layers=config.layers), work_of(config)
    decoder, attention = decoder_of(config, shape)
    longest = config.prompts[1] + config.answers[1]
    engine = Counted(
        decoder,
        blocks=config.requests * -(-longest // config.page),
        page=config.page,
        batch=config.requests,
        budget=max(8192, config.requests),
        longest=longest,
        attention=attention,
        graphs=config.device != "cpu",
    )
    theirs, tokens = llama_in_transformers(decoder), sum(answer for _, answer in work)
    times: dict[str, list[float]] = {"engine": []}
    serve(engine, work)
    for _ in range(config.rounds):
        times["engine"].append(seconds(serve, engine, work))
    for size in config.static:
        name = f"static {size}"
        with torch.no_grad():
            static_batches(theirs, work[:size], size)  # compiles
            times[name] = [
                seconds(static_batches, theirs, work, size) for _ in range(config.rounds)
            ]
    rates = {name: tokens / sorted(values)[len(values) // 2] for name, values in times.items()}
    best = max((name for name in rates if name != "engine"), key=rates.get)
    spread = [tokens / value / rates[best] for value in times["engine"]]
    bound = engine.read_bytes / copy_speed(config.device)
    return [
        Finding(
            "the engine writes, times transformers' best static batch,",
            rates["engine"] / rates[best],
            "x",
            goal=at_least(3.0),
            spread=(max(spread) - min(spread)) / 2,
        ),
        Finding("the engine writes", rates["engine"], "tokens/s"),
        *(
            Finding(f"transformers, batches of {size}, writes", rates[f"static {size}"], "tokens/s")
            for size in config.static
        ),
        Finding("transformers' best batch size", int(best.split()[1]), "requests"),
        Finding("passes of the engine", engine.passes),
        Finding("of the bandwidth bound the engine reaches", bound * rates["engine"] / tokens),
    ]


if __name__ == "__main__":
    quick = Config(layers=1, requests=4, prompts=(2, 6), answers=(2, 6), static=(4,), rounds=2)
    run(main, Config(), quick=quick)
