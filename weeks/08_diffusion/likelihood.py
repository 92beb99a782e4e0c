"""How many bits does a digit cost by a diffusion model, which was never asked for a likelihood?

The probability flow of a trained denoiser is a continuous normalizing flow, so it has a density.
Week 09 asks flows for the bits of scikit-learn's digits of 8 x 8 pixels with 17 levels; here the
same test digits are asked of a denoiser that was trained on the squared error of the noise alone,
evenly over log SNR. That error, summed over noise, is a bound on the likelihood. Pixels are
dequantized by uniform noise, as there; K draws tighten the bound. On a GPU the digits of MNIST are
priced as well.

Expected: less than the uniform guess of log2(17) = 4.09 bits a pixel. More draws never cost more,
on average. More steps of the solver do not move the price.

Paper   Song et al. 2020, arXiv:2011.13456; Kingma et al. 2021, arXiv:2107.00630
Run     uv run python weeks/08_diffusion/likelihood.py
"""

import math
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from implementations.flows.bijection import Flow
from implementations.flows.dequantization import Dequantized, bits_per_dimension
from implementations.generative.denoiser import QUIETEST
from implementations.generative.diffusion_config import DiffusionConfig, for_device
from implementations.generative.diffusion_pictures import pictures
from implementations.generative.flow_likelihood import flow_log_likelihood
from implementations.generative.schedules import variance_preserving
from implementations.generative.trained_diffusion import Trained, train_or_load
from implementations.lab.findings import Finding, at_least, at_most
from implementations.lab.script import run

BITS = "bits per dimension"


@dataclass(frozen=True)
class Config:
    """Train a denoiser on dequantized digits, and price the test digits by its flow."""

    device: str = "cpu"
    """cuda prices MNIST-5k too"""
    training: int = 0
    """steps of training; 0 for 1,200 on a CPU and 4,000 on a GPU"""
    solver: int = 40
    """steps of Runge and Kutta's method"""
    probes: int = 2
    """random directions that estimate the divergence"""
    draws: int = 4
    """of the dequantizing noise, for the tighter bound"""
    images: int = 120
    """test digits of each set"""


class FlowOfDenoiser(Flow):
    """The flow of a denoiser as `Dequantized` wants one: a density of pixels between 0 and 1."""

    def __init__(self, trained: Trained, shape: tuple[int, ...], solver: int, probes: int):
        nn.Module.__init__(self)  # there is no bijection and no base, only what they lead to
        self.model, self.shape, self.solver, self.probes = trained.model, shape, solver, probes
        self.start = [n.item() for n in variance_preserving(torch.tensor(QUIETEST).double())]

    @property
    def kind(self) -> dict:
        parameter = next(self.model.parameters())
        return {"device": parameter.device, "dtype": parameter.dtype}

    def denoise(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        numbers = (x.new_full((len(x),), number) for number in (alpha, sigma))
        return self.model(x.unflatten(1, self.shape), *numbers)[1].data.flatten(1)

    def log_prob(self, v: Tensor) -> Tensor:
        """Of v in the unit cube; x = 2 v - 1 is twice as wide."""
        x = (2 * v - 1).flatten(1)
        options = {"highest": 400.0, "steps": self.solver, "probes": self.probes}
        found = flow_log_likelihood(self.denoise, x, tuple(self.start), **options)
        return found + x.shape[1] * math.log(2)


def settings_of(config: Config, data: str) -> DiffusionConfig:
    """Without labels, evenly over log SNR."""
    changes = {"kind": "noise", "schedule": "even", "labelled": False, "dequantized": True}
    changes |= {"data": data, "size": 8 if data == "digits" else 28, "decay": 0.998}
    real = config.device != "cpu"
    if data == "digits" and real:
        changes |= {"widths": (64, 128), "dropout": 0.1}
    changes["steps"] = config.training or (4000 if real else 1200)
    return for_device(config.device, **changes)


@torch.no_grad()
def price(trained: Trained, settings: DiffusionConfig, config: Config, draws: int, solver: int):
    """Bits per dimension of test digits, an upper bound."""
    data = pictures(settings.data, settings.size)
    rows = torch.linspace(0, len(data.test.labels) - 1, config.images).long().unique()
    whole = ((data.test.pixels[rows] + 1) / 2 * (data.levels - 1)).round().long()
    shape = tuple(whole.shape[1:])
    flow = FlowOfDenoiser(trained, shape, solver, config.probes)
    model, device = Dequantized(flow, data.levels), config.device
    torch.manual_seed(0)
    parts = [model.log_prob(part.to(device), draws).cpu() for part in whole.split(250)]
    return bits_per_dimension(torch.cat(parts), whole[0].numel())


def main(config: Config) -> list[Finding]:
    if config.device == "cpu":
        torch.set_num_threads(1)
    findings, costs = [], {}
    for data in ("digits", "mnist_5k") if config.device != "cpu" else ("digits",):
        settings = settings_of(config, data)
        trained = train_or_load(settings, config.device)
        levels = pictures(data, settings.size).levels
        one = price(trained, settings, config, 1, config.solver)
        many = price(trained, settings, config, config.draws, config.solver)
        finer = price(trained, settings, config, 1, 2 * config.solver)
        guess, name = math.log2(levels), data.replace("_", "-")
        costs[f"{name}: uniform guess"] = guess
        costs[f"{name}: one draw"] = one.mean().item()
        costs[f"{name}: {config.draws} draws"] = many.mean().item()
        trained_enough = settings.steps >= 500
        findings += [
            Finding(f"{name}: a uniform guess", guess, BITS),
            Finding(f"{name}: one draw", one.mean().item(), BITS,
                    spread=one.std().item(), seeds=len(one), repeated="digits",
                    expected=at_most(guess) if trained_enough else None),
            Finding(f"{name}: {config.draws} draws", many.mean().item(), BITS),
            Finding(f"{name}: one draw costs more by", (one.mean() - many.mean()).item(), BITS,
                    expected=at_least(0.0), source="Burda et al. 2015, theorem 1"),
            Finding(f"{name}: twice the steps of the solver move the price by",
                    abs((finer.mean() - one.mean()).item()), BITS, goal=at_most(0.01)),
            Finding(f"{name}: updates at the best held-out loss",
                    min(trained.history, key=lambda look: look["held_out"])["step"]),
        ]  # fmt: skip
    _, axes = plt.subplots(figsize=(7, 0.6 + 0.5 * len(costs)), layout="constrained")
    bars = axes.barh(list(costs)[::-1], list(costs.values())[::-1], color="C0")
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.set(xlabel=f"{BITS} of the test digits, at most", xlim=(0, 1.15 * max(costs.values())))
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(training=6, solver=3, probes=1, draws=2, images=10))
