"""Is a gated feed-forward layer better than a plain one with as many parameters?

Small decoders, alike in everything but the feed-forward layer, learn the characters of the World
English Bible. SwiGLU has three matrices where ReLU and GELU have two, so it gets two thirds of
their hidden width. With one seed all three see the same windows, and ReLU and GELU start from the
same weights: the noise that they share cancels in their difference.

Expected: nothing for models this small, trained this briefly. Shazeer found 1.944 nats for SwiGLU,
1.983 for GELU and 1.997 for ReLU, each a half to one hundredth, in a model a thousand times larger
after 65,536 steps; that SwiGLU comes first here too is the goal. Two things are common to all and
could favour one: the learning rate, and the start. Weights start with variance 1 / inputs, because
GPT-2's deviation of 0.02 is made for wide layers: in these narrow ones it makes what a gate
multiplies tiny. How much that choice decides: `--start gpt2`.

Paper   Shazeer 2020, arXiv:2002.05202, table 1
Run     uv run python weeks/02_transformers/swiglu_or_relu.py
"""

from dataclasses import dataclass
from itertools import product
from typing import Literal

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from implementations.lab.findings import Finding, at_least, equals
from implementations.lab.script import run
from implementations.models.decoder import Decoder, DecoderConfig
from implementations.sources.text import bible_characters

LENGTH, BATCH, TESTED = 64, 16, 512  # a window's characters; windows of a step and of the test
KINDS = ("ReLU", "GELU", "SwiGLU")


@dataclass(frozen=True)
class Config:
    """Train three decoders that differ in their feed-forward layers only."""

    width: int = 96
    """size of a character's vector; a multiple of 24, so that the parameters match exactly"""
    layers: int = 2
    steps: int = 400
    """training steps of each model"""
    learning_rate: float = 3e-3
    """at the first step; it falls to zero on a line"""
    start: Literal["unit", "gpt2"] = "unit"
    """variance 1 / inputs, or a deviation of 0.02"""
    seeds: int = 5
    """how often each model is trained"""


def make(kind: str, characters: int, config: Config) -> Decoder:
    """A decoder with 8 · width² parameters in each feed-forward layer."""
    sizes = {"vocabulary": characters, "width": config.width, "layers": config.layers}
    hidden = 4 * config.width * (2 if kind == "SwiGLU" else 3) // 3
    form = "swiglu" if kind == "SwiGLU" else "gelu"
    decoder = Decoder(
        DecoderConfig(**sizes, heads=4, hidden=hidden, positions=LENGTH, feed_forward=form)
    )
    if config.start == "unit":
        for linear in (module for module in decoder.modules() if isinstance(module, nn.Linear)):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    if kind == "ReLU":
        for block in decoder.blocks:
            block.feed_forward.activation = torch.relu
    return decoder


def train(decoder: Decoder, text: Int[Tensor, " character"], config: Config, bar: tqdm) -> None:
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=config.learning_rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, config.steps)
    for _ in range(config.steps):
        rows = text[torch.randint(len(text) - LENGTH, (BATCH, 1)) + torch.arange(LENGTH + 1)]
        loss = cross_entropy(decoder(rows[:, :-1]).mT, rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
        bar.update()


@torch.no_grad()
def test(decoder: Decoder, text: Int[Tensor, " character"]) -> float:
    """Mean loss in nats over a text that training has not seen, cut into windows."""
    rows = text.unfold(0, LENGTH + 1, LENGTH)
    return cross_entropy(decoder(rows[:, :-1]).mT, rows[:, 1:]).item()


def standard_error(values: Float[Tensor, " seed"]) -> float:
    return (values.std() / len(values) ** 0.5).item()


def draw(losses: dict[str, Float[Tensor, " seed"]], parameters: int) -> None:
    """Every seed's losses, and every seed's differences from SwiGLU."""
    _, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    left.plot(KINDS, torch.stack([losses[kind] for kind in KINDS]), "o-", color="C0", alpha=0.35)
    left.set(ylabel="loss on unseen text, nats per character")
    left.set_title(f"{parameters:,} parameters each; a line for each seed")
    for place, kind in enumerate(KINDS[:2]):
        gains = losses[kind] - losses["SwiGLU"]
        right.plot([place] * len(gains), gains, "o", color="C0", alpha=0.35)
        right.errorbar(
            place + 0.1, gains.mean(), standard_error(gains), fmt="s", color="C3", capsize=5
        )
    right.axhline(0, color="black", linestyle=":")
    right.set_xticks((0, 1), [f"{kind} − SwiGLU" for kind in KINDS[:2]])
    right.set(xlim=(-0.5, 1.5), ylabel="difference of losses, nats")
    right.set_title("Above zero SwiGLU is better (mean ± standard error)")
    for axes in (left, right):
        axes.grid(alpha=0.3)


def main(config: Config) -> list[Finding]:
    if config.width % 24 or config.seeds < 2:
        raise ValueError(
            f"a multiple of 24 and two seeds at least, got {config.width} and {config.seeds}"
        )
    # Matrices this small gain nothing from a second thread, and lose when it has to wait.
    torch.set_num_threads(1)
    text, alphabet = bible_characters("web")
    end = TESTED * LENGTH + 1
    losses, parameters = {kind: torch.zeros(config.seeds) for kind in KINDS}, {}
    with tqdm(total=len(KINDS) * config.seeds * config.steps, unit="step") as bar:
        for seed, kind in product(range(config.seeds), KINDS):
            torch.manual_seed(seed)
            decoder = make(kind, len(alphabet), config)
            parameters[kind] = sum(parameter.numel() for parameter in decoder.parameters())
            torch.manual_seed(seed)  # the same windows, however many weights were drawn
            bar.set_description(f"{kind}, seed {seed}")
            train(decoder, text[:-end], config, bar)
            losses[kind][seed] = test(decoder, text[-end:])
    draw(losses, parameters["ReLU"])

    apart = max(parameters.values()) - min(parameters.values())
    findings = [Finding("numbers of parameters differ by", apart, expected=equals(0))]
    repeats, source = {"seeds": config.seeds}, "Shazeer 2020, table 1"
    for kind, loss in losses.items():
        mean, noise = loss.mean().item(), loss.std().item()
        findings.append(Finding(f"{kind}: loss", mean, "nats", spread=noise, **repeats))
    for kind in KINDS[:2]:
        gains = losses[kind] - losses["SwiGLU"]
        mean, error, claim = gains.mean().item(), standard_error(gains), f"{kind} − SwiGLU"
        repeats |= {"spread": gains.std().item(), "goal": at_least(0.0), "source": source}
        findings += [
            Finding(f"{claim}, paired by seed", mean, "nats", **repeats),
            Finding(f"{claim}: standard error of that", error, "nats"),
            Finding(f"{claim}: seeds in which SwiGLU is better", (gains > 0).sum().item()),
        ]
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(width=48, layers=1, steps=20, seeds=2))
