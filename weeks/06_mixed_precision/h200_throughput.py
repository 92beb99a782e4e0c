"""What does a narrower number buy? Products, a linear layer, a training step, a decoding step.

A product of fp8 words can run at twice bfloat16's rate, but somebody must make the words: a linear
layer trains through three products, and each of its three operands is scaled and written in both
directions. Here the casts count. Decoding one text reads every weight for one product: there only
bytes matter, and 4 bits are a quarter of them.

Expected: on a CPU nothing, whose units know no fp8 (small sizes show that the paths agree). Goals
on an H200: a linear layer of fp8 trains 1.5 times as fast as one of bfloat16 at the largest shape,
casts included; the casting kernel moves its bytes at 0.85 of a copy's speed; products of 4-bit
weights with a vector reach 0.7 of what their bytes allow. Peaks are NVIDIA's dense rates.

Paper   Micikevicius et al. 2022, arXiv:2209.05433
Run     uv run python weeks/06_mixed_precision/h200_throughput.py
        uv run python weeks/06_mixed_precision/h200_throughput.py --device cuda --size 8192 --tokens
        16384 --hidden 28672 --width 4096 --layers 4 --rounds 10
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from implementations.attention.vendor import attention_sdpa
from implementations.lab.findings import Finding, at_least, at_most
from implementations.lab.script import run
from implementations.lab.timing import Timings, time_interleaved
from implementations.layers.feed_forward_triton import swiglu_triton
from implementations.layers.rms_norm_triton import rms_norm_triton
from implementations.models.decoder import Decoder, DecoderConfig
from implementations.precision.block_quantization_triton import Packed, matrix_vector_triton
from implementations.precision.fp8 import (
    E4M3,
    E5M2,
    SIDE,
    Fp8Linear,
    current,
    make_recipe,
    product_scaled_mm,
    with_fp8,
)
from implementations.precision.fp8_triton import quantize_blocks_triton, quantize_both_triton
from implementations.training.throughput import training_step

PEAKS = {"fp32": 67e12, "tf32": 494.5e12, "bf16": 989e12, "fp16": 989e12, "fp8": 1979e12}
GROUP = 128
SCALINGS = ("delayed", "current", "block")


@dataclass(frozen=True)
class Config:
    """Speed by precision."""

    device: str = "cpu"
    size: int = 512
    """side of the square products, and the input width of the linear layers"""
    tokens: int = 512
    """rows of the linear layers and of a training step"""
    hidden: int = 1024
    """output width of the larger linear layer"""
    width: int = 256
    """of the decoder that is trained, and of the layers that decode"""
    layers: int = 2
    rounds: int = 5


def rate(name: str, work: float, timings: Timings, label: str) -> Finding:
    return Finding(f"{label}, {name}", work / timings.median(name) / 1e12, "TFLOP/s")


def products(config: Config) -> list[Finding]:
    """One square product in each format, words ready."""
    new = partial(torch.randn, config.size, config.size, device=config.device)
    left, right = new(), new()
    narrow = {d: (left.to(d), right.to(d)) for d in (torch.bfloat16, torch.float16)}
    words = [current(x, E4M3)[0] for x in (left, right)]

    def with_tf32(on: bool) -> Callable:
        def multiply(left: Tensor, right: Tensor) -> Tensor:
            torch.backends.cuda.matmul.allow_tf32 = on
            return left @ right.T

        return multiply

    forms = {"fp32": with_tf32(False)}
    if config.device != "cpu":
        forms["tf32"] = with_tf32(True)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        a, b = narrow[dtype]
        forms[name] = lambda *_, a=a, b=b: a @ b.T
    fast = partial(product_scaled_mm, fast_accumulation=True)
    forms["fp8"] = lambda *_: fast(*words, torch.bfloat16)
    forms["fp8, sums in fp32"] = lambda *_: product_scaled_mm(*words, torch.bfloat16)
    timings = time_interleaved(forms, left, right, rounds=config.rounds)
    torch.backends.cuda.matmul.allow_tf32 = False
    work, findings = 2 * config.size**3, []
    for name in forms:
        findings.append(rate(name, work, timings, f"product of {config.size}³"))
        if config.device != "cpu":
            share = work / timings.median(name) / PEAKS[name.split(",")[0]]
            findings.append(Finding(f"share of the peak, {name}", share))
    return findings


def recipes(config: Config, names: tuple[str, ...]) -> dict[str, Callable]:
    """New recipes: the equations on a CPU, the kernel and the tensor cores on a GPU."""
    if config.device == "cpu":
        return {name: partial(make_recipe, name) for name in names}
    how = {"quantize": quantize_both_triton, "quantize_blocks": quantize_blocks_triton}
    # cuBLAS sums blocks in float32 only.
    fast = {name: partial(product_scaled_mm, fast_accumulation=name != "block") for name in names}
    return {name: partial(make_recipe, name, product=fast[name], **how) for name in names}


def products_of(layer: nn.Module, x: Tensor, upstream: Tensor) -> None:
    """A layer's output and both of its gradients."""
    leaf = x.detach().requires_grad_()
    torch.autograd.grad(layer(leaf), (leaf, layer.weight), upstream)


def linear_layers(config: Config) -> list[Finding]:
    """Forward and both gradients of a linear layer, everything that fp8 needs included."""
    findings = []
    for outputs in (config.size, config.hidden):
        x = torch.randn(config.tokens, config.size, device=config.device, dtype=torch.bfloat16)
        upstream = torch.randn(config.tokens, outputs, device=config.device, dtype=torch.bfloat16)
        linear = nn.Linear(config.size, outputs, bias=False, device=config.device).bfloat16()
        layers = {"bf16": linear}
        layers |= {
            name: Fp8Linear(linear, new()) for name, new in recipes(config, SCALINGS).items()
        }

        calls = {name: partial(products_of, layer) for name, layer in layers.items()}
        timings = time_interleaved(calls, x, upstream, rounds=config.rounds)
        shape = f"linear layer {config.tokens} x {config.size} x {outputs}"
        work = 6 * config.tokens * config.size * outputs
        findings += [rate(name, work, timings, shape) for name in layers]
        goal = at_least(1.5) if outputs == config.hidden and config.device != "cpu" else None
        for name in list(layers)[1:]:
            ratio, spread = timings.ratio(name, "bf16"), timings.spread(name, "bf16")
            claim = f"{shape}, {name} scaling, times bf16's speed"
            findings.append(Finding(claim, ratio, "x", goal=goal, spread=spread))
        exact = x.float() @ linear.weight.float().T
        for name in list(layers)[1:]:
            apart = (layers[name](x).float() - exact).norm() / exact.norm()
            claim = f"{shape}, {name} scaling: relative error forward"
            findings.append(Finding(claim, apart.item(), expected=at_most(0.06)))
    return findings


def casts(config: Config, speed: float) -> list[Finding]:
    """The bytes that the scalings must move, over their time, in shares of a copy's speed."""
    x = torch.randn(config.tokens, config.hidden, device=config.device, dtype=torch.bfloat16)
    scale = torch.tensor(100.0, device=config.device)
    forms = {
        "delayed": (lambda x: quantize_both_triton(x, E4M3, scale), 4.0),
        "strips": (lambda x: quantize_blocks_triton(x, E4M3), 4 + 8 / SIDE),
        "squares": (lambda x: quantize_blocks_triton(x, E4M3, (SIDE, SIDE)), 4.0),
        "delayed, e5m2": (lambda x: quantize_both_triton(x, E5M2, scale), 4.0),
        "current": (lambda x: current(x, E4M3, quantize_both_triton), 6.0),
    }
    calls = {name: call for name, (call, _) in forms.items()}
    timings = time_interleaved(calls, x, rounds=config.rounds)
    findings = []
    for name, (_, each) in forms.items():
        share = each * x.numel() / timings.median(name) / speed
        goal = None if name == "current" else at_least(0.85)
        claim = f"cast of both forms, {name} scaling: share of a copy's speed"
        findings.append(Finding(claim, share, goal=goal))
    return findings


def copy_speed(config: Config) -> float:
    """Bytes a second, read and written."""
    source = torch.randn(2**29, device=config.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copies = time_interleaved({"copy": target.copy_}, source, rounds=config.rounds)
    return 2 * source.nbytes / copies.median("copy")


def decoding(config: Config, speed: float) -> list[Finding]:
    """The products of a decoding step at batch 1, all layers in one CUDA graph."""
    width, hidden, count = 4096, 11008, 8
    shapes = [(3 * width, width), (width, width), (2 * hidden, width), (width, hidden)]
    device = config.device

    def weights(rows: int, columns: int) -> Packed:
        groups = (rows, columns // GROUP)
        words = torch.randint(-(2**31), 2**31, (*groups, GROUP // 8), device=device)
        scale = torch.rand(groups, device=device) / columns**0.5
        zero = torch.randint(16, groups, device=device)
        return Packed(words.int(), scale.half(), zero.to(torch.uint8))

    int4 = [[weights(*shape) for shape in shapes] for _ in range(count)]
    new = partial(torch.randn, device=device, dtype=torch.bfloat16)
    bf16 = [[new(*shape) / shape[1] ** 0.5 for shape in shapes] for _ in range(count)]
    token = new(width)

    def step(layers: list, product: Callable) -> Tensor:
        """Products alone: values stand for attention's answer, gates for the gated values."""
        x = token
        for mixed, out, gated, down in layers:
            x = product(out, product(mixed, x)[2 * width :])
            x = product(down, product(gated, x)[:hidden])
        return x

    graphs = {}
    for name, layers, product in (
        ("int4", int4, matrix_vector_triton),
        ("bf16", bf16, lambda weight, x: torch.mv(weight, x)),
    ):
        step(layers, product)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(layers, product)
        graphs[name] = lambda _, graph=graph: graph.replay()
    timings = time_interleaved(graphs, token, rounds=config.rounds)
    moved = {"int4": sum(part.nbytes for layer in int4 for weight in layer for part in weight)}
    moved["bf16"] = sum(weight.nbytes for layer in bf16 for weight in layer)
    findings = []
    for name, size in moved.items():
        share = size / timings.median(name) / speed
        goal = at_least(0.7) if name == "int4" else None
        claim = f"decoding products, {count} layers of 7B's shapes, {name}: share of a copy's speed"
        findings.append(Finding(claim, share, goal=goal))
    ratio, spread = timings.ratio("int4", "bf16"), timings.spread("int4", "bf16")
    return [*findings, Finding("int4, times bf16's decoding speed", ratio, "x", spread=spread)]


def training(config: Config) -> list[Finding]:
    """A whole update of a decoder with master weights in float32."""
    fused = config.device != "cpu"
    kernels = {"norm": rms_norm_triton, "gated": swiglu_triton} if fused else {}
    shape = DecoderConfig(
        vocabulary=8192,
        width=config.width,
        layers=config.layers,
        heads=max(1, config.width // 128),
        hidden=config.width * 11 // 4,
        positions=2048,
    )
    length = min(2048, config.tokens)
    tokens = torch.randint(8192, (config.tokens // length, length + 1), device=config.device)
    steps = {}
    choices = {"bf16": None} | {
        f"fp8, {name}": new for name, new in recipes(config, SCALINGS[:2]).items()
    }
    for name, new in choices.items():
        torch.manual_seed(0)
        with torch.device(config.device):
            decoder = Decoder(shape, attention_sdpa, **kernels)
        decoder = with_fp8(decoder, new) if new else decoder
        steps[name] = training_step(decoder, decoder.parameters(), config.device)
    batch = tokens[:, :-1], tokens[:, 1:]
    timings = time_interleaved(steps, *batch, rounds=config.rounds)
    findings = []
    for name in steps:
        speed = config.tokens / timings.median(name)
        findings.append(Finding(f"training step, {name}", speed, "tokens/s"))
    for name in list(steps)[1:]:
        ratio, spread = timings.ratio(name, "bf16"), timings.spread(name, "bf16")
        claim = f"training step, {name}, times bf16's speed"
        findings.append(Finding(claim, ratio, "x", spread=spread))
    return findings


def draw(findings: list[Finding]) -> None:
    """The rates of the products and of the linear layers."""
    bars = [(f.claim, f.measured) for f in findings if f.unit == "TFLOP/s"]
    _, axes = plt.subplots(figsize=(8, 0.35 * len(bars) + 1), layout="constrained")
    colours = ["C1" if "bf16" in claim else "C0" for claim, _ in bars]
    axes.barh(range(len(bars)), [value for _, value in bars], color=colours)
    axes.set_yticks(range(len(bars)), [claim for claim, _ in bars])
    axes.invert_yaxis()
    axes.set(xlabel="TFLOP/s, casts included; bf16 in orange")


def main(config: Config) -> list[Finding]:
    torch.manual_seed(0)
    findings = products(config) + linear_layers(config)
    if config.device != "cpu":
        speed = copy_speed(config)
        findings.append(Finding("a copy reads and writes", speed / 1e12, "TB/s"))
        findings += casts(config, speed) + decoding(config, speed)
    findings += training(config)
    draw(findings)
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(size=128, tokens=64, hidden=128, width=64, layers=1, rounds=2))
