"""How many tokens a second does the engine write, next to transformers and next to the memory?

Requests of mixed lengths, all there at the start, through the engine and through transformers'
`generate` with a static cache: prompts filled up on the left to the longest, every batch written to
the longest answer, so that one compilation serves all batches of a size. The best size is found on
one batch of each; with it all requests are served, in turn with the engine. Prompts are new every
time: none is known from before. The weights are random, in SmolLM2's shape: nobody reads these
texts, and each has the length that was asked for. Tokens count that were asked for.

The bound: a pass reads every weight once and every key and value of its texts once. Those bytes,
at the speed at which this machine copies, are the least time that decoding can take.

Expected: a static batch reads keys for places that hold none and goes on until its longest text
ends, so continuous batching wins several times over; small kernels stay far from the bound. Goal on
a GPU: 3 times transformers' best batch size.

Run     uv run python weeks/05_kv_cache/engine_speed.py
        uv run python weeks/05_kv_cache/engine_speed.py --device cuda --dtype bfloat16 --layers 30
        --requests 256 --prompts 32 512 --answers 32 512 --static 128 256 --rounds 5
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import torch
from transformers import LlamaForCausalLM
from transformers.utils import logging

from implementations.lab.findings import Finding, at_least
from implementations.lab.script import run
from implementations.lab.timing import over_rounds
from implementations.models.decoder import SMOLLM2, Decoder, DecoderConfig
from implementations.models.llama_in_transformers import llama_in_transformers
from implementations.serving.engine import Engine, Parameters


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


def work_of(config: Config, turn: int = 0) -> Work:
    """The requests: other prompts in each turn, which no cache of prefixes knows, of the same
    lengths."""
    generator = torch.Generator().manual_seed(0)

    def between(bounds: tuple[int, int]) -> list[int]:
        return torch.randint(bounds[0], bounds[1] + 1, (config.requests,), generator=generator)

    lengths, answers = between(config.prompts).tolist(), between(config.answers).tolist()
    generator.manual_seed(1 + turn)
    prompts = [torch.randint(SMOLLM2.vocabulary, (n,), generator=generator) for n in lengths]
    return [(p.tolist(), answer) for p, answer in zip(prompts, answers, strict=True)]


def decoder_of(config: Config, shape: DecoderConfig) -> tuple[Decoder, dict[str, Callable]]:
    """A decoder, its attention from pages and its pass: readable on a CPU, kernels on a GPU."""
    dtype = getattr(torch, config.dtype)
    if config.device == "cpu":
        return Decoder(shape).to(dtype).eval(), {}
    from implementations.attention.paged_triton import attention_paged_triton
    from implementations.models.decoder_triton import decoder_triton
    from implementations.serving.paged_cache_triton import reader_triton

    kernels = {"attention": attention_paged_triton, "reader": reader_triton}
    return decoder_triton(shape).to(config.device, dtype).eval(), kernels


def static_batches(config: Config, theirs: LlamaForCausalLM, work: Work, size: int) -> None:
    """The requests in batches in order of arrival, all of one shape, each to the longest answer."""
    longest = config.prompts[1]
    for first in range(0, len(work), size):
        prompts = [prompt for prompt, _ in work[first : first + size]]
        tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        theirs.generate(
            tokens.to(theirs.device),
            attention_mask=seen.to(theirs.device),
            max_new_tokens=config.answers[1],
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static",
        )


def serve(engine: Engine, work: Work) -> int:
    """All requests; how many passes it took."""
    passes = 0
    for prompt, answer in work:
        engine.add(prompt, Parameters(answer))
    while engine.scheduler.running or engine.scheduler.waiting:
        engine.step()
        passes += 1
    return passes


def least_bytes(engine: Engine, work: Work, passes: int) -> int:
    """Every weight once a pass; and for every token that is written, all keys before it."""
    weights = sum(p.numel() * p.element_size() for p in engine.decoder.parameters())
    pages = engine.cache.pages
    token = pages[:, :, 0, 0].numel() * pages.element_size()
    keys = sum(sum(range(len(prompt), len(prompt) + answer)) for prompt, answer in work)
    return passes * weights + keys * token


def seconds(function: Callable, *inputs) -> float:
    """Until all is done, on the GPU too."""
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


def best_size(config: Config, theirs: LlamaForCausalLM) -> tuple[int, dict[int, float]]:
    """transformers' tokens a second on the first batch of each size, once compiled for it."""
    rates = {}
    for size in config.static:
        torch.compiler.reset()
        part = work_of(config)[:size]
        first = seconds(static_batches, config, theirs, part, size)
        time_taken = seconds(static_batches, config, theirs, part, size)
        rates[size] = sum(answer for _, answer in part) / time_taken
        print(f"transformers, a batch of {size}: first {first:.1f} s, then {time_taken:.1f} s")
    return max(rates, key=rates.get), rates


def main(config: Config) -> list[Finding]:
    logging.set_verbosity_error()
    torch.manual_seed(0)
    decoder, kernels = decoder_of(config, replace(SMOLLM2, layers=config.layers))
    longest = config.prompts[1] + config.answers[1]
    engine = Engine(
        decoder,
        blocks=config.requests * (1 + -(-longest // config.page)),
        page=config.page,
        batch=config.requests,
        budget=max(32768, config.requests),
        longest=longest,
        graphs=config.device != "cpu",
        **kernels,
    )
    work = work_of(config)
    passes, tokens = serve(engine, work), sum(answer for _, answer in work)
    theirs = llama_in_transformers(decoder)
    size, sampled = best_size(config, theirs)
    if size != config.static[-1]:
        torch.compiler.reset()
        seconds(static_batches, config, theirs, work[:size], size)
    ours, peer = [], []
    for turn in range(config.rounds):
        work = work_of(config, 1 + turn)
        ours.append(tokens / seconds(serve, engine, work))
        peer.append(tokens / seconds(static_batches, config, theirs, work, size))
        print(f"round {turn}: engine {ours[-1]:,.0f}, transformers {peer[-1]:,.0f} tokens/s")
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    rate = statistics.median(ours)
    drawn = sampled | {size: statistics.median(peer)}
    draw({"engine": rate} | {f"transformers,\nbatches of {n}": r for n, r in drawn.items()})
    bound = tokens * copy_speed(config.device) / least_bytes(engine, work, passes)
    return [
        Finding(
            "the engine writes, times transformers' best static batch,",
            unit="x",
            goal=None if config.device == "cpu" else at_least(3.0),
            **over_rounds(ratios),
        ),
        Finding("the engine writes", rate, "tokens/s"),
        Finding(f"transformers, batches of {size}, writes", statistics.median(peer), "tokens/s"),
        *(
            Finding(f"transformers, one batch of {size}, writes", value, "tokens/s")
            for size, value in sampled.items()
        ),
        Finding("passes of the engine", passes),
        Finding("of the bandwidth bound the engine reaches", rate / bound),
    ]


def draw(rates: dict[str, float]) -> None:
    _, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    bars = axes.bar(list(rates), list(rates.values()))
    axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates.values()], fontsize=8)
    axes.margins(y=0.12)
    axes.set_ylabel("tokens a second that were asked for")
    axes.set_title("The same requests of mixed lengths", fontsize=10)


if __name__ == "__main__":
    quick = Config(layers=1, requests=4, prompts=(2, 6), answers=(2, 6), static=(4,), rounds=2)
    run(main, Config(), quick=quick)
