"""What does each kernel bring to the training of a whole model?

One small Llama (124 million parameters unless told otherwise) takes the same training steps again
and again, with one kernel more each time: norm, rotary positions, gate, the loss without its
logits, the optimizer. Step time and memory are measured, and the loss must come out the same: a
kernel that trains another model is no faster form of it. Without a GPU the kernels are interpreted,
which is slow, so times are then left out.

Expected: losses after the last step differ by less than those of two other random starts. Goal on
an H200: 45% of 989 TFLOP/s.

Run     uv run python weeks/04_flash_attention/train_faster.py
        uv run python weeks/04_flash_attention/train_faster.py --device cuda --width 768 --layers 12
        --heads 12 --vocabulary 50304 --batch 32 --length 1024 --peak 989e12
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from implementations.attention.positions import rotate_half_split
from implementations.attention.vendor import attention_sdpa
from implementations.lab.findings import Finding, at_least, at_most
from implementations.lab.script import run
from implementations.layers.linear_cross_entropy import linear_cross_entropy_naive
from implementations.models.decoder import Decoder, DecoderConfig
from implementations.optimizers.adamw import AdamWState, init
from implementations.training.utilisation import flops_per_token, utilisation


@dataclass(frozen=True)
class Config:
    """The same steps of one model with more and more kernels."""

    device: str = "cpu"
    width: int = 64
    layers: int = 2
    heads: int = 2
    vocabulary: int = 512
    batch: int = 4
    """texts in a step"""
    length: int = 64
    """tokens in a text"""
    steps: int = 30
    learning_rate: float = 1e-3
    compiled: bool = False
    """also torch.compile, with and without the kernels"""
    peak: float = 0.0
    """the device's dense bfloat16 rate in FLOP/s, for MFU: 989e12 for an H200; 0 leaves it out"""


class Form(NamedTuple):
    """The functions that a run is built from."""

    options: dict[str, Callable]
    """of the decoder"""
    loss: Callable = linear_cross_entropy_naive
    optimizer: Callable | None = None
    """a step in place; torch's AdamW otherwise"""
    compiled: bool = False


class Run(NamedTuple):
    losses: list[float]
    seconds: float
    """median of the later steps"""
    memory: int
    """bytes held at most"""


def forms(compiled: bool) -> dict[str, Form]:
    """From equations to kernels, one more each time."""
    # Triton reads this when a kernel is decorated, so it stands before the kernels are imported.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from implementations.attention.positions_triton import rotate_half_split_triton
    from implementations.layers.feed_forward_triton import swiglu_triton
    from implementations.layers.linear_cross_entropy_triton import linear_cross_entropy_triton
    from implementations.layers.rms_norm_triton import rms_norm_triton
    from implementations.optimizers.adamw_triton import step_

    chosen: dict[str, Callable] = {"rotate": rotate_half_split}
    found = {"equations": Form(dict(chosen))}
    for name, kernel in {
        "norm": rms_norm_triton,
        "rotate": rotate_half_split_triton,
        "gated": swiglu_triton,
    }.items():
        chosen[name] = kernel
        found[f"+ {name}"] = Form(dict(chosen))
    found["+ loss"] = Form(chosen, linear_cross_entropy_triton)
    found["+ optimizer"] = Form(chosen, linear_cross_entropy_triton, step_)
    if compiled:
        found["equations, compiled"] = found["equations"]._replace(compiled=True)
        # The compiler joins norms, rotations and gates by itself; the loss and the optimizer it
        # cannot.
        best = Form({}, linear_cross_entropy_triton, step_, compiled=True)
        found["compiled, with loss and optimizer"] = best
    return found


def texts(config: Config) -> Tensor:
    """Batches in which each token mostly follows from the one before it."""
    generator = torch.Generator().manual_seed(1)
    shape = config.steps, config.batch, config.length + 1
    tokens = torch.randint(config.vocabulary, shape, generator=generator)
    surprise = torch.rand(shape, generator=generator) < 0.2
    for i in range(1, config.length + 1):
        follows = (5 * tokens[..., i - 1] + 7) % min(config.vocabulary, 256)
        tokens[..., i] = torch.where(surprise[..., i], tokens[..., i], follows)
    return tokens.to(config.device)


def shape_of(config: Config) -> DecoderConfig:
    return DecoderConfig(
        vocabulary=config.vocabulary,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        hidden=config.width * 8 // 3 // 32 * 32,
        positions=config.length,
    )


def train(form: Form, config: Config, seed: int = 0) -> Run:
    """All steps from one random start."""
    torch.manual_seed(seed)
    model = Decoder(shape_of(config), attention_sdpa, **form.options).to(config.device)
    parameters = list(model.parameters())
    options = {"lr": config.learning_rate, "fused": True}
    theirs = torch.optim.AdamW(parameters, **options) if form.optimizer is None else None
    state = init(parameters)
    hidden_of = torch.compile(model.hidden) if form.compiled else model.hidden

    def loss_of(tokens: Tensor) -> Tensor:
        with torch.autocast(config.device, torch.bfloat16, enabled=config.device != "cpu"):
            hidden = hidden_of(tokens[:, :-1])
        narrow = torch.bfloat16 if config.device != "cpu" else torch.float32
        return form.loss(hidden.to(narrow), model.embedding.weight.to(narrow), tokens[:, 1:])

    def step(tokens: Tensor, state: AdamWState) -> tuple[Tensor, AdamWState]:
        for parameter in parameters:
            parameter.grad = None
        loss = loss_of(tokens)
        loss.backward()
        if theirs is not None:
            theirs.step()
            return loss, state
        gradients = [parameter.grad for parameter in parameters]
        return loss, form.optimizer(parameters, gradients, state, learning_rate=options["lr"])

    on_gpu = config.device != "cpu"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    losses, seconds = [], []
    for number, tokens in enumerate(texts(config)):
        if on_gpu and number == 3:  # what compilation held is not counted
            torch.cuda.reset_peak_memory_stats()
        wait()
        start = time.perf_counter()
        loss, state = step(tokens, state)
        wait()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    memory = torch.cuda.max_memory_allocated() if on_gpu else 0
    return Run(losses, statistics.median(seconds[3:]), memory)


def draw(runs: dict[str, Run], on_gpu: bool) -> None:
    """Step times, or without a GPU the losses, which lie on each other."""
    _, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    if on_gpu:
        axes.barh(list(runs), [1e3 * run.seconds for run in runs.values()])
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds a step")
        return
    for name, one in runs.items():
        axes.plot(one.losses, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)


def main(config: Config) -> list[Finding]:
    on_gpu = config.device != "cpu"
    runs = {name: train(form, config) for name, form in forms(config.compiled).items()}
    first = runs["equations"]
    others = [train(Form({}), config, seed).losses[-1] for seed in (1, 2)]
    spread = max(abs(loss - first.losses[-1]) for loss in others)
    findings = [
        Finding("loss at the first step", first.losses[0], "nats"),
        Finding("loss at the last step", first.losses[-1], "nats"),
        Finding("two other random starts end away by up to", spread, "nats"),
    ]
    counted = sum(p.numel() for p in Decoder(shape_of(config)).parameters()) if config.peak else 0
    work = flops_per_token(counted, config.layers, config.width, config.length)
    for name, one in runs.items():
        apart = abs(one.losses[-1] - first.losses[-1])
        if name != "equations":
            findings.append(
                Finding(f"{name}: loss differs by", apart, "nats", expected=at_most(spread))
            )
        if on_gpu:
            findings += [
                Finding(f"{name}: a step", 1e3 * one.seconds, "ms"),
                Finding(f"{name}: speed of the equations", first.seconds / one.seconds, "x"),
                Finding(f"{name}: memory", one.memory / 2**30, "GiB"),
            ]
        if config.peak:
            speed = config.batch * config.length / one.seconds
            goal = at_least(0.45) if name == list(runs)[-1] else None
            share = utilisation(speed, work, config.peak)
            findings.append(Finding(f"{name}: MFU", share, goal=goal))
    draw(runs, on_gpu)
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(width=32, layers=1, vocabulary=64, batch=1, length=16, steps=4))
