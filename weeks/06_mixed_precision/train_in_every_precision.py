"""Does a model learn the same in fewer bits?

Small decoders read the World English Bible letter by letter, alike in start and data, with products
in float32, bf16, fp16 with a dynamic loss scale, and fp8 under three scalings (e4m3 forward; the
equation of fp8.py on a CPU, kernels and tensor cores on a GPU). Weights are float32 in all.

The goal: the gap of bf16 and fp8 to float32 at the end lies within what a change of seed does. One
seed's runs see the same windows, so their differences are taken in pairs.

Paper   Micikevicius et al. 2017, arXiv:1710.03740; 2022, arXiv:2209.05433
Run     uv run python weeks/06_mixed_precision/train_in_every_precision.py
        uv run python weeks/06_mixed_precision/train_in_every_precision.py --device cuda --width 256
        --layers 4 --batch 32 --length 128 --steps 1000 --seeds 4 --processes 12
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

from implementations.lab.findings import Finding, at_most, over_seeds
from implementations.lab.script import run
from implementations.models.decoder import Decoder, DecoderConfig
from implementations.optimizers.adamw import init as adamw_init
from implementations.optimizers.adamw import step as adamw_step
from implementations.precision.autocast import POLICIES, Autocast
from implementations.precision.fp8 import make_recipe, product_scaled_mm, with_fp8
from implementations.precision.loss_scaling import DYNAMIC, init, scaled, step
from implementations.sources.text import bible_characters
from implementations.training.accumulation import next_token_loss

RUNS = ("fp32", "bf16", "fp16", "fp8 current", "fp8 delayed", "fp8 block")


@dataclass(frozen=True)
class Config:
    """Train one decoder in six precisions."""

    device: str = "cpu"
    width: int = 48
    layers: int = 2
    batch: int = 8
    length: int = 64
    steps: int = 240
    seeds: int = 3
    learning_rate: float = 3e-3
    processes: int = 1
    """runs at the same time"""


def fp8_options(device: str) -> dict[str, Any]:
    """The equations on a CPU; on a GPU the kernels and the tensor cores' products."""
    if device == "cpu":
        return {}
    from implementations.precision import fp8_triton

    quantize, blocks = fp8_triton.quantize_both_triton, fp8_triton.quantize_blocks_triton
    return {"product": product_scaled_mm, "quantize": quantize, "quantize_blocks": blocks}


def train(name: str, seed: int, config: Config) -> list[float]:
    """The losses of one run."""
    torch.set_num_threads(1)
    text, alphabet = bible_characters("web")
    text = text.to(config.device)
    sizes = {"width": config.width, "layers": config.layers, "heads": 4}
    torch.manual_seed(seed)
    decoder = Decoder(
        DecoderConfig(len(alphabet), hidden=2 * config.width, positions=config.length, **sizes)
    )
    if name.startswith("fp8"):
        with_fp8(decoder, partial(make_recipe, name.split()[1], **fp8_options(config.device)))
    decoder.to(config.device)
    context = nullcontext()
    if name in ("bf16", "fp16"):
        context = Autocast(
            POLICIES[config.device], torch.bfloat16 if name == "bf16" else torch.float16
        )
    parameters = list(decoder.parameters())
    state = init(adamw_init(parameters), 2.0**16 if name == "fp16" else 1.0)
    # Without fp16 the scale stays at one, and a step that is not finite is still skipped.
    rule = DYNAMIC if name == "fp16" else DYNAMIC._replace(growth=1.0, backoff=1.0)
    update = partial(adamw_step, learning_rate=config.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(config.steps):
        starts = torch.randint(len(text) - config.length, (config.batch, 1), generator=generator)
        window = (starts + torch.arange(config.length + 1)).to(config.device)
        with context:
            total, count = next_token_loss(decoder, text[window])
        loss = total / count
        gradients = torch.autograd.grad(scaled(loss, state), parameters)
        moved, state, _ = step(parameters, gradients, state, update, rule=rule, largest_norm=1.0)
        with torch.no_grad():
            for parameter, value in zip(parameters, moved, strict=True):
                parameter.copy_(value)
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def every_run(config: Config) -> dict[str, list[list[float]]]:
    """The losses by name, one list for each seed."""
    runs = [(name, seed) for name in RUNS for seed in range(config.seeds)]
    found: dict[tuple[str, int], list[float]] = {}
    with tqdm(total=len(runs), unit="run") as bar:
        if config.processes == 1:
            for run_of in runs:
                found[run_of] = train(*run_of, config)
                bar.update()
        else:
            spawned = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(config.processes, spawned) as pool:
                waiting = {pool.submit(train, *run_of, config): run_of for run_of in runs}
                for done in as_completed(waiting):
                    found[waiting[done]] = done.result()
                    bar.update()
    return {name: [found[name, seed] for seed in range(config.seeds)] for name in RUNS}


def main(config: Config) -> list[Finding]:
    curves = every_run(config)
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
    for name in RUNS[1:]:
        gaps = torch.tensor(final[name]) - torch.tensor(final["fp32"])
        findings.append(Finding(f"{name} − fp32, paired by seed, nats", **over_seeds(gaps)))
        if config.seeds > 1:
            distance = gaps.mean().abs().item() / torch.tensor(final["fp32"]).std().item()
            claim = f"{name}: mean gap to fp32, in deviations of fp32 over the seeds"
            findings.append(Finding(claim, distance, goal=at_most(1.0)))
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(width=32, layers=1, steps=12, seeds=1))
