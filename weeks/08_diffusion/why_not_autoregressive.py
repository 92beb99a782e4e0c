"""Why not write a picture pixel by pixel, as one writes a text?

A decoder of as many parameters learns digits as texts of pixels, given their label; it and a
diffusion model are asked for digits, and judged by the same metrics. A pixel is one of 16 levels of
grey for the decoder. Of both the weights are taken at which held-out digits cost least.

Expected: both write digits. The decoder's likelihood is exact and free; its samples cost a pass for
every pixel, one after another, where diffusion takes some dozens of passes over all of them.

Paper   van den Oord et al. 2016, arXiv:1601.06759; Ho et al. 2020, arXiv:2006.11239
Run     uv run python weeks/08_diffusion/why_not_autoregressive.py
"""

import math
import time
from dataclasses import asdict, dataclass

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from implementations.generative.denoiser import to_unit
from implementations.generative.diffusion_pictures import pictures
from implementations.generative.judge import candidate
from implementations.generative.pixel_transformer import (
    decoder_of,
    pictures_of,
    pixel_loss,
    tokens_of,
    write,
)
from implementations.lab.files import run_folder
from implementations.lab.findings import Finding, at_least, within
from implementations.lab.script import run
from implementations.models.decoder import Decoder
from implementations.training.checkpoint import State, load_latest, save
from implementations.training.loop import train
from implementations.training.rows import RandomRows
from implementations.training.settings import TrainingConfig

SHADES = 16


@dataclass(frozen=True)
class Config:
    """Train a decoder of pixels; compare it with the diffusion model."""

    device: str = "cpu"
    """cuda compares real models"""
    size: int = 0
    """pixels of a side; 0 for 14 on a CPU and 28 on a GPU"""
    training: int = 0
    """steps of the diffusion model; 0 for 1,200 on a CPU and 6,000 on a GPU"""
    updates: int = 0
    """steps of the decoder; 0 for 300 on a CPU and 3,000 on a GPU"""
    batch: int = 32
    """digits in one of them"""
    count: int = 250
    """pictures of each"""
    judge_steps: int = 1000
    """of the training of the classifier that judges"""


def trained_decoder(config: Config, size: int) -> tuple[Decoder, int, float]:
    """The decoder as it was when held-out digits cost it least, the update at which that was, and
    the seconds that its training took just now."""
    real = config.device != "cpu"
    torch.manual_seed(0)
    width, layers = (256, 8) if real else (64, 4)
    decoder = decoder_of(size, SHADES, 10, width, layers).to(config.device)
    data = pictures("mnist_5k", size)
    tokens = tokens_of(data.train.pixels, data.train.labels, SHADES).to(config.device)
    held_out = tokens_of(*data.validation, SHADES).to(config.device)
    steps = config.updates or (3000 if real else 300)
    settings = TrainingConfig(
        steps=steps,
        learning_rate=1e-3,
        warmup=steps // 20,
        bfloat16=real,
        compiled=real,
        checkpoint_every=max(1, steps // 4),
        log_every=max(1, steps // 100),
        observe_every=max(1, steps // 20),
        keep=1,
    )
    folder = run_folder("pixels", asdict(config), __file__)
    best = folder / "best"
    best.mkdir(parents=True, exist_ok=True)

    def look(step: int) -> dict[str, float]:
        found, kept = bits(decoder, held_out), load_latest(best)
        if kept is None or found < kept[1].scalars["bits"]:
            state = State({"weights": decoder.state_dict()}, {"bits": found})
            save(best, step, state, keep=1)
        return {"held_out_bits": found}

    rows, started = RandomRows(tokens, batch=config.batch), time.perf_counter()
    train(decoder, rows, settings, folder, loss=pixel_loss, observe=look)
    seconds = time.perf_counter() - started
    update, kept = load_latest(best)
    decoder.load_state_dict(kept.tensors["weights"])
    return decoder.eval(), update, seconds


@torch.no_grad()
def bits(decoder: Decoder, tokens: Tensor) -> float:
    """Of a pixel of 16 greys, in bits."""
    totals = [pixel_loss(decoder, part) for part in tokens.split(50)]
    return sum(t.item() for t, _ in totals) / sum(n for _, n in totals) / math.log(2)


def timed(make_all, device: str) -> tuple[Tensor, float]:
    """What a call makes, and its seconds; called twice, because the first one may compile."""
    make_all()
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    made = make_all()
    return made, time.perf_counter() - started


def main(config: Config) -> list[Finding]:
    if config.device == "cpu":
        torch.set_num_threads(1)
    writer = candidate(
        config.device, config.count, config.judge_steps, size=config.size, steps=config.training
    )
    diffusion, judge, labels = writer
    decoder, update, seconds = trained_decoder(config, judge.size)
    at_device = labels.to(config.device)

    def by_pixels() -> Tensor:
        generator = torch.Generator(config.device).manual_seed(0)
        return pictures_of(write(decoder, at_device, SHADES, generator).cpu(), judge.size, SHADES)

    def by_diffusion() -> Tensor:
        return writer.made(steps=25)

    chance = judge.kernel_floor(min(500, config.count))
    made, took = {}, {}
    made["decoder"], took["decoder"] = timed(by_pixels, config.device)
    made["diffusion"], took["diffusion"] = timed(by_diffusion, config.device)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (decoder, diffusion.model)]
    test = tokens_of(*judge.test, SHADES).to(config.device)
    known = tokens_of(*(part[::4] for part in judge.train), SHADES).to(config.device)
    test, known = test[: 4 * config.count], known[: 4 * config.count]
    findings = [
        Finding("parameters of the diffusion model", sizes[1]),
        Finding("parameters of the decoder, over those", sizes[0] / sizes[1], "x",
                goal=within(0.8, 1.25)),
        Finding("decoder: updates at the best held-out loss", update),
        Finding("decoder: bits a pixel of 16 greys, test digits", bits(decoder, test)),
        Finding("decoder: bits a pixel of 16 greys, training digits", bits(decoder, known)),
        Finding("decoder: training took", seconds, "s"),
        Finding("diffusion: training took", diffusion.seconds, "s"),
    ]  # fmt: skip
    for name, pixels in made.items():
        verdict = judge.verdict(pixels)
        findings += [
            Finding(f"{name}: a picture takes", took[name] / config.count * 1e3, "ms"),
            Finding(f"{name}: named with confidence over 0.9", verdict.confident),
            Finding(f"{name}: named as their labels say", judge.accuracy(pixels, labels)),
            Finding(f"{name}: kernel distance over chance", verdict.kernel / chance, "x"),
            Finding(f"{name}: precision", verdict.precision),
            Finding(f"{name}: recall", verdict.recall),
            Finding(f"{name}: nearer to a training digit than 95% of test digits", verdict.copied),
        ]
    findings.append(
        Finding("diffusion makes pictures faster by", took["decoder"] / took["diffusion"], "x",
                goal=at_least(1.0))
    )  # fmt: skip
    _, axes = plt.subplots(2, 1, figsize=(10, 2.6), layout="constrained")
    for axis, (name, pixels) in zip(axes, made.items(), strict=True):
        rows = (1 - to_unit(pixels[:40, 0])).split(20)
        axis.imshow(torch.cat([torch.cat(list(row), 1) for row in rows]).numpy(), cmap="gray")
        axis.set_title(name, fontsize=9, loc="left")
        axis.set_axis_off()
    return findings


if __name__ == "__main__":
    few = Config(size=8, training=4, updates=2, batch=8, count=16, judge_steps=20)
    run(main, Config(), quick=few)
