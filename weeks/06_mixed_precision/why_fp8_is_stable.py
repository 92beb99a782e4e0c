"""Why does a model learn in eight bits, and what must be there so that it does?

fp8 has so few words that a scale must bring each tensor's numbers to them; and one channel far
larger than the rest takes the scale for itself. Three looks:

1. One channel of x is made larger, its weights smaller by the same factor: the product is the same,
   its words are not. From which factor on are the others lost?
2. All numbers grow at one step, and shrink at another. A delayed scale knows only the steps before.
3. A network trains, and at half time such a channel appears in its hidden layers. Float32 does not
   notice. The gradients are small, as in the mean over a large batch.

Expected: int8 minds a factor of 10, e4m3 only one of 10,000, since its spacing shrinks with the
number; at 2²⁴ a tensor's scale leaves nothing of the other channels, a block's loses 127 of them.
A jump costs a delayed scale one step, a fall the length of its memory. So a network goes on with
blocks and stops with one scale a tensor; without a scale its gradients vanish; and a delayed scale
without a cut at the format's end becomes infinite as soon as a gradient grows.

Paper   Micikevicius et al. 2022, arXiv:2209.05433; DeepSeek-V3, arXiv:2412.19437, 3.3.2
Run     uv run python weeks/06_mixed_precision/why_fp8_is_stable.py
"""

from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from implementations.lab.findings import Finding, at_least, at_most, equals, over_seeds
from implementations.lab.script import run
from implementations.optimizers.adamw import init as adamw_init
from implementations.optimizers.adamw import step as adamw_step
from implementations.precision.fp8 import (
    E4M3,
    Both,
    Delayed,
    Recipe,
    Scaled,
    ScaledProduct,
    amax_of,
    current,
    dequantize,
    make_recipe,
    product_naive,
    quantize_both,
)
from implementations.sources.images import digits

BATCH = 128
SHARE = 2.0**-10  # of the loss that this batch makes up: the mean is over 131,072 images
NAMES = ("float32", "block", "tensor", "tensor, 2¹⁰", "no scale", "delayed", "delayed, not cut off")


@dataclass(frozen=True)
class Config:
    """Plant an outlier channel."""

    width: int = 512
    """of the products, and of the network's hidden layers: four blocks"""
    steps: int = 100
    seeds: int = 3
    outlier: int = 20
    """power of two: how much larger the channel is that appears in training"""


# 1. A channel that grows


def planted(x: Tensor, weight: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """The same product, with channel 0 of x larger and its weights smaller."""
    factors = torch.ones(x.shape[-1])
    factors[0] = factor
    return x * factors, weight / factors


def int8(x: Tensor) -> Tensor:
    """Rounded to one of 255 words with one scale, and back."""
    scale = 127 / amax_of(x)
    return torch.round(x * scale) / scale


def product_errors(factors: list[float], config: Config) -> dict[str, list[float]]:
    """The relative error of x Wᵀ when the operands were rounded."""
    x, weight = torch.randn(BATCH, config.width), torch.randn(64, config.width)
    exact, errors = x @ weight.T, {"int8, tensor": [], "fp8, tensor": [], "fp8, block": []}
    tensor, block = make_recipe("current"), make_recipe("block")
    for factor in factors:
        operands = planted(x, weight, factor)
        products = [int8(operands[0]) @ int8(operands[1]).T]
        for recipe in (tensor, block):
            left, right = recipe.input(operands[0], E4M3)[0], recipe.weight(operands[1], E4M3)[0]
            products.append(product_naive(left, right, torch.float32))
        for name, product in zip(errors, products, strict=True):
            errors[name].append(((product - exact).norm() / exact.norm()).item())
    return errors


def minds(factors: list[float], errors: list[float]) -> float:
    """The first factor at which the error is twice what it was without an outlier."""
    worse = (f for f, e in zip(factors, errors, strict=True) if e > 2 * errors[0])
    return next(worse, float("inf"))


# 2. Numbers that jump


def jump_errors(sizes: list[float]) -> dict[str, list[float]]:
    """The relative error of each step's tensor, by how it was scaled."""
    delayed, errors = Delayed(), {"current": [], "delayed": []}
    for size in sizes:
        x = size * torch.randn(16, 128)
        for name, scaling in (("current", current), ("delayed", delayed)):
            apart = dequantize(scaling(x, E4M3)[0]) - x
            errors[name].append((apart.norm() / x.norm()).item())
    return errors


# 3. A network


def unscaled(x: Tensor, dtype: torch.dtype) -> Both:
    return quantize_both(x, dtype, torch.ones(()))[:2]


def quantize_without_end(
    x: Tensor, dtype: torch.dtype, scale: Tensor
) -> tuple[Scaled, Scaled, Tensor]:
    """`quantize_both` as a plain cast does it: past e5m2's end is infinity."""
    words = (x * scale).to(dtype)
    return Scaled(words, 1 / scale), Scaled(words.T.contiguous(), 1 / scale), amax_of(x)


def recipe_of(name: str) -> Recipe | None:
    """The recipe of a run; None for float32."""
    if name == "float32":
        return None
    if name == "no scale":
        return Recipe(unscaled, unscaled, unscaled, product_naive)
    kind = name.split(",")[0].replace("tensor", "current")
    cast = quantize_without_end if name.endswith("not cut off") else quantize_both
    return make_recipe(kind, quantize=cast)


def train(name: str, seed: int, config: Config) -> list[float]:
    """The loss of each step on scikit-learn's digits; NaN from the first that is not finite."""
    images = digits()
    x = images.pixels.flatten(1).float()
    x, labels = (x - x.mean()) / x.std(), images.labels.long()
    torch.manual_seed(seed)
    sizes = (x.shape[1], config.width, config.width, 10)
    weights = [nn.Linear(a, b).weight.detach() for a, b in pairwise(sizes)]
    recipes = [recipe_of(name) for _ in weights]
    power = 10 if name.endswith("2¹⁰") else config.outlier
    state, losses = adamw_init(weights), []
    for moment in range(config.steps):
        factor = 2.0**power if moment >= config.steps // 2 else 1.0
        rows = torch.randint(len(x), (BATCH,))
        leaves = [weight.clone().requires_grad_() for weight in weights]
        y = network(x[rows], leaves, recipes, factor)
        loss = nn.functional.cross_entropy(y, labels[rows])
        losses.append(loss.item())
        if not loss.isfinite():
            return losses + [float("nan")] * (config.steps - len(losses))
        gradients = torch.autograd.grad(SHARE * loss, leaves)
        weights, state = adamw_step(weights, gradients, state, learning_rate=1e-3)
    return losses


def network(
    x: Tensor, weights: list[Tensor], recipes: list[Recipe | None], factor: float
) -> Tensor:
    """Hidden layers whose first channel is larger where it is multiplied, and nowhere else."""
    for index, (weight, recipe) in enumerate(zip(weights, recipes, strict=True)):
        if index:
            x, weight = planted(torch.relu(x), weight, factor)
        x = x @ weight.T if recipe is None else ScaledProduct.apply(x, weight, recipe, x.dtype)
    return x


def draw(
    factors: list[float],
    errors: dict[str, list[float]],
    jumps: dict[str, list[float]],
    curves: dict[str, list[list[float]]],
) -> None:
    _, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name, values in errors.items():
        left.loglog(factors, values, label=name)
    left.set(xlabel="how much larger one channel is", ylabel="relative error of the product")
    for name, values in jumps.items():
        middle.semilogy(values, label=name)
    middle.set(xlabel="step", ylabel="relative error of the tensor")
    middle.set_title("all grows 64 times, then falls 2¹⁸ times", fontsize="medium")
    for name, runs in curves.items():
        right.semilogy(torch.tensor(runs).nanmean(0), label=name)
    right.axvline(len(next(iter(curves.values()))[0]) // 2, color="grey", linestyle=":")
    right.set(xlabel="step; the outlier appears at the dotted line", ylabel="loss, nats")
    for axes in (left, middle, right):
        axes.legend(fontsize="small", loc="center right" if axes is right else "best")


def main(config: Config) -> list[Finding]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    factors = [2.0**power for power in range(0, 25)]
    errors = product_errors(factors, config)
    sizes = [1.0] * 8 + [64.0] * 8 + [64 * 2.0**-18] * 24
    jumps = jump_errors(sizes)
    curves = {name: [train(name, seed, config) for seed in range(config.seeds)] for name in NAMES}
    draw(factors, errors, jumps, curves)
    findings = []
    for name, rule in (("int8, tensor", at_most(64)), ("fp8, tensor", at_least(4096))):
        claim = f"{name}: the product's error is doubled by an outlier of"
        findings.append(Finding(claim, minds(factors, errors[name]), "x", expected=rule))
    findings += [
        Finding("fp8, tensor: error without an outlier", errors["fp8, tensor"][0]),
        Finding("fp8, tensor: error at 2²⁴", errors["fp8, tensor"][-1], expected=at_least(0.9)),
        Finding(
            "fp8, block: error at 2²⁴, where one block is lost",
            errors["fp8, block"][-1],
            expected=at_most(1.1 * (128 / config.width) ** 0.5),
        ),
        Finding(
            "delayed: error in the step in which all grows 64 times",
            jumps["delayed"][8],
            expected=at_least(0.5),
        ),
        Finding("delayed: one step later", jumps["delayed"][9], expected=at_most(0.04)),
        Finding(
            "delayed: steps with an error above 10 % after all falls 2¹⁸ times",
            sum(error > 0.1 for error in jumps["delayed"][16:]),
        ),
        Finding(
            "current: largest error of all steps", max(jumps["current"]), expected=at_most(0.04)
        ),
    ]
    final = {n: [fmean(losses[config.steps // 2 :]) for losses in r] for n, r in curves.items()}
    lost = final.pop("delayed, not cut off")
    claim = "delayed, not cut off: every run is NaN in the second half"
    findings.append(Finding(claim, all(value != value for value in lost), expected=equals(True)))
    # Chance is ln 10 = 2.3.
    rules = dict.fromkeys(("tensor", "delayed", "no scale"), at_least(1.5))
    rules |= dict.fromkeys(("float32", "block", "tensor, 2¹⁰"), at_most(1.2))
    for name, values in final.items():
        claim = f"{name}: mean loss of the second half, nats"
        findings.append(Finding(claim, **over_seeds(values), expected=rules[name]))
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(width=256, steps=24, seeds=1))
