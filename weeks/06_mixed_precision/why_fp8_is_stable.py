"""Why does training in 8 bits not fall apart? Because of scales; and where it does without them.

Three things that real networks do are planted, each of growing size. A channel s times as large as
the others, its weights s times as small, so that the layer's answer does not change: only the
rounding sees it. A step at which all inputs grow, and one at which they fall again: what delayed
scaling does not know in time. And a training run of a small network that in exact arithmetic is the
same whatever is planted.

Expected: e4m3 reaches over 2^18, so an outlier of 2^20 wipes out the rest of its tensor, but of a
row's blocks only its own: one of four, and half of the error's root. For the weights' gradient
blocks run along the tokens, and the outlier has blocks to itself. Growth costs delayed scaling one
step, a fall the sixteen that it remembers. A cast that does not saturate makes NaN of the growth.

Paper   Micikevicius et al. 2022, arXiv:2209.05433; blocks: DeepSeek-V3, arXiv:2412.19437, 3.3.2
Run     uv run python weeks/06_mixed_precision/why_fp8_is_stable.py
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from implementations.lab.findings import Finding, at_least, at_most, equals, over_seeds
from implementations.lab.script import run
from implementations.precision import formats
from implementations.precision.fp8 import (
    E4M3,
    E5M2,
    HISTORY,
    Delayed,
    Recipe,
    Scaled,
    ScaledProduct,
    amax_of,
    dequantize,
    make_recipe,
    product_naive,
    quantize_both,
)

CHANNEL = 7  # where the outlier is
FORMATS = {E4M3: formats.E4M3, E5M2: formats.E5M2}
JUMP = 2.0**4  # growth, for one batch
FALL = 2.0**16


@dataclass(frozen=True)
class Config:
    """Plant outliers and jumps."""

    width: int = 512
    """channels of the input: four blocks"""
    hidden: int = 128
    tokens: int = 256
    largest: int = 20
    """the largest outlier, as a power of two"""
    every: int = 1
    """how far apart the outliers are"""
    outlier: int = 20
    """that of the training runs"""
    steps: int = 150
    seeds: int = 3
    learning_rate: float = 0.03


def unscaled(x: Tensor, dtype: torch.dtype) -> tuple[Scaled, Scaled]:
    """The tensor as it is, in fp8: a scale of one."""
    return quantize_both(x, dtype, torch.ones(()))[:2]


def not_saturating(x: Tensor, dtype: torch.dtype, scale: Tensor) -> tuple[Scaled, Scaled, Tensor]:
    """`quantize_both` without its clamp: e4m3fn has no infinity, so what is too large is NaN.

    By the integers of formats.py, because devices and versions of torch differ here.
    """
    values = formats.rounded(x.float() * scale, FORMATS[dtype]).to(dtype)
    return Scaled(values, 1 / scale), Scaled(values.mT.contiguous(), 1 / scale), amax_of(x)


RECIPES: dict[str, Callable[[], Recipe] | None] = {
    "float32": None,
    "no scale": lambda: Recipe(unscaled, unscaled, unscaled, product_naive),
    "current": partial(make_recipe, "current"),
    "delayed": partial(make_recipe, "delayed"),
    "delayed, not saturating": partial(make_recipe, "delayed", quantize=not_saturating),
    "block": partial(make_recipe, "block"),
}


class Stretched(nn.Module):
    """A linear layer that reads x · s through weights / s: the same function for every s.

    Args:
        recipe: of fp8; None: float32.
        stretch: s, one number a channel.
    """

    def __init__(self, weight: Tensor, stretch: Tensor, recipe: Callable[[], Recipe] | None):
        super().__init__()
        self.weight, self.stretch = nn.Parameter(weight.clone()), stretch
        self.recipe = None if recipe is None else recipe()

    def forward(self, x: Float[Tensor, "token input"]) -> Float[Tensor, "token output"]:
        large, small = x * self.stretch, self.weight / self.stretch
        if self.recipe is None:
            return large @ small.T
        return ScaledProduct.apply(large, small, self.recipe, torch.float32)


def stretch_of(width: int, power: int) -> Float[Tensor, " input"]:
    """Ones, but for the outlier."""
    stretch = torch.ones(width)
    stretch[CHANNEL] = 2.0**power
    return stretch


def outliers(config: Config) -> dict[str, list[float]]:
    """Relative errors of a layer's answer and of its weights' gradient, by the outlier's size."""
    x, upstream = (
        torch.randn(config.tokens, config.width),
        torch.randn(config.tokens, config.hidden),
    )
    weight = torch.randn(config.hidden, config.width) / config.width**0.5
    wanted = x @ weight.T, upstream.T @ x
    found: dict[str, list[float]] = {}
    for power in range(0, config.largest + 1, config.every):
        for name in ("current", "block"):
            layer = Stretched(weight, stretch_of(config.width, power), RECIPES[name])
            answer = layer(x)
            (gradient,) = torch.autograd.grad(answer, layer.weight, upstream)
            # The outlier's own weights have their own block or none: what becomes of the others?
            gradient, exact = (g[:, CHANNEL + 1 :] for g in (gradient, wanted[1]))
            for what, got, want in (("y", answer, wanted[0]), ("dW", gradient, exact)):
                error = ((got - want).norm() / want.norm()).item()
                found.setdefault(f"{name}, {what}", []).append(error)
    return found


def jumps(config: Config) -> list[float]:
    """Relative error of delayed scaling's words, call by call: as usual for a while, then FALL
    times as large for as long as it remembers, then as before."""
    delayed, errors = Delayed(), []
    sizes = [1.0] * HISTORY + [FALL] * HISTORY + [1.0] * (HISTORY + 4)
    for size in sizes:
        x = size * torch.randn(config.tokens, config.width)
        errors.append(((dequantize(delayed(x, E4M3)[0]) - x).norm() / x.norm()).item())
    return errors


def train(name: str, power: int, jump: float, seed: int, config: Config) -> list[float]:
    """Losses of two layers that learn what two fixed ones answer; one batch is `jump` as large."""
    torch.manual_seed(seed)
    new = partial(torch.randn, config.hidden, config.width)
    teacher, start = new() / config.width**0.5, new() / config.width**0.5
    last, start_last = (torch.randn(8, config.hidden) / config.hidden**0.5 for _ in range(2))
    first = Stretched(start, stretch_of(config.width, power), RECIPES[name])
    second = Stretched(start_last, torch.ones(config.hidden), RECIPES[name])
    parameters, losses = [first.weight, second.weight], []
    optimizer = torch.optim.AdamW(parameters, config.learning_rate / 10, weight_decay=0.0)
    for number in range(config.steps):
        x = torch.randn(config.tokens, config.width)
        x = jump * x if number == config.steps // 2 else x
        wanted = torch.relu(x @ teacher.T) @ last.T
        loss = (second(torch.relu(first(x))) - wanted).square().mean() / wanted.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def draw(
    errors: dict[str, list[float]],
    delayed: list[float],
    curves: dict[str, list[float]],
    config: Config,
) -> None:
    _, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for (name, values), style in zip(errors.items(), ("C0-", "C0--", "C1-", "C1--"), strict=True):
        left.plot(range(0, config.largest + 1, config.every), values, style, label=name)
    left.set(title="one channel larger than the others", xlabel="by 2 to the power")
    left.set(ylabel="relative error", yscale="log")
    middle.plot(delayed, "C2.-")
    middle.set(title=f"delayed scaling, inputs {FALL:,.0f} times larger for {HISTORY} calls")
    middle.set(xlabel="call", ylabel="relative error of its words", yscale="log")
    for name, losses in curves.items():
        lasting = sum(map(math.isfinite, losses))
        style = "k:" if name.startswith("float32") else "-" if lasting == len(losses) else "X--"
        right.plot(losses[:lasting], style, label=name)
    right.set(
        title=f"training; an outlier of 2^{config.outlier}, or a batch {JUMP:.0f} times larger"
    )
    right.set(xlabel="step", ylabel="loss, of the answers' variance", yscale="log")
    for axes in (left, right):
        axes.legend(fontsize="small")


def of_outliers(errors: dict[str, list[float]], config: Config) -> list[Finding]:
    """What is lost to the largest outlier, against what must be."""
    full = config.largest >= 20
    blocks = config.width / 128
    broken = config.every * sum(error <= 0.1 for error in errors["current, y"])
    size = f"an outlier of 2^{config.largest}"
    whole = at_least(0.9) if full else None
    part = at_most(1.1 * math.sqrt(1 / blocks)) if full else None
    return [
        Finding("one scale: the error passes 10% at an outlier of 2 to the power", broken),
        Finding(f"{size}, one scale: error of the answer", errors["current, y"][-1], "", whole),
        Finding(f"{size}, blocks: error of the answer", errors["block, y"][-1], "", part),
        Finding(
            f"{size}, one scale: error of the other weights' gradient", errors["current, dW"][-1]
        ),
        Finding(
            f"{size}, blocks: error of the other weights' gradient",
            errors["block, dW"][-1],
            expected=at_most(0.06),
        ),
    ]


def of_jumps(delayed: list[float]) -> list[Finding]:
    """How long delayed scaling is wrong."""
    grown, fallen = delayed[HISTORY : 2 * HISTORY], delayed[2 * HISTORY :]
    times = f"{FALL:,.0f} times"
    return [
        Finding(f"inputs grow {times}: delayed scaling's error at that call", grown[0]),
        Finding("calls until it is below 5% again", first_below(grown), expected=equals(1)),
        Finding(f"inputs fall {times}: its error at that call", fallen[0]),
        Finding("calls until it is below 5%", first_below(fallen), expected=equals(HISTORY)),
    ]


def first_below(errors: list[float]) -> int:
    """Of the errors, how many come before the first below 5%."""
    return next((call for call, error in enumerate(errors) if error < 0.05), len(errors))


def main(config: Config) -> list[Finding]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    errors, delayed = outliers(config), jumps(config)
    trials = {
        "float32, nothing planted": ("float32", 0, 1.0),
        "one scale, nothing planted": ("current", 0, 1.0),
        "one scale, outlier": ("current", config.outlier, 1.0),
        "blocks, outlier": ("block", config.outlier, 1.0),
        "delayed, larger batch": ("delayed", 0, JUMP),
        "delayed, not saturating": ("delayed, not saturating", 0, 1.0),
    }
    findings = [*of_outliers(errors, config), *of_jumps(delayed)]
    curves: dict[str, list[list[float]]] = {}
    for name, trial in tqdm(trials.items(), unit="trial"):
        curves[name] = [train(*trial, seed, config) for seed in range(config.seeds)]
    end = max(1, config.steps // 10)
    final = {name: [sum(r[-end:]) / end for r in runs] for name, runs in curves.items()}
    for name, values in final.items():
        if name in RECIPES:  # the one that breaks
            lasting = max(sum(map(math.isfinite, losses)) for losses in curves[name])
            claim = f"training, {name}: steps until the loss is NaN, of {config.steps}"
            findings.append(Finding(claim, lasting, expected=at_most(config.steps - 1)))
        else:
            findings.append(Finding(f"training, {name}: loss at the end", **over_seeds(values)))
    draw(errors, delayed, {name: runs[0] for name, runs in curves.items()}, config)
    return findings


if __name__ == "__main__":
    run(
        main,
        Config(),
        quick=replace(Config(), width=256, hidden=32, tokens=64, every=5, steps=8, seeds=1),
    )
