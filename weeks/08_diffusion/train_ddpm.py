"""Can a network that only removes noise write?

A U-Net learns to denoise digits (or KanjiVG's characters, or OpenMoji, with --data), and 4,000 of
them are few: training stops when the loss of held-out pictures no longer falls. Sheets show what it
makes, how the pictures come out of the noise, and the average of the weights beside the last of
them. Stop it with Ctrl-C: the same command goes on.

On a CPU it is a small model of digits of 14 x 14, half trained. The real one is

    uv run python weeks/08_diffusion/train_ddpm.py --device cuda
    uv run python weeks/08_diffusion/train_ddpm.py --device cuda --data kanji

Expected: a classifier names what was made, and test digits are as near to the training digits as
made ones are. As good as real digits by the kernel distance is the goal.

Data    MNIST; KanjiVG (Ulrich Apel), CC BY-SA 3.0, and OpenMoji, CC BY-SA 4.0: so are their figures
Paper   Ho et al. 2020, arXiv:2006.11239
Run     uv run python weeks/08_diffusion/train_ddpm.py
"""

from dataclasses import dataclass
from typing import Literal

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from implementations.generative.denoiser import asked, levels_for, to_unit
from implementations.generative.diffusion_config import for_device
from implementations.generative.diffusion_pictures import pictures
from implementations.generative.judge import Judge, judge_of
from implementations.generative.metrics import copied
from implementations.generative.samplers import SAMPLERS, sample
from implementations.generative.schedules import SCHEDULES
from implementations.generative.trained_diffusion import Trained, make, train_or_load
from implementations.lab.findings import Finding, at_least, at_most
from implementations.lab.script import run

RIGHTS = {
    "kanji": "Characters: KanjiVG, CC BY-SA 3.0, and what was learnt from it",
    "openmoji": "Pictures: OpenMoji, CC BY-SA 4.0, and what was learnt from it",
}


@dataclass(frozen=True)
class Config:
    """Train a diffusion model and look at what it makes."""

    data: Literal["mnist_5k", "kanji", "openmoji"] = "mnist_5k"
    device: str = "cpu"
    """cuda trains the real model"""
    size: int = 0
    """pixels of a side; 0 for 14 on a CPU and 28 on a GPU, 32 for kanji and openmoji"""
    steps: int = 0
    """of training; 0 for 1,200 on a CPU and 6,000 on a GPU"""
    count: int = 500
    """pictures that are made and judged"""
    sampling: int = 50
    """steps of DPM-Solver++ 2M"""
    judge_steps: int = 1000
    """of the training of the classifier that judges"""

    @property
    def variant(self) -> str:
        """Other sets than the digits have records of their own."""
        return "" if self.data == "mnist_5k" else self.data


def sheet(axes: Axes, made: Tensor, columns: int, title: str) -> None:
    """Pictures in rows: ink is dark on white paper."""
    ink = to_unit(made.float().cpu())
    ink = torch.nn.functional.pad(1 - ink, (1, 1, 1, 1), value=0.8)
    grid = ink.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2)
    axes.imshow(grid.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_axis_off()


def way(trained: Trained, shape: tuple[int, int, int], labels: Tensor | None) -> list[Tensor]:
    """One picture of each label on its way out of the noise: x, and the guess of the data below."""
    device = next(trained.model.parameters()).device
    noise = torch.randn(10, *shape, generator=torch.Generator().manual_seed(3)).to(device)
    known = None if labels is None else labels.to(device)
    seen, levels = [], levels_for(SCHEDULES["cosine"], 60)
    with torch.no_grad():
        ask = asked(trained.model, known)
        sample(ask, noise, levels, SAMPLERS["ddim"], watch=lambda *now: seen.append(now))
    chosen = [seen[index] for index in (0, 12, 24, 36, 48, 59)]
    return [torch.cat([now[place].cpu() for now in chosen]) for place in (1, 2)]


def draw(config: Config, trained: Trained, made: Tensor, raw: Tensor, rows: list[Tensor]) -> None:
    """Three figures: what it makes, how it comes about, and the losses."""
    columns = 20
    plt.figure(num="samples", figsize=(10, 3.6), layout="constrained").set_label("samples")
    axes = plt.gcf().subplots(2, 1)
    some = torch.linspace(0, len(made) - 1, 4 * columns).long()
    sheet(axes[0], made[some], columns, "averaged weights")
    sheet(axes[1], raw[some[: 2 * columns]], columns, "last weights, from the same noise")
    if note := RIGHTS.get(config.data):
        plt.gcf().suptitle(note, fontsize=8)
    plt.figure(num="way", figsize=(10, 3.4), layout="constrained").set_label("way")
    axes = plt.gcf().subplots(1, 2)
    sheet(axes[0], rows[0], 10, "out of the noise, from above to below")
    sheet(axes[1], rows[1], 10, "and the data as they are guessed on the way")
    if note:
        plt.gcf().suptitle(note, fontsize=8)
    plt.figure(num="loss", figsize=(6, 3.2), layout="constrained").set_label("loss")
    axes = plt.gcf().subplots()
    steps = [look["step"] for look in trained.history]
    for key, name in (("loss", "training"), ("held_out", "held out, averaged weights")):
        axes.semilogy(steps, [look[key] for look in trained.history], label=name)
    axes.set(xlabel="updates", ylabel="mean squared error of v")
    axes.legend()


def judged(
    config: Config, judge: Judge, labels: Tensor, made: Tensor, raw: Tensor
) -> list[Finding]:
    """Digits, by the classifier's metrics, made by averaged and by last weights."""
    test, floor = judge.verdict(judge.test.pixels), judge.floor(1000)
    real = config.device != "cpu"  # the small model is not expected to be good
    chance = judge.kernel_floor(min(500, config.count))
    findings = [
        Finding("classifier: test digits named",
                judge.accuracy(judge.test.pixels, judge.test.labels)),
        Finding("test digits named with confidence over 0.9", test.confident),
        Finding("kernel distance, training against test digits: size of its chance", chance),
        Finding("Frechet distance of 1,000 training digits", floor.frechet),
    ]  # fmt: skip
    for name, pixels in (("averaged weights", made), ("last weights", raw)):
        verdict = judge.verdict(pixels)
        main_one = real and name == "averaged weights"
        findings += [
            Finding(f"{name}: made digits named with confidence over 0.9", verdict.confident,
                    goal=at_least(0.9) if main_one else None),
            Finding(f"{name}: named as their labels say", judge.accuracy(pixels, labels)),
            Finding(f"{name}: kernel distance to test digits, times that of chance",
                    max(verdict.kernel, 0.0) / chance, "x",
                    goal=at_most(3.0) if main_one else None),
            Finding(f"{name}: Frechet distance to test digits", verdict.frechet),
            Finding(f"{name}: precision", verdict.precision),
            Finding(f"{name}: recall", verdict.recall),
            Finding(f"{name}: nearer to a training digit than 95% of test digits",
                    verdict.copied, goal=at_most(0.1)),
        ]  # fmt: skip
    return findings


def main(config: Config) -> list[Finding]:
    if config.device == "cpu":
        torch.set_num_threads(1)
    settings = for_device(
        config.device,
        size=config.size or (32 if config.variant else 0),
        steps=config.steps,
        data=config.data,
        labelled=config.data != "kanji",
    )
    size, data = settings.size, pictures(config.data, settings.size)
    trained = train_or_load(settings, config.device)
    shape = tuple(data.train.pixels.shape[1:])
    labels = torch.arange(config.count) % data.classes if data.classes else None
    made = make(trained.model, labels, config.count, shape, steps=config.sampling)
    raw = make(trained.raw, labels, config.count, shape, steps=config.sampling)
    best = min(trained.history, key=lambda look: look["held_out"])
    findings = [
        Finding("rows and columns of a picture", size),
        Finding("parameters", sum(p.numel() for p in trained.model.parameters())),
        Finding("updates at the best held-out loss", best["step"]),
        Finding("held-out loss there", best["held_out"]),
        Finding("training loss there", best["loss"]),
        Finding("training takes", trained.seconds, "s", goal=at_most(600)),
    ]
    if config.variant:
        flat = [part.flatten(1) for part in (made, data.train.pixels, data.test.pixels)]
        findings += [
            Finding("pictures", config.variant),
            Finding("nearer to a training picture than 95% of test pictures", copied(*flat),
                    goal=at_most(0.1)),
        ]  # fmt: skip
    else:
        judge = judge_of(size, config.judge_steps, config.device)
        findings += judged(config, judge, labels, made, raw)
    rows = way(trained, shape, None if labels is None else labels[:10])
    draw(config, trained, made, raw, rows)
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(size=8, steps=8, count=80, sampling=3, judge_steps=30))
