"""What limits the writing of a text: operations or bytes?

One step of decoding reads every weight and every cached key and value, and gives each text one
token. From the sizes alone, for P weights of b bytes and n cached tokens of c bytes each:

    bytes      = b P + batch · n · c
    operations = batch · (2 P + 4 · layers · width · n)
    seconds    = max(bytes / bandwidth, operations / peak)

That is the roofline, and with a price it is a calculator: which GPU, which batch, what a million
tokens cost. Here it predicts data-sheet GPUs, and then this machine with its own two ceilings,
beside a decoder that is timed. Nothing in it knows of launches, Python, or caches.

Expected: about one operation a byte for one text in 16 bits, where a GPU would need hundreds; the
batch shares the weights, but not the caches, so intensity grows and then stops. Goal on a CPU: one
text of SmolLM2 at least 1.6 times as fast as transformers' generate writes it.

Run     uv run python weeks/05_kv_cache/bandwidth_not_flops.py
        uv run python weeks/05_kv_cache/bandwidth_not_flops.py --gpu "RTX 4090" --price 0.4
        --model "Llama 3 8B" --batch 16 --context 4096
        uv run python weeks/05_kv_cache/bandwidth_not_flops.py --device cuda
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from implementations.attention.rotary_table import RotaryTable
from implementations.attention.vendor import attention_sdpa
from implementations.lab.findings import Finding, at_least, equals, within
from implementations.lab.script import run
from implementations.lab.timing import time_interleaved
from implementations.models.decoder import SMOLLM2, Decoder, DecoderConfig
from implementations.models.llama_in_transformers import llama_in_transformers
from implementations.serving.kv_cache import CachedDecoder, KeyValueCache
from implementations.serving.static_cache import StaticDecoder
from implementations.serving.weight_layout import store_for_decoding
from implementations.text.sampling import generate


class Ceilings(NamedTuple):
    """What a device can do a second."""

    bandwidth: float
    """bytes"""
    peak: float
    """operations of matrix products"""


# From the data sheets: bytes, and bfloat16 operations without sparsity.
GPUS = {
    "H200": Ceilings(4.8e12, 989e12),
    "H100": Ceilings(3.35e12, 989e12),
    "A100": Ceilings(2.04e12, 312e12),
    "L4": Ceilings(0.3e12, 121e12),
    "RTX 4090": Ceilings(1.008e12, 165e12),
}
LLAMA3 = {"vocabulary": 128256, "positions": 8192, "key_value_heads": 8, "tied": False}
MODELS = {
    "SmolLM2 135M": SMOLLM2,
    "Llama 3 8B": DecoderConfig(
        width=4096, layers=32, heads=32, hidden=14336, rotary_base=5e5, **LLAMA3
    ),
    "Llama 3 70B": DecoderConfig(
        width=8192, layers=80, heads=64, hidden=28672, rotary_base=5e5, **LLAMA3
    ),
}


@dataclass(frozen=True)
class Config:
    """Predict a GPU and a model, and this machine; time a decoder beside it."""

    gpu: str = "H200"
    model: str = "Llama 3 8B"
    batch: int = 64
    context: int = 2048
    """cached tokens of each text"""
    price: float = 4.0
    """of the GPU for an hour, in any currency"""
    device: str = "cpu"
    layers: int = 30
    """of the decoder that is timed on a CPU, SmolLM2 with its weights if it has all of them; on a
    GPU it is Llama 3 8B with random weights"""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    held: int = 256
    """cached tokens of each text that is timed"""
    written: int = 32
    """tokens that transformers and we write in turn"""
    rounds: int = 7


class Step(NamedTuple):
    """One step of decoding: every text gets a token."""

    bytes: float
    operations: float

    @property
    def intensity(self) -> float:
        return self.operations / self.bytes

    def seconds(self, ceilings: Ceilings) -> float:
        return max(self.bytes / ceilings.bandwidth, self.operations / ceilings.peak)


def step(config: DecoderConfig, batch: int, context: int, itemsize: int = 2) -> Step:
    """Bytes and operations by the formulas above."""
    with torch.device("meta"):
        decoder = Decoder(config)
    # Of a table that is not the head too, a step reads a row.
    unread = 0 if config.tied else decoder.embedding.weight.numel()
    weights = sum(p.numel() for p in decoder.parameters() if p.ndim == 2) - unread
    heads = config.key_value_heads or config.heads
    each = 2 * config.layers * heads * config.width // config.heads
    return Step(
        itemsize * (weights + batch * context * each),
        batch * (2 * weights + 4 * config.layers * config.width * context),
    )


def calculated(config: Config) -> list[Finding]:
    """Tokens a second and their price, by the data sheet."""
    for kind, name, table in (("GPUs", config.gpu, GPUS), ("models", config.model, MODELS)):
        if name not in table:
            raise ValueError(f"the {kind} are {', '.join(table)}, got {name!r}")
    ceilings, model = GPUS[config.gpu], MODELS[config.model]
    one = step(model, 1, 1)
    many = step(model, config.batch, config.context)
    seconds = many.seconds(ceilings)
    speed, label = config.batch / seconds, f"{config.model} on {config.gpu}"
    slope = step(model, 10**6, config.context).intensity  # what an endless batch comes to
    return [
        Finding(
            "operations a byte for one text, in 16 bits",
            one.intensity,
            "FLOP/B",
            expected=within(0.95, 1.05),
            source="two operations with a weight of two bytes",
        ),
        Finding(f"that {config.gpu} has to offer", ceilings.peak / ceilings.bandwidth, "FLOP/B"),
        Finding(f"and for {config.batch} texts of {config.context:,}", many.intensity, "FLOP/B"),
        Finding("and for any number of them, at most", slope, "FLOP/B"),
        Finding(f"{label}, one text, at most", 1 / one.seconds(ceilings), "tokens/s"),
        Finding(f"{label}, {config.batch} texts, at most", speed, "tokens/s"),
        Finding("a million tokens cost at least", config.price / 3600 / speed * 1e6),
    ]


def ceilings_here(config: Config) -> Ceilings:
    """This machine's: a sum over what no cache holds, a copy on a GPU, and a square product."""
    gpu = config.device != "cpu"
    dtype, size = (torch.bfloat16, 8192) if gpu else (torch.float32, 1024)
    large = torch.randn(2**29 if gpu else 2**25, device=config.device, dtype=dtype)
    square = torch.randn(size, size, device=config.device, dtype=dtype)
    target = torch.empty_like(large) if gpu else large
    reading = (lambda x: target.copy_(x)) if gpu else torch.sum
    read = time_interleaved({"read": reading}, large, rounds=config.rounds).median("read")
    product = time_interleaved({"product": lambda x: x @ x}, square, rounds=config.rounds)
    return Ceilings((1 + gpu) * large.nbytes / read, 2 * size**3 / product.median("product"))


def timed_decoder(config: Config) -> Decoder:
    """SmolLM2 on a CPU, its weights stored for decoding; Llama 3 8B's shape on a GPU."""
    if config.device == "cpu":
        shape = replace(SMOLLM2, layers=config.layers)
        whole = config.layers == SMOLLM2.layers
        make = Decoder.from_smollm2 if whole else partial(Decoder, shape)
        decoder = make(attention_sdpa, **torch_parts(shape))
        store_for_decoding(decoder)
        return decoder.eval()
    from implementations.models.decoder_triton import decoder_triton

    with torch.device("meta"):
        decoder = decoder_triton(MODELS["Llama 3 8B"], attention_sdpa)
    decoder = decoder.to(torch.bfloat16).to_empty(device=config.device)
    for parameter in decoder.parameters():
        parameter.normal_(std=0.02)
    return decoder.eval()


def torch_parts(shape: DecoderConfig) -> dict[str, Callable[..., Tensor]]:
    """For a CPU: angles that are computed once, and torch's norm in one call."""

    def norm(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
        return torch.nn.functional.rms_norm(x, scale.shape, scale, epsilon)

    table = RotaryTable(shape.positions, shape.width // shape.heads, shape.rotary_base)
    return {"rotate": table, "norm": norm}


def one_step(config: Config, decoder: Decoder, batch: int) -> Callable[[Tensor], Tensor]:
    """The pass that gives each text its next token; it can be repeated. On a GPU, a graph."""
    cache = decoder.empty_cache(batch, config.held)
    for layer in cache.layers:
        layer.key.normal_()
        layer.value.normal_()
        layer.length = config.held - 1
    model: Callable[[Tensor, KeyValueCache], Tensor] = decoder
    if config.device != "cpu":
        model = StaticDecoder(decoder, cache, graph=True)

    def call(tokens: Tensor) -> Tensor:
        cache.truncate(config.held - 1)
        return model(tokens, cache)

    return call


def measured(config: Config) -> list[Finding]:
    """The timed decoder beside its prediction, by batch; draws both."""
    decoder, here = timed_decoder(config), ceilings_here(config)
    size = decoder.embedding.weight.element_size()
    findings = [
        Finding("this machine reads", here.bandwidth / 1e9, "GB/s"),
        Finding("and multiplies", here.peak / 1e9, "GFLOP/s"),
    ]
    points, off = [], 0
    for batch in config.batches:
        tokens = torch.randint(1, decoder.config.vocabulary, (batch, 1), device=config.device)
        call = one_step(config, decoder, batch)
        seconds = time_interleaved({"step": call}, tokens, rounds=config.rounds).median("step")
        work = step(decoder.config, batch, config.held, size)
        if config.device == "cpu":
            with FlopCounterMode(display=False) as counter:
                call(tokens)
            off = max(off, abs(counter.get_total_flops() - work.operations))
        points.append((batch, work, seconds))
        name = f"{batch} text{'s' * (batch > 1)} of {config.held} tokens"
        share = work.seconds(here) / seconds
        findings += [
            Finding(f"{name}: written", batch / seconds, "tokens/s"),
            Finding(f"{name}: share of what the formulas allow", share),
        ]
    if config.device == "cpu":
        claim = "operations counted, away from the formula by at most"
        findings.append(Finding(claim, off, expected=equals(0)))
    draw(points, here)
    return findings + (
        against_transformers(config, decoder, here) if config.device == "cpu" else []
    )


def against_transformers(config: Config, decoder: Decoder, here: Ceilings) -> list[Finding]:
    """One text, greedy, ours and transformers' generate in turn: same weights, float32, kernel."""
    shape, theirs = decoder.config, llama_in_transformers(decoder)
    plain = Decoder(shape, attention_sdpa, **torch_parts(shape)).eval()
    plain.load_state_dict({name: x.contiguous() for name, x in decoder.state_dict().items()})
    prompt = torch.randint(1, shape.vocabulary, (1, 16))

    def ours(decoder: Decoder) -> Callable[[Tensor], Tensor]:
        cache = decoder.empty_cache(1, 16 + config.written)

        def last(tokens: Tensor, cache: KeyValueCache) -> Tensor:  # as theirs, of a prompt too
            return decoder.logits(decoder.hidden(tokens, cache)[:, -1:])

        def write(prompt: Tensor) -> Tensor:
            cache.truncate(0)
            return generate(CachedDecoder(last, cache), prompt, config.written)

        return write

    def generated(prompt: Tensor) -> Tensor:
        count = {"max_new_tokens": config.written, "min_new_tokens": config.written}
        mask = torch.ones_like(prompt)
        return theirs.generate(prompt, attention_mask=mask, do_sample=False, **count)

    forms = {"ours": ours(decoder), "row by row": ours(plain), "transformers": generated}
    texts = [form(prompt) for form in forms.values()]
    same = all(torch.equal(text, texts[0]) for text in texts)
    timings = time_interleaved(forms, prompt, rounds=config.rounds, warmup=1)
    each = {name: 1e3 * timings.median(name) / config.written for name in forms}
    least = 1e3 * step(shape, 1, 1, decoder.embedding.weight.element_size()).seconds(here)
    return [
        Finding("ours and transformers write the same tokens", same, expected=equals(True)),
        *(Finding(f"a token of one text, {name}", time, "ms") for name, time in each.items()),
        Finding(
            "one text, times the speed of transformers' generate",
            timings.ratio("ours", "transformers"),
            "x",
            spread=timings.spread("ours", "transformers"),
            goal=at_least(1.6),
        ),
        Finding(
            "the same with weights stored row by row",
            timings.ratio("row by row", "transformers"),
            "x",
            spread=timings.spread("row by row", "transformers"),
        ),
        Finding(
            "and if a token took only the reading of its bytes", each["transformers"] / least, "x"
        ),
    ]


def draw(points: list[tuple[int, Step, float]], here: Ceilings) -> None:
    """The roofline with every batch on it, and tokens a second by batch."""
    _, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    balance = here.peak / here.bandwidth
    lowest = min(work.intensity for _, work, _ in points)
    intensity = np.geomspace(lowest / 2, max(4 * balance, 8), 100)
    left.loglog(intensity, np.minimum(here.peak, intensity * here.bandwidth) / 1e9, "k-")
    for batch, work, seconds in points:
        left.loglog(work.intensity, work.operations / seconds / 1e9, "C1s")
        left.annotate(f" {batch}", (work.intensity, work.operations / seconds / 1e9), va="top")
    left.set(
        title="the roofline, and the timed decoder by texts in a batch",
        xlabel="operations a byte",
        ylabel="GFLOP/s",
    )
    batches = [batch for batch, _, _ in points]
    allowed = [batch / work.seconds(here) for batch, work, _ in points]
    right.loglog(batches, allowed, "k--", label="what the formulas allow")
    right.loglog(batches, [batch / seconds for batch, _, seconds in points], "C1s-", label="timed")
    right.set_xticks(batches, [str(batch) for batch in batches])
    right.xaxis.minorticks_off()
    for axis in (left.xaxis, left.yaxis, right.yaxis):
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_formatter("")
    right.set(xlabel="texts in a batch", ylabel="tokens a second")
    right.legend()


def main(config: Config) -> list[Finding]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.no_grad():
        return calculated(config) + measured(config)


if __name__ == "__main__":
    quick = Config(layers=1, batches=(1, 2), held=32, written=2, rounds=2)
    run(main, Config(), quick=quick)
