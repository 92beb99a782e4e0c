"""Which question is hard at which noise: the data, the noise, or v?

Three networks of one shape answer three questions on the same noisy digits, and are asked for
their errors at twelve levels of noise; the table of diffusion.py turns each error into the others.

Expected: to tell the noise is hard where there is little of it, to tell the data where there is
little of them; v is about equally hard everywhere. Put into one currency, a network that answers
"noise" makes a worse guess of the data in much noise, where its error is divided by alpha.

Paper   Salimans & Ho 2022, arXiv:2202.00512; Karras et al. 2022, arXiv:2206.00364, section 5
Run     uv run python weeks/08_diffusion/parameterisations.py
"""

from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from implementations.generative.denoiser import training_loss
from implementations.generative.diffusion_config import DiffusionConfig, for_device
from implementations.generative.diffusion_pictures import pictures
from implementations.generative.trained_diffusion import Trained, train_or_load
from implementations.lab.findings import Finding, at_least
from implementations.lab.script import run

KINDS = ("data", "noise", "v")


@dataclass(frozen=True)
class Config:
    """Train three networks that differ in their question alone."""

    device: str = "cpu"
    """cuda learns MNIST-5k at 28 x 28, cpu the digits of 8 x 8"""
    training: int = 0
    """steps of each network; 0 for 600 on a CPU and 2,000 on a GPU"""
    levels: int = 12
    """of noise at which they are asked"""
    draws: int = 4
    """of the noise for each test picture"""


@torch.no_grad()
def errors(
    trained: Trained, settings: DiffusionConfig, log_snr: float, measured: str, draws: int
) -> float:
    """Mean squared error of one target on the test pictures, at one level of noise."""
    device = next(trained.model.parameters()).device
    test = pictures(settings.data, settings.size).test
    pixels, labels = test.pixels.to(device), test.labels.to(device)
    generator, found = torch.Generator(device).manual_seed(0), []
    for _ in range(draws):
        noise = torch.randn(pixels.shape, generator=generator, device=device)
        level = torch.full((len(labels),), log_snr, device=device)
        found.append(training_loss(trained.model, pixels, noise, level, labels, measured))
    return torch.cat(found).mean().item()


def settings_of(config: Config) -> DiffusionConfig:
    """The shape that all three share."""
    real = config.device != "cpu"
    changes = {"steps": config.training or (2000 if real else 600)}
    if not real:
        changes |= {"data": "digits", "size": 8}
    return for_device(config.device, **changes)


def main(config: Config) -> list[Finding]:
    if config.device == "cpu":
        torch.set_num_threads(1)
    settings = settings_of(config)
    levels = torch.linspace(9, -9, config.levels).tolist()
    own, as_data, findings = {}, {}, []
    for kind in KINDS:
        trained = train_or_load(replace(settings, kind=kind), config.device)
        ask = (trained, settings)
        own[kind] = [errors(*ask, level, kind, config.draws) for level in levels]
        as_data[kind] = [errors(*ask, level, "data", config.draws) for level in levels]
    for kind in KINDS:
        low, high = min(own[kind]), max(own[kind])
        findings += [
            Finding(f"{kind}: error of its own target, little noise", own[kind][0]),
            Finding(f"{kind}: the same, much noise", own[kind][-1]),
            Finding(f"{kind}: hardest over easiest level", high / low, "x"),
            Finding(f"{kind}: error of the data, little noise", as_data[kind][0]),
            Finding(f"{kind}: error of the data, half and half", middle(as_data[kind])),
            Finding(f"{kind}: error of the data, much noise", as_data[kind][-1]),
        ]
    even = max(own["v"]) / min(own["v"])
    others = min(max(own[kind]) / min(own[kind]) for kind in ("data", "noise"))
    findings += [
        Finding("v is more even than the more even of the others by", others / even, "x",
                goal=at_least(1.0)),
        Finding("in much noise, the error of the data by 'noise' is, over that by 'data'",
                as_data["noise"][-1] / as_data["data"][-1], "x", goal=at_least(1.0)),
        Finding("in little noise, the error of the data by 'data' is, over that by 'noise'",
                as_data["data"][0] / as_data["noise"][0], "x", goal=at_least(1.0)),
    ]  # fmt: skip
    draw(torch.tensor(levels), own, as_data)
    return findings


def middle(values: list[float]) -> float:
    return values[len(values) // 2]


def draw(levels: Tensor, own: dict[str, list[float]], as_data: dict[str, list[float]]) -> None:
    _, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, rows, title in zip(
        axes, (own, as_data), ("of its own target", "of the data"), strict=True
    ):
        for kind, values in rows.items():
            axis.semilogy(levels, values, "o-", label=f"answers {kind}")
        axis.set(xlabel="log SNR: noise on the left", title=f"mean squared error {title}")
    axes[0].legend()


if __name__ == "__main__":
    run(main, Config(), quick=Config(training=6, levels=3, draws=1))
