"""What does each kernel bring to the training of a whole model?

A Llama takes the same training steps again and again, with one kernel more each time: norm, rotary
positions, gate, attention, the loss without its logits, the optimizer; on request also with
torch.compile. All runs start from the same weights and read the same texts, so each must give the
same losses: a kernel that trains another model is no faster form of it. On a GPU step time, memory
and utilisation are measured, in bfloat16, from the end of one step to the end of the next: nothing
waits for the GPU before all steps are done. Without one the kernels are interpreted in float64,
where times mean nothing and are left out.

Expected: in float64 the losses are equal up to rounding. In bfloat16 they part by less than those
of other random starts do. Goal on an H200, for 124 million parameters: 45% of 989 TFLOP/s.

Run     uv run python weeks/04_flash_attention/train_faster.py
        uv run python weeks/04_flash_attention/train_faster.py --device cuda --width 768 --layers 12
        --heads 12 --vocabulary 50304 --batch 32 --length 1024 --learning-rate 1e-3 --compiled
        --peak 989e12
"""

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm import tqdm

from implementations.attention.vendor import attention_sdpa
from implementations.lab.findings import Finding, at_least, at_most
from implementations.lab.script import run
from implementations.layers.linear_cross_entropy import linear_cross_entropy_naive
from implementations.models.decoder import Decoder, DecoderConfig
from implementations.optimizers.adamw import init
from implementations.training.utilisation import flops_per_token, utilisation


@dataclass(frozen=True)
class Config:
    """The same steps of one model with more and more kernels."""

    device: str = "cpu"
    width: int = 32
    layers: int = 2
    heads: int = 2
    vocabulary: int = 64
    batch: int = 2
    """texts in a step"""
    length: int = 24
    """tokens in a text"""
    steps: int = 12
    learning_rate: float = 1e-2
    """1e-3 for a model of 124 million parameters"""
    compiled: bool = False
    """also rotary, attention, loss and optimizer as kernels in a model that torch.compile fused"""
    peak: float = 0.0
    """the device's dense bfloat16 rate in FLOP/s, for MFU: 989e12 for an H200; 0 leaves it out"""

    @property
    def shape(self) -> DecoderConfig:
        return DecoderConfig(
            vocabulary=self.vocabulary,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            hidden=self.width * 8 // 3,
            positions=self.length,
        )


@dataclass(frozen=True)
class Form:
    """The functions that a run is built from."""

    attention: Callable = attention_sdpa
    parts: dict[str, Callable] = field(default_factory=dict)  # norm, rotate, gated
    loss: Callable = linear_cross_entropy_naive
    step_: Callable | None = None  # torch's fused AdamW unless given
    compiled: bool = False


class Run(NamedTuple):
    losses: list[float]
    seconds: float  # median of the steps after the third; on a GPU
    memory: int  # bytes held at most


def forms(compiled: bool) -> dict[str, Form]:
    """From equations to kernels, one more each time."""
    # Triton reads this when a kernel is decorated, so it stands before the kernels are imported.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from implementations.attention.flash_triton import flash_attention_triton
    from implementations.attention.positions_triton import rotate_half_split_triton
    from implementations.layers.feed_forward_triton import swiglu_triton
    from implementations.layers.linear_cross_entropy_triton import linear_cross_entropy_triton
    from implementations.layers.rms_norm_triton import rms_norm_triton
    from implementations.optimizers.adamw_triton import step_

    flash, loss = flash_attention_triton, linear_cross_entropy_triton
    norm = {"norm": rms_norm_triton}
    rotary = norm | {"rotate": rotate_half_split_triton}
    parts = rotary | {"gated": swiglu_triton}
    found = {
        "equations": Form(),
        "+ norm": Form(parts=norm),
        "+ rotary": Form(parts=rotary),
        "+ gate": Form(parts=parts),
        "+ attention": Form(flash, parts),
        "+ loss": Form(flash, parts, loss),
        "+ optimizer": Form(flash, parts, loss, step_),
    }
    # The compiler fuses norm and gate by itself; rotary too, but with sines and cosines of its own
    # for every number of every head, and the other three it cannot.
    if compiled:
        turned = {"rotate": rotate_half_split_triton}
        found["compiled"] = Form(flash, turned, loss, step_, compiled=True)
        if torch.cuda.get_device_capability()[0] == 9:
            from implementations.attention.flash_hopper import flash_attention_hopper as hopper

            found["compiled for Hopper"] = Form(hopper, turned, loss, step_, compiled=True)
    return found


def texts(config: Config) -> Tensor:
    """Batches in which a token follows from the one before it, four times out of five."""
    generator = torch.Generator().manual_seed(1)
    shape = config.steps, config.batch, config.length + 1
    tokens = torch.randint(config.vocabulary, shape, generator=generator)
    surprise = torch.rand(shape, generator=generator) < 0.2
    for i in range(1, config.length + 1):
        follows = (5 * tokens[..., i - 1] + 7) % min(config.vocabulary, 256)
        tokens[..., i] = torch.where(surprise[..., i], tokens[..., i], follows)
    return tokens.to(config.device)


def train(form: Form, config: Config, seed: int = 0) -> Run:
    """All steps from one random start."""
    torch.manual_seed(seed)
    on_gpu = config.device != "cpu"
    model = Decoder(config.shape, form.attention, **form.parts).to(config.device)
    if not on_gpu:
        model.double()
    if form.compiled:
        for block in model.blocks:  # one graph, which all blocks share
            block.compile()
    parameters = list(model.parameters())
    theirs = torch.optim.AdamW(parameters, lr=config.learning_rate, fused=True)
    state = init(parameters)
    losses, ends = [], []
    for number, tokens in enumerate(texts(config)):
        if on_gpu and number == 3:  # what compilation held is not counted
            torch.cuda.reset_peak_memory_stats()
        theirs.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            hidden = model.hidden(tokens[:, :-1])
        weight = model.embedding.weight
        if on_gpu:  # as autocast would for the logits
            hidden, weight = hidden.bfloat16(), weight.bfloat16()
        loss = form.loss(hidden, weight, tokens[:, 1:])
        loss.backward()
        if form.step_ is None:
            theirs.step()
        else:
            slopes = [parameter.grad for parameter in parameters]
            state = form.step_(parameters, slopes, state, learning_rate=config.learning_rate)
        losses.append(loss.detach())
        if on_gpu:
            ends.append(torch.cuda.Event(enable_timing=True))
            ends[-1].record()
    losses = torch.stack(losses).tolist()  # waits for the last step
    seconds = [start.elapsed_time(end) / 1e3 for start, end in pairwise(ends[2:])]
    memory = torch.cuda.max_memory_allocated() if on_gpu else 0
    return Run(losses, statistics.median(seconds or [0.0]), memory)


def apart(one: Run, other: Run) -> float:
    """The largest difference of two loss curves, in nats."""
    return max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))


def draw(runs: dict[str, Run], others: list[Run], on_gpu: bool) -> None:
    """The losses, which lie on each other; on a GPU also time and memory."""
    figure, panels = plt.subplots(1, 3 if on_gpu else 1, figsize=(13 if on_gpu else 6, 4))
    figure.set_layout_engine("constrained")
    panels = list(panels) if on_gpu else [panels]
    for other in others:
        panels[0].plot(other.losses, color="0.7", linewidth=1)
    for i, one in enumerate(runs.values()):
        panels[0].plot(one.losses, linewidth=0.8 * (len(runs) - i), color=f"C{i}")
    panels[0].set(title="loss (grey: other random starts)", xlabel="step", ylabel="nats")
    if on_gpu:
        values = {
            "milliseconds a step": [1e3 * one.seconds for one in runs.values()],
            "GiB held at most": [one.memory / 2**30 for one in runs.values()],
        }
        for axes, (title, lengths) in zip(panels[1:], values.items(), strict=True):
            axes.barh(list(runs), lengths, color=[f"C{i}" for i in range(len(runs))])
            axes.invert_yaxis()
            axes.set(title=title)


def main(config: Config) -> list[Finding]:
    on_gpu = config.device != "cpu"
    wanted = forms(config.compiled)
    runs = {name: train(form, config) for name, form in tqdm(wanted.items(), unit="run")}
    first, last = runs["equations"], list(runs)[-1]
    others = [train(wanted["equations"], config, seed) for seed in (1, 2)]
    spread = min(apart(other, first) for other in others)
    findings = [
        Finding("loss at the first step", first.losses[0], "nats"),
        Finding("loss at the last step", first.losses[-1], "nats"),
        Finding("two other random starts part from it by at least", spread, "nats"),
    ]
    for name, one in runs.items():
        if name != "equations":
            limit = at_most(spread if on_gpu else 1e-9)
            claim = f"{name}: losses part from the equations' by at most"
            findings.append(Finding(claim, apart(one, first), "nats", expected=limit))
        if on_gpu:
            findings += [
                Finding(f"{name}: a step", 1e3 * one.seconds, "ms"),
                Finding(f"{name}: speed, times the equations'", first.seconds / one.seconds, "x"),
                Finding(f"{name}: memory", one.memory / 2**30, "GiB"),
            ]
        if config.peak:
            counted = sum(p.numel() for p in Decoder(config.shape).parameters())
            work = flops_per_token(counted, config.layers, config.width, config.length)
            speed = config.batch * config.length / one.seconds
            goal = at_least(0.45) if name == last else None
            share = utilisation(speed, work, config.peak)
            findings.append(Finding(f"{name}: MFU", share, goal=goal))
    draw(runs, others, on_gpu)
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(layers=1, batch=1, length=8, steps=4))
