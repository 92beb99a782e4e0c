"""What does a temperature do to a model's doubt, and why does the most probable text read so badly?

A temperature divides the logits. The entropy of the next token then grows at the rate Var(logit) /
t³, from none to that of a die with 49,152 faces; the real text is likeliest near the temperature at
which the model doubts as much as it errs.

Beam search finds a more probable text than people write, and that is its fault: people say what is
not quite expected (Holtzman et al. 2020, arXiv:1904.09751). A phrase makes its own repetition
likelier, so the search for probability ends in a loop. Nucleus sampling draws from the same model.

Expected: beam search and greedy decoding are far likelier than the real continuation of a passage
of the Bible and repeat themselves more; nucleus sampling (p = 0.95) is close to the real one.

Run     uv run python weeks/02_transformers/temperature_and_beams.py
        uv run python weeks/02_transformers/temperature_and_beams.py --passages 10 --new 128
        --device cuda
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm import tqdm

from implementations.lab.findings import Finding, at_least, equals, within
from implementations.lab.script import run
from implementations.models.decoder import Decoder
from implementations.sources.text import bible_verses
from implementations.sources.weights import smollm2_tokenizer
from implementations.text.beam_search import beam_search
from implementations.text.sampling import SamplingSettings, generate, temperature

# Ruth, Jonah, Paul's shipwreck, Jeremiah in the pit, the Samaritan, David and Goliath, Daniel among
# lions, the queen of Sheba, Esther, a father's advice: stories, each begun where it begins.
STARTS = (8001001, 32001003, 44027013, 24038006, 42010030, 9017001, 27006016, 11010001, 17001005)
STARTS = (*STARTS, 20005001)
METHODS = ("real", "nucleus", "greedy", "beam")


@dataclass(frozen=True)
class Config:
    """Entropy against temperature, and four continuations of the same passages."""

    passages: int = 3
    """how many of the 10 passages of the World English Bible to continue"""
    prompt: int = 24
    """tokens of each that the model is given"""
    new: int = 64
    """tokens to add"""
    beams: int = 4
    nucleus: float = 0.95
    temperatures: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.6, 2.0, 2.5, 3.0)
    device: str = "cpu"


def read(config: Config) -> Tensor:
    """The passages as tokens [passage, prompt + new]."""
    verses, tokenizer, rows = bible_verses("web"), smollm2_tokenizer(), []
    numbers = list(verses)
    for start in STARTS[: config.passages]:
        first = numbers.index(start)
        text = " ".join(verses[n] for n in numbers[first : first + 12]).replace("`", "'")
        rows.append(tokenizer.encode(text).ids[: config.prompt + config.new])
    return torch.tensor(rows, device=config.device)


def entropy(logits: Tensor) -> Tensor:
    """Of each row's distribution, in nats."""
    return torch.distributions.Categorical(logits=logits, validate_args=False).entropy()


def heat(logits: Tensor, real: Tensor, temperatures: tuple[float, ...]) -> dict[str, list[float]]:
    """Mean entropy of the next token and mean loss of the real one, in bits, by temperature."""
    curves: dict[str, list[float]] = {"entropy": [], "loss": []}
    for t in temperatures:
        log_probability = temperature(logits, t).log_softmax(-1)
        loss = -log_probability.gather(-1, real[:, None])
        curves["entropy"].append(entropy(log_probability).mean().item() / math.log(2))
        curves["loss"].append(loss.mean().item() / math.log(2))
    return curves


def growth(logits: Tensor, step: float = 0.01) -> float:
    """Measured slope of the entropy at t = 1 by what it should be, the variance of the logits."""
    logits = logits.double()
    above, below = (entropy(temperature(logits, 1 + sign * step)) for sign in (1, -1))
    p = logits.softmax(-1)
    variance = (p * logits**2).sum(-1) - (p * logits).sum(-1) ** 2
    return ((above - below).mean() / (2 * step) / variance.mean()).item()


def continuations(model: Decoder, passages: Tensor, config: Config) -> dict[str, Tensor]:
    """Every method's text [passage, prompt + new] for the same prompts."""

    def next_token(tokens: Tensor) -> Tensor:  # without the logits of the places before the last
        progress.update(tokens.numel())
        return model.embedding.logits(model.hidden(tokens)[:, -1:])

    prompts = passages[:, : config.prompt]
    read_once = sum(range(config.prompt, config.prompt + config.new))
    total = (2 + config.beams) * read_once * len(prompts)
    with tqdm(total=total, desc="reading", unit="token", unit_scale=True) as progress:
        streams = [torch.Generator(config.device).manual_seed(i) for i in range(len(prompts))]
        drawn = generate(
            next_token, prompts, config.new, SamplingSettings(top_p=config.nucleus), streams
        )
        chosen = generate(next_token, prompts, config.new)
        sought = beam_search(next_token, prompts, config.beams, config.new).tokens[:, 0]
    return {"real": passages, "nucleus": drawn, "greedy": chosen, "beam": sought}


def log_probabilities(model: Decoder, texts: Tensor, prompt: int) -> Tensor:
    """The model's log probability of every token after the prompt, in nats."""
    logits = model(texts)[:, prompt - 1 : -1]
    return logits.log_softmax(-1).gather(-1, texts[:, prompt:, None])[..., 0]


def repeated(tokens: list[int], length: int = 4) -> float:
    """The share of runs of four tokens that occurred before in the same text."""
    runs = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
    return 1 - len(set(runs)) / len(runs)


def draw(config: Config, curves: dict, likelihood: dict, loops: dict) -> None:
    """Entropy and loss by temperature; log probability as the text goes on; and each passage."""
    _, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for name, label in (("entropy", "entropy: the model's doubt"), ("loss", "loss on the text")):
        left.plot(config.temperatures, curves[name], marker="o", label=label)
    left.axhline(math.log2(49152), color="grey", linestyle=":", label="49,152 equal tokens")
    left.set(title="the next token", xlabel="temperature", ylabel="bits")
    for name in METHODS:
        each = likelihood[name].mean(0)
        so_far = each.cumsum(0) / torch.arange(1, len(each) + 1)
        middle.plot(range(1, len(each) + 1), so_far, label=name)
        right.scatter(likelihood[name].mean(1), loops[name], label=name, s=60, alpha=0.8)
    middle.set(title="mean log probability so far", xlabel="token", ylabel="nats a token")
    right.set(xlabel="mean log probability, nats a token", ylabel="share of repeated 4-grams")
    right.set_title("each passage")
    for axes in (left, middle, right):
        axes.legend()
    left.figure.suptitle("SmolLM2: what a temperature does, and how probable a text should be")


def main(config: Config) -> list[Finding]:
    model = Decoder.from_smollm2().to(config.device).requires_grad_(False)
    tokenizer = smollm2_tokenizer()
    passages = read(config)
    logits = model(passages[:, :-1]).flatten(0, 1)
    curves = heat(logits, passages[:, 1:].flatten(), config.temperatures)
    slope = growth(logits[: config.prompt])

    texts = continuations(model, passages, config)
    likelihood = {
        name: log_probabilities(model, text, config.prompt).cpu() for name, text in texts.items()
    }
    added = {name: text[:, config.prompt :].tolist() for name, text in texts.items()}
    loops = {name: [repeated(tokens) for tokens in rows] for name, rows in added.items()}
    draw(config, curves, likelihood, loops)
    print("prompt:", tokenizer.decode(passages[0, : config.prompt].tolist()))
    for name in METHODS:
        print(f"{name:8}", tokenizer.decode(added[name][0]).replace("\n", " "))

    mean = {name: values.mean().item() for name, values in likelihood.items()}
    share = {name: sum(values) / len(values) for name, values in loops.items()}
    start, end = (
        part.mean().item() for part in likelihood["greedy"].tensor_split((config.new // 2,), 1)
    )
    at_one = config.temperatures.index(1.0)
    rising = all(a < b for a, b in pairwise(curves["entropy"]))
    best = config.temperatures[min(range(len(curves["loss"])), key=curves["loss"].__getitem__)]
    paper = "Holtzman et al. 2020, arXiv:1904.09751"
    return [
        Finding("entropy grows with the temperature", rising, expected=equals(True)),
        Finding(
            "its slope at temperature 1, by the variance of the logits",
            slope,
            expected=within(0.999, 1.001),
            source="dH/dt = Var(logit) / t³",
        ),
        Finding("doubt at temperature 1", curves["entropy"][at_one], "bits a token"),
        Finding("loss on the real text at temperature 1", curves["loss"][at_one], "bits a token"),
        Finding("the real text is likeliest at temperature", best, expected=within(0.7, 1.6)),
        *(Finding(f"log probability, {name}", mean[name], "nats a token") for name in METHODS),
        Finding(
            "a beam's text is likelier than the real one by",
            mean["beam"] - mean["real"],
            "nats a token",
            expected=at_least(0.25),
            source=paper,
        ),
        Finding(
            "and than the greedy one by",
            mean["beam"] - mean["greedy"],
            "nats a token",
            goal=at_least(0),
        ),
        *(Finding(f"repeated 4-grams, {name}", share[name]) for name in METHODS),
        Finding(
            "repeated 4-grams of greedy decoding beyond the real text's",
            share["greedy"] - share["real"],
            expected=at_least(0.0),
            source=paper,
        ),
        Finding("greedy text is likelier in its second half by", end - start, "nats a token"),
    ]


if __name__ == "__main__":
    run(main, Config(), quick=Config(passages=1, prompt=12, new=6))
