"""Why does a transformer normalise, and why before each part and no longer after the sum?

Stacks of blocks alike in everything but their norm: none, none with GPT-2's smaller start,
LayerNorm after the sum as in 2017, LayerNorm or RMSNorm before each part as in GPT-2 and Llama.
First the gradient of every block at the start, then the same few hundred steps on the same windows
of the World English Bible, at one learning rate that is full from the first step; post-norm also
with a warm-up.

Expected: without norms the stream grows with every block, and the gradient with it. After the sum,
the norm keeps the last block's gradient as large in a deep stack as in a shallow one, and before
each part it shrinks with 1 / sqrt(depth), so that the first steps can be long. That is theory for
the start; the learning curves are measured. A start that knows how deep the stack is may do at this
size what a norm does. A model that stalls at the entropy of single characters, 3.04 nats, has
learnt how frequent they are and nothing else.

Paper   Xiong et al. 2020, arXiv:2002.04745, theorem 1
Run     uv run python weeks/02_transformers/why_normalization.py
"""

import math
from dataclasses import dataclass
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from implementations.attention.multi_head import MultiHeadAttention
from implementations.attention.positions import rotate_half_split
from implementations.lab.findings import Finding, at_least, within
from implementations.lab.script import run
from implementations.layers.block import Block
from implementations.layers.feed_forward import FeedForward
from implementations.layers.layer_norm import LayerNorm
from implementations.layers.rms_norm import RMSNorm
from implementations.sources.text import bible_characters

LENGTH, BATCH = 32, 8
SCALED = "no norm, scaled start"
NORMS = {  # the norm, and whether it stands before each part
    "no norm": (nn.Identity, True),
    SCALED: (nn.Identity, True),
    "post-norm": (LayerNorm, False),
    "pre-norm": (LayerNorm, True),
    "pre-RMSNorm": (RMSNorm, True),
}
WARMED = "post-norm, warm-up"
RUNS = {name: name for name in NORMS} | {WARMED: "post-norm"}
COLOURS = dict(zip(RUNS, ("gray", "C4", "C3", "C0", "C2", "C1"), strict=True))


@dataclass(frozen=True)
class Config:
    """Train deep stacks of blocks that differ in their norms only."""

    layers: int = 12
    """blocks of a trained model; gradients are also compared at 1/4, 1/2 and twice as many"""
    width: int = 64
    """size of a character's vector"""
    steps: int = 500
    """training steps of each model"""
    warm_up: int = 250
    """steps in which the learning rate rises, for the one model that has a warm-up"""
    learning_rate: float = 1e-3
    seeds: int = 2
    """how often each model is trained"""


class Stack(nn.Module):
    """A causal reader of characters, with Xavier's weights as in the paper's theorem."""

    def __init__(self, name: str, characters: int, layers: int, width: int):
        super().__init__()
        norm, first = NORMS[name]
        self.embedding = nn.Embedding(characters, width)
        self.head = nn.Linear(width, characters)
        self.blocks = nn.ModuleList(
            Block(
                MultiHeadAttention(width, 4, rotate=rotate_half_split),
                FeedForward(width, 4 * width, torch.relu),
                lambda: norm(width),
                norm_first=first,
            )
            for _ in range(layers)
        )
        self.norm = norm(width) if first else nn.Identity()  # post-norm has normalised already
        for linear in (module for module in self.modules() if isinstance(module, nn.Linear)):
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
        if name == SCALED:  # GPT-2's: what enters the stream is smaller by sqrt(2 · layers)
            for block in self.blocks:
                for linear in (block.attention.output, block.feed_forward.contract):
                    linear.weight.data /= math.sqrt(2 * layers)

    def forward(self, tokens: Int[Tensor, "batch token"]) -> Float[Tensor, "batch token next"]:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, causal=True)
        return self.head(self.norm(x))


def windows(text: Int[Tensor, " character"]) -> Int[Tensor, "batch token"]:
    """Random windows, with one character more than the model reads."""
    return text[torch.randint(len(text) - LENGTH, (BATCH, 1)) + torch.arange(LENGTH + 1)]


def loss_of(model: Stack, rows: Int[Tensor, "batch token"]) -> Float[Tensor, ""]:
    """Mean loss of every character after the first, in nats."""
    return cross_entropy(model(rows[:, :-1]).mT, rows[:, 1:])


def gradients(name: str, layers: int, width: int, text: Tensor) -> Float[np.ndarray, "seed block"]:
    """The gradient's norm in the last matrix of every block, before the first step."""
    norms = []
    for seed in range(4):
        torch.manual_seed(seed)
        model = Stack(name, int(text.max()) + 1, layers, width)
        loss_of(model, windows(text)).backward()
        norms.append(
            [block.feed_forward.contract.weight.grad.norm().item() for block in model.blocks]
        )
    return np.array(norms)


def train(name: str, text: Tensor, config: Config, seed: int, bar: tqdm) -> list[float]:
    """The losses of one model's training."""
    torch.manual_seed(seed)
    model = Stack(RUNS[name], int(text.max()) + 1, config.layers, config.width)
    torch.manual_seed(seed)  # all models see the same windows
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    rising = config.warm_up if name == WARMED else 1
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / rising))
    losses = []
    for _ in range(config.steps):
        loss = loss_of(model, windows(text))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(model=name, loss=f"{losses[-1]:.2f}", refresh=False)
        bar.update()
    return losses


def draw(start: dict[str, np.ndarray], curves: dict[str, np.ndarray], letters: float) -> None:
    """Gradients by block, and smoothed learning curves, a line for each seed."""
    _, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    for name, norms in start.items():
        blocks = range(1, norms.shape[1] + 1)
        style = "o--" if name == "pre-RMSNorm" else "o-"
        left.semilogy(blocks, norms.mean(0), style, color=COLOURS[name], label=name)
    left.set(xlabel="block", ylabel="norm of the gradient", title="Gradients before the first step")
    for name, losses in curves.items():
        window = losses.shape[1] // 20 + 1
        smooth = np.array([np.convolve(x, np.ones(window) / window, "valid") for x in losses])
        style = "--" if name == "pre-RMSNorm" else "-"  # it runs along over pre-norm
        right.plot(range(window, losses.shape[1] + 1), smooth.T, style, color=COLOURS[name])
        right.lines[-1].set_label(name)
    right.axhline(letters, color="black", linestyle=":", label="entropy of single characters")
    right.set(xlabel="step", ylabel="loss per character, nats", ylim=(1.75, 4.5))
    right.set_title("Learning at one rate; no norm is above the picture")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()


def at_the_start(norms: dict[tuple[str, int], np.ndarray], depths: list[int]) -> list[Finding]:
    """How gradients change through a stack, and in its last block with the depth of the stack."""
    rules = {"post-norm": (within(-0.25, 0.25), "0"), "pre-norm": (within(-0.7, -0.3), "-1/2")}
    findings = []
    for name in NORMS:
        last = [norms[name, depth][:, -1].mean().item() for depth in depths]
        rule, theory = rules.get(name, (None, ""))
        source = f"{theory}: Xiong et al. 2020, theorem 1" if rule else ""
        if name in ("no norm", SCALED):
            claim = f"{name}: last block's gradient, {depths[-1]} blocks over {depths[0]}"
            findings.append(Finding(claim, last[-1] / last[0], "x"))
        else:
            claim = f"{name}: last block's gradient changes with depth to the power"
            power, _ = np.polyfit(np.log(depths), np.log(last), 1)
            findings.append(Finding(claim, float(power), expected=rule, source=source))
        trained = norms[name, depths[2]]
        ratio = trained[:, -1] / trained[:, 0]
        claim = f"{name}: gradient of the last block over the first's, {depths[2]} blocks"
        noise = {"spread": ratio.std(ddof=1).item(), "seeds": len(ratio)}
        findings.append(Finding(claim, ratio.mean().item(), **noise))
    return findings


def main(config: Config) -> list[Finding]:
    if config.layers < 4:
        raise ValueError(
            f"a quarter of the blocks must be one at least, got {config.layers} blocks"
        )
    # Matrices this small gain nothing from a second thread, and lose when it has to wait.
    torch.set_num_threads(1)
    text, _ = bible_characters("web")
    depths = [config.layers * quarters // 4 for quarters in (1, 2, 4, 8)]
    norms = {(n, d): gradients(n, d, config.width, text) for n, d in product(NORMS, depths)}
    findings = at_the_start(norms, depths)

    curves = {name: np.zeros((config.seeds, config.steps)) for name in RUNS}
    with tqdm(total=len(RUNS) * config.seeds * config.steps, unit="step") as bar:
        for name, seed in product(RUNS, range(config.seeds)):
            curves[name][seed] = train(name, text, config, seed, bar)
    share = text.bincount().double() / len(text)
    letters = torch.special.entr(share).sum().item()
    draw({name: norms[name, config.layers] for name in NORMS}, curves, letters)

    findings.append(Finding("entropy of single characters", letters, "nats"))
    final = {name: losses[:, -config.steps // 10 :].mean(1) for name, losses in curves.items()}
    for name, loss in final.items():
        several = len(loss) > 1
        noise = {"spread": loss.std(ddof=1).item(), "seeds": len(loss)} if several else {}
        findings.append(Finding(f"{name}: loss at the end", loss.mean().item(), "nats", **noise))
    repaired = (final["post-norm"] - final[WARMED]).mean().item()
    claim, source = "warm-up lowers post-norm's loss by", "Xiong et al. 2020, figure 2"
    findings.append(Finding(claim, repaired, "nats", goal=at_least(0.1), source=source))
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(layers=8, width=32, steps=12, warm_up=6, seeds=1))
