"""How close to the speed of memory are the layers between the matrix products?

Norms, softmax, gates, rotations, the loss and the optimizer compute little and move much. Their
floor is what must be read and written once; a form written as an equation moves every intermediate
too. First count the bytes of both forms, operation by operation, on tensors that hold no numbers
(their sizes are all that counts); then, on a GPU, time them against torch's kernels and
torch.compile, in shares of what a copy on the same device reaches. Tensors hold half a GiB: to
start and to end a launch takes some 4 µs, under a hundredth of the time to read and write them. The
linear layer before the loss, whose logits are never held, is timed by its three matrix products.

Expected: a kernel moves its floor, up to the statistics of the rows; the equation several times as
much. Goals on an H200: 0.93 of a copy's speed forward, 0.82 backward for norms, 0.95 for gates and
rotations, 0.85 for the loss; 0.8 of the three products' speed with an eighth of the logits.

Run     uv run python weeks/04_flash_attention/fused_layers.py
        uv run python weeks/04_flash_attention/fused_layers.py --device cuda
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from implementations.attention.positions import rotate_half_split, rotate_interleaved
from implementations.attention.positions_triton import (
    rotate_half_split_triton,
    rotate_interleaved_triton,
)
from implementations.lab.findings import Finding, at_least, at_most, within
from implementations.lab.memory import peak_bytes
from implementations.lab.script import run
from implementations.lab.timing import time_interleaved
from implementations.layers.cross_entropy_triton import cross_entropy_in_place
from implementations.layers.feed_forward import swiglu_naive
from implementations.layers.feed_forward_triton import swiglu_triton
from implementations.layers.layer_norm import layer_norm_naive
from implementations.layers.layer_norm_triton import layer_norm_triton
from implementations.layers.linear_cross_entropy_triton import loss_and_gradients
from implementations.layers.rms_norm import add_rms_norm_naive, rms_norm_naive
from implementations.layers.rms_norm_triton import add_rms_norm_triton, rms_norm_triton
from implementations.layers.softmax import softmax_naive
from implementations.layers.softmax_triton import softmax_triton
from implementations.optimizers.adamw import init, step
from implementations.optimizers.adamw_triton import step_


@dataclass(frozen=True)
class Config:
    """Bytes and seconds of each layer, as an equation, in torch and as one kernel."""

    device: str = "cpu"
    rows: int = 65536
    """tokens; the loss takes an eighth of them, the linear layer before it half"""
    width: int = 4096
    vocabulary: int = 131072
    widths: tuple[int, ...] = (1024, 2048, 8192, 16384)
    """further widths of the norms and of softmax, with as many numbers; on a GPU"""
    rounds: int = 15


class Layer(NamedTuple):
    """One layer in three forms, with its floor in units of the bytes of its first input."""

    name: str
    inputs: list[Tensor]
    kernel: Callable
    equation: Callable
    torchs: Callable
    forward: float
    backward: float = 0
    """zero where the forward pass includes it"""
    goals: tuple[float, float] = (0.93, 0.82)


def layers(config: Config) -> list[Layer]:
    """The layers at the sizes of a model with four billion parameters."""

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=config.device, dtype=dtype)

    rows, width = config.rows, config.width
    scale, shift, shape = new(width), new(width), (width,)
    heads = new(max(1, rows // 4096), min(rows, 4096), width // 128, 128).transpose(1, 2)
    scores = new(rows // 8, config.vocabulary)
    targets = torch.randint(config.vocabulary, (rows // 8,), device=config.device)
    weights = [new(config.rows * config.width, dtype=torch.float32) for _ in range(2)]

    def torchs_add(x: Tensor, residual: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        stream = x + residual
        return functional.rms_norm(stream, shape, scale, 1e-5), stream

    def loss_and_gradient(loss: Callable) -> Callable:
        def run(scores: Tensor) -> list[Tensor]:
            leaf = scores.detach().requires_grad_()
            with torch.enable_grad():
                return [*torch.autograd.grad(loss(leaf, targets), leaf)]

        return run

    def log_softmax_loss(scores: Tensor, targets: Tensor) -> Tensor:
        """`cross_entropy_naive` without its look at the targets, which here are no numbers."""
        wide = scores.float()
        return (wide.logsumexp(-1) - wide.gather(-1, targets[:, None])[:, 0]).mean()

    state, options = init(weights[:1]), {"lr": 1e-3, "fused": config.device != "cpu"}
    leaf = torch.nn.Parameter(weights[0])
    optimizer = torch.optim.AdamW([leaf], **options)

    def torchs_step(weight: Tensor, gradient: Tensor) -> None:
        leaf.grad = gradient
        optimizer.step()

    return [
        Layer(
            "RMSNorm",
            [new(rows, width), scale],
            rms_norm_triton,
            rms_norm_naive,
            lambda x, scale: functional.rms_norm(x, shape, scale, 1e-5),
            2,
            3,
        ),
        Layer(
            "sum and RMSNorm",
            [new(rows, width), new(rows, width), scale],
            add_rms_norm_triton,
            add_rms_norm_naive,
            torchs_add,
            4,
            4,
        ),
        Layer(
            "LayerNorm",
            [new(rows, width), scale, shift],
            layer_norm_triton,
            layer_norm_naive,
            lambda x, scale, shift: functional.layer_norm(x, shape, scale, shift),
            2,
            3,
        ),
        Layer(
            "softmax",
            [new(rows, width)],
            softmax_triton,
            softmax_naive,
            lambda x: torch.softmax(x, -1),
            2,
            3,
        ),
        Layer(
            "SwiGLU",
            [new(rows, width), new(rows, width)],
            swiglu_triton,
            swiglu_naive,
            lambda gate, expand: functional.silu(gate) * expand,
            3,
            5,
            (0.95, 0.95),
        ),
        Layer(
            "rotary positions",
            [heads],
            rotate_half_split_triton,
            rotate_half_split,
            rotate_half_split,
            2,
            2,
            (0.95, 0.95),
        ),
        Layer(
            "rotary, interleaved",
            [heads],
            rotate_interleaved_triton,
            rotate_interleaved,
            rotate_interleaved,
            2,
            2,
            (0.95, 0.95),
        ),
        Layer(
            "cross-entropy with its gradient",
            [scores],
            lambda scores: cross_entropy_in_place(scores, targets),
            loss_and_gradient(log_softmax_loss),
            loss_and_gradient(functional.cross_entropy),
            2,
            goals=(0.85, 0.0),
        ),
        Layer(
            "AdamW",
            weights,
            lambda weight, gradient: step_([weight], [gradient], state),
            lambda weight, gradient: step([weight], [gradient], state),
            torchs_step,
            7,
            goals=(0.93, 0.0),
        ),
    ]


class CountBytes(TorchDispatchMode):
    """Adds up what every operation reads and writes; views move nothing."""

    def __init__(self):
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and function.namespace != "prim":
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            tensors += mutated_arguments(function, args)
            self.moved += sum(t.numel() * t.element_size() for t in tensors)
        return result


def mutated_arguments(function: Callable, args: tuple) -> list[Tensor]:
    """The tensors that an operator of ours overwrites: written as well as read."""
    if function.namespace != "ml_studies":
        return []
    given = zip(function._schema.arguments, args, strict=False)
    written = [value for argument, value in given if argument.alias_info]
    return [t for t in tree_leaves(written) if isinstance(t, Tensor)]


def passes(layer: Layer, function: Callable) -> dict[str, Callable]:
    """The forward pass, and where there is one the backward pass, ready to be run again."""

    def forward(*inputs: Tensor) -> None:
        with torch.no_grad():
            function(*inputs)

    if not layer.backward:
        return {"": forward}
    leaves = [x.detach().requires_grad_() for x in layer.inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [torch.randn_like(output) for output in outputs]

    def backward(*inputs: Tensor) -> None:
        torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)

    return {" forward": forward, " backward": backward}


def count(config: Config) -> list[Finding]:
    """Bytes of kernel and equation over the floor, at full size and without memory."""
    findings, bars = [], {}
    with FakeTensorMode():
        for layer in layers(config):
            least = layer.inputs[0].numel() * layer.inputs[0].element_size()
            floors = {"": layer.forward, " forward": layer.forward, " backward": layer.backward}
            moved = {}
            for form in ("kernel", "equation"):
                for name, call in passes(layer, getattr(layer, form)).items():
                    with CountBytes() as counted:
                        call(*layer.inputs)
                    moved[form, name] = counted.moved / (least * floors[name])
            for name in [name for form, name in moved if form == "kernel"]:
                bars[layer.name + name] = {
                    form: moved[form, name] for form in ("kernel", "equation")
                }
                findings += [
                    Finding(
                        f"{layer.name}{name}: the kernel moves, times its floor",
                        moved["kernel", name],
                        "x",
                        expected=within(0.99, 1.1),
                    ),
                    Finding(
                        f"{layer.name}{name}: the equation moves, times that floor",
                        moved["equation", name],
                        "x",
                    ),
                ]
    draw(bars, "bytes moved, in units of the floor")
    return findings


def measure(config: Config) -> list[Finding]:
    """Speed of kernel, torch and torch.compile in shares of a copy's bytes a second."""
    source = torch.randn(2**29, device=config.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    speed = copy_speed(source, target, config.rounds)
    part = config.rows * config.width
    share = copy_speed(source[:part], target[:part], config.rounds) / speed
    del source, target
    findings = [
        Finding("a copy reads and writes", speed / 1e12, "TB/s"),
        Finding("of that, a copy of one layer's size", share),
    ]
    bars = {}
    for layer in layers(config):
        forms = {"kernel": layer.kernel, "torch": layer.torchs}
        if layer.backward:
            forms["torch.compile"] = torch.compile(layer.torchs, dynamic=False)
        least = layer.inputs[0].numel() * layer.inputs[0].element_size() / speed
        calls = {form: passes(layer, function) for form, function in forms.items()}
        for name in calls["kernel"]:
            backward = name == " backward"
            floor = least * (layer.backward if backward else layer.forward)
            timings = time_interleaved(
                {form: call[name] for form, call in calls.items()},
                *layer.inputs,
                rounds=config.rounds,
            )
            bars[layer.name + name] = {form: floor / timings.median(form) for form in forms}
            for form in forms:
                goal = at_least(layer.goals[backward]) if form == "kernel" else None
                share = floor / timings.median(form)
                findings.append(Finding(f"{layer.name}{name}: {form}'s share", share, goal=goal))
            findings.append(
                Finding(
                    f"{layer.name}{name}: the kernel, times torch's speed",
                    timings.ratio("kernel", "torch"),
                    "x",
                    spread=timings.spread("kernel", "torch"),
                )
            )
    draw(bars, "share of a copy's bytes a second")
    for width in config.widths:
        findings += at_width(config, width, speed)
    return findings + linear(config)


def copy_speed(source: Tensor, target: Tensor, rounds: int) -> float:
    """Bytes read and written in a second."""
    seconds = time_interleaved({"copy": target.copy_}, source, rounds=rounds).median("copy")
    return 2 * source.numel() * source.element_size() / seconds


def linear(config: Config) -> list[Finding]:
    """The loss without its logits, beside the three products of which it is made."""
    rows = config.rows // 2
    hidden = torch.randn(rows, config.width, device=config.device, dtype=torch.bfloat16) / 8
    weight = hidden.new_empty(config.vocabulary, config.width).normal_() / 8
    targets = torch.randint(config.vocabulary, (rows,), device=config.device)
    logits = hidden.new_empty(rows, config.vocabulary)

    def products(hidden: Tensor, weight: Tensor) -> None:
        torch.mm(hidden, weight.mT, out=logits)
        torch.mm(logits, weight)
        torch.mm(logits.mT, hidden)

    def kernel(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return loss_and_gradients(hidden, weight, targets, -100, 0.0, True)

    forms = {"kernel": kernel, "products": products}
    timings = time_interleaved(forms, hidden, weight, rounds=min(5, config.rounds))
    size = logits.nbytes
    del logits
    torch.cuda.empty_cache()
    gradients = hidden.nbytes + 4 * weight.numel()  # that of the weight is summed in float32
    held = (peak_bytes(kernel, hidden, weight) - gradients) / size
    return [
        Finding(
            "linear cross-entropy: share of its three products' speed",
            timings.ratio("kernel", "products"),
            spread=timings.spread("kernel", "products"),
            goal=at_least(0.8),
        ),
        Finding(
            "linear cross-entropy: held besides the gradients, of the logits' bytes",
            held,
            goal=at_most(0.126),  # an eighth, and a number a row
        ),
    ]


def at_width(config: Config, width: int, speed: float) -> list[Finding]:
    """The three forward passes along rows at another width."""
    x = torch.randn(
        config.rows * config.width // width, width, device=config.device, dtype=torch.bfloat16
    )
    scale, shift = torch.randn(2, width, device=config.device, dtype=torch.bfloat16)
    forms = {
        "RMSNorm": lambda x: rms_norm_triton(x, scale),
        "LayerNorm": lambda x: layer_norm_triton(x, scale, shift),
        "softmax": softmax_triton,
    }
    timings = time_interleaved(forms, x, rounds=config.rounds)
    floor = 2 * x.numel() * x.element_size() / speed
    return [
        Finding(
            f"{name} forward, {width} wide: kernel's share",
            floor / timings.median(name),
            goal=at_least(0.93),
        )
        for name in forms
    ]


def draw(bars: dict[str, dict[str, float]], label: str) -> None:
    """A group of horizontal bars for each layer."""
    forms = list(dict.fromkeys(form for group in bars.values() for form in group))
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(bars) + 1), layout="constrained")
    for offset, form in enumerate(forms):
        places = [i + (offset - (len(forms) - 1) / 2) * 0.27 for i in range(len(bars))]
        lengths = [group.get(form, 0.0) for group in bars.values()]
        axes.barh(places, lengths, 0.25, label=form)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlabel(label)
    figure.legend(loc="outside lower center", ncols=len(forms), frameon=False)


def main(config: Config) -> list[Finding]:
    torch.manual_seed(0)
    return count(config) if config.device == "cpu" else measure(config)


if __name__ == "__main__":
    run(main, Config(), quick=Config(rows=512, width=512, vocabulary=2048, widths=(), rounds=3))
