"""Does a model learn the same in fewer bits?

Small decoders read the World English Bible letter by letter, alike in start and data, with products
in float32, bf16, fp16 with a dynamic loss scale, and fp8 under three scalings (e4m3 forward; the
products are the equation of fp8.py). Weights are float32 in all.

The goal: the gap of bf16 and fp8 to float32 at the end lies within what a change of seed does. One
seed's runs see the same windows, so their differences are taken in pairs.

Paper   Micikevicius et al. 2017, arXiv:1710.03740; 2022, arXiv:2209.05433
Run     uv run python weeks/06_mixed_precision/train_in_every_precision.py
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from statistics import fmean, stdev

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

from implementations.lab.findings import Finding, at_most, over_seeds
from implementations.lab.script import run
from implementations.models.decoder import Decoder, DecoderConfig
from implementations.optimizers.adamw import init as adamw_init
from implementations.optimizers.adamw import step as adamw_step
from implementations.precision.autocast import POLICIES, Autocast
from implementations.precision.fp8 import make_recipe, with_fp8
from implementations.precision.loss_scaling import DYNAMIC, init, scaled, step
from implementations.sources.text import bible_characters
from implementations.training.accumulation import next_token_loss

LENGTH, BATCH = 64, 8
characters = cache(bible_characters)
RUNS = ("fp32", "bf16", "fp16", "fp8 current", "fp8 delayed", "fp8 block")


@dataclass(frozen=True)
class Config:
    """Train one decoder in six precisions."""

    width: int = 48
    layers: int = 2
    steps: int = 200
    seeds: int = 3
    learning_rate: float = 3e-3
    device: str = "cpu"
    workers: int = 1
    """processes that train at once: small steps leave a GPU waiting"""


def train(name: str, seed: int, config: Config) -> list[float]:
    """The losses of one run."""
    torch.set_num_threads(1)
    text, alphabet = characters("web")
    sizes = {"width": config.width, "layers": config.layers, "heads": 4}
    torch.manual_seed(seed)
    decoder = Decoder(
        DecoderConfig(len(alphabet), hidden=2 * config.width, positions=LENGTH, **sizes)
    )
    if name.startswith("fp8"):
        with_fp8(decoder, partial(make_recipe, name.split()[1]))
    decoder.to(config.device)
    context = nullcontext()
    if name in ("bf16", "fp16"):
        dtype = torch.bfloat16 if name == "bf16" else torch.float16
        context = Autocast(POLICIES[torch.device(config.device).type], dtype)
    parameters = list(decoder.parameters())
    state = init(adamw_init(parameters), 2.0**16 if name == "fp16" else 1.0)
    # Without fp16 the scale stays at one, and a step that is not finite is still skipped.
    rule = DYNAMIC if name == "fp16" else DYNAMIC._replace(growth=1.0, backoff=1.0)
    update = partial(adamw_step, learning_rate=config.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(config.steps):
        starts = torch.randint(len(text) - LENGTH, (BATCH, 1), generator=generator)
        windows = text[starts + torch.arange(LENGTH + 1)].to(config.device)
        with context:
            total, count = next_token_loss(decoder, windows)
        loss = total / count
        gradients = torch.autograd.grad(scaled(loss, state), parameters)
        moved, state, _ = step(parameters, gradients, state, update, rule=rule, largest_norm=1.0)
        with torch.no_grad():
            for parameter, value in zip(parameters, moved, strict=True):
                parameter.copy_(value)
        losses.append(loss.item())
    return losses


def train_all(tasks: list[tuple[str, int]], config: Config) -> Iterator[list[float]]:
    """The losses of each run, in order."""
    names, seeds = zip(*tasks, strict=True)
    call = partial(train, config=config)
    if config.workers == 1:
        yield from map(call, names, seeds)
    else:
        with ProcessPoolExecutor(config.workers, get_context("spawn")) as pool:
            yield from pool.map(call, names, seeds)


def main(config: Config) -> list[Finding]:
    tasks = [(name, seed) for name in RUNS for seed in range(config.seeds)]
    curves = {name: [] for name in RUNS}
    runs = tqdm(train_all(tasks, config), total=len(tasks), unit="run")
    for (name, _), losses in zip(tasks, runs, strict=True):
        curves[name].append(losses)
    _, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    window = max(1, config.steps // 20)
    for name, runs in curves.items():
        smooth = torch.tensor(runs).mean(0).unfold(0, window, 1).mean(-1)
        axes.plot(smooth, label=name, linestyle="--" if "fp8" in name else "-")
    axes.set(xlabel="step", ylabel="loss, nats a character, mean over the seeds")
    axes.legend()
    end = max(1, config.steps // 5)
    final = {name: [sum(r[-end:]) / end for r in runs] for name, runs in curves.items()}
    findings = [
        Finding(f"{name}: loss at the end, nats", **over_seeds(values))
        for name, values in final.items()
    ]
    gaps = {
        name: [a - b for a, b in zip(final[name], final["fp32"], strict=True)] for name in RUNS[1:]
    }
    for name, values in gaps.items():
        claim = f"{name} − fp32, paired by seed, nats"
        findings.append(Finding(claim, **over_seeds(values), goal=at_most(0.05)))
    if config.seeds > 1:
        spread = stdev(final["fp32"])
        means = max(abs(fmean(values)) for values in gaps.values())
        largest = max(abs(gap) for values in gaps.values() for gap in values)
        for claim, gap in (("mean gap of a precision", means), ("gap of all runs", largest)):
            claim = f"largest {claim}, in units of fp32's deviation over seeds"
            findings.append(Finding(claim, gap / spread, goal=at_most(1.0)))
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(width=32, layers=1, steps=8, seeds=1))
