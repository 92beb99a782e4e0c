"""Where are the parameters of a language model, and how many of them does a token use?

Every parameter of four models is counted by family: SmolLM2-135M, GPT-2 and Llama-3.1-70B from the
real Decoder, built without memory for its numbers, and by formula; DeepSeek-V3 by formula, because
its attention (latent) and its feed-forward layers (256 experts, 8 for each token) come later.

Expected: the published figures. Looking up a row of the embedding table costs nothing, so that
DeepSeek counts its head among the active parameters and its table not: 36.6 billion, "37B". Every
other parameter takes part in one multiplication and one addition for each token: 2 N operations.

Paper   DeepSeek-AI 2024, arXiv:2412.19437, section 4.2; Llama Team 2024, arXiv:2407.21783, table 3
Run     uv run python weeks/02_transformers/what_the_parameters_count.py
"""

from collections import Counter
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import torch
from torch.utils.flop_counter import FlopCounterMode

from implementations.lab.findings import Finding, equals, within
from implementations.lab.script import run
from implementations.models.decoder import GPT2, SMOLLM2, Decoder, DecoderConfig

LLAMA_70B = replace(SMOLLM2, vocabulary=128256, width=8192, layers=80, hidden=28672, tied=False)
LLAMA_70B = replace(LLAMA_70B, heads=64, key_value_heads=8)
DECODERS = {"SmolLM2-135M": SMOLLM2, "GPT-2": GPT2, "Llama-3.1-70B": LLAMA_70B}
PUBLISHED = {"SmolLM2-135M": 134_515_008, "GPT-2": 124_439_808, "Llama-3.1-70B": 70_553_706_496}
DEEPSEEK_COUNT = "transformers' DeepseekV3ForCausalLM; the 14,848 balancing biases are buffers"
FAMILIES = ("embedding", "query", "key", "value", "latent", "output")
FAMILIES += ("feed-forward", "experts", "norms", "head")
COLOURS = ("tab:orange", "navy", "royalblue", "cornflowerblue", "lightsteelblue", "steelblue")
COLOURS += ("tab:green", "darkseagreen", "black", "gold")
# The first of these that a parameter's name contains tells its family.
PLACES = {"norm": "norms", "embedding": "embedding", "positions": "embedding", "head": "head"}
PLACES |= {f"attention.{name}": name for name in FAMILIES} | {"feed_forward": "feed-forward"}


@dataclass(frozen=True)
class Config:
    """Count the parameters of four models."""

    length: int = 128
    """tokens of the text whose operations are counted"""


def counted(decoder: Decoder) -> Counter[str]:
    """The parameters of a real model by family."""
    count = Counter()
    for name, parameter in decoder.named_parameters():
        count[next(family for part, family in PLACES.items() if part in name)] += parameter.numel()
    return count


def by_formula(config: DecoderConfig) -> Counter[str]:
    """The same from the sizes alone."""
    width, hidden, bias, layers = config.width, config.hidden, config.bias, config.layers
    key_width = width // config.heads * (config.key_value_heads or config.heads)
    expansions = 2 if config.feed_forward == "swiglu" else 1  # SwiGLU has a gate besides
    feed_forward = expansions * hidden * (width + bias) + width * (hidden + bias)
    learned = config.positions if config.position == "learned" else 0
    return Counter(
        {
            "embedding": (config.vocabulary + learned) * width,
            "query": layers * width * (width + bias),
            "key": layers * key_width * (width + bias),
            "value": layers * key_width * (width + bias),
            "output": layers * width * (width + bias),
            "feed-forward": layers * feed_forward,
            "norms": (2 * layers + 1) * width * (2 if config.norm == "layer" else 1),
            "head": 0 if config.tied else config.vocabulary * width,
        }
    )


def deepseek_v3(experts: int = 256) -> Counter[str]:
    """DeepSeek-V3 with so many routed experts to a layer: 256 exist, a token passes through 8.

    Queries are made from a vector of 1536 numbers, keys and values from one of 512, which is all
    that the cache keeps besides 64 rotated channels that the key heads share.
    """
    width, layers, dense, heads, vocabulary = 7168, 61, 3, 128, 129280
    query_latent, latent, plain, rotated, value = 1536, 512, 128, 64, 128
    sparse, expert = layers - dense, 3 * width * 2048
    return Counter(
        {
            "embedding": vocabulary * width,
            "query": layers * query_latent * (width + heads * (plain + rotated)),
            "key": layers * (latent * heads * plain + width * rotated),
            "value": layers * latent * heads * value,
            "latent": layers * width * latent,
            "output": layers * heads * value * width,
            "feed-forward": dense * 3 * width * 18432 + sparse * expert,  # one expert serves all
            "experts": sparse * (experts * expert + 256 * width),  # the router sees all 256
            "norms": layers * (2 * width + query_latent + latent) + width,
            "head": vocabulary * width,
        }
    )


def operations(decoder: Decoder, length: int) -> float:
    """Operations of the matrix products for each token of a text."""
    tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        decoder(tokens)
    return counter.get_total_flops() / length


def draw(counts: dict[str, Counter[str]]) -> None:
    """One bar for each model: the shares of the families."""
    _, axes = plt.subplots(figsize=(12, 4.2), layout="constrained")
    left = Counter()
    for family, colour in zip(FAMILIES, COLOURS, strict=True):
        share = {model: 100 * count[family] / count.total() for model, count in counts.items()}
        start = [left[model] for model in share]
        bars = axes.barh(list(share), share.values(), left=start, color=colour, label=family)
        labels = [f"{number:.0f}" if number >= 2 else "" for number in share.values()]
        ink = "white" if family in ("query", "key", "output") else "black"
        axes.bar_label(bars, labels, label_type="center", color=ink)
        left.update(share)
    axes.set_yticks(range(len(counts)), [f"{m}\n{c.total():,}" for m, c in counts.items()])
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="share of the parameters, %")
    axes.set_title("Where the parameters are; in the last bar, those that one token uses")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def main(config: Config) -> list[Finding]:
    with torch.device("meta"):  # shapes without numbers: 70 billion parameters take no memory
        models = {name: Decoder(sizes) for name, sizes in DECODERS.items()}
    real = {name: counted(model) for name, model in models.items()}
    total, active = deepseek_v3(), deepseek_v3(experts=8)
    used = active - Counter(embedding=active["embedding"])
    draw({**real, "DeepSeek-V3": total, "DeepSeek-V3, active": used})

    smollm2 = real["SmolLM2-135M"]
    findings = [Finding(f"SmolLM2: {name}", smollm2[name]) for name in FAMILIES if smollm2[name]]
    for name, count in real.items():
        formula, rule = by_formula(DECODERS[name]), equals(PUBLISHED[name])
        apart = sum(abs(count[family] - formula[family]) for family in FAMILIES)
        findings += [
            Finding(f"{name}: all", count.total(), expected=rule, source="published weights"),
            Finding(f"{name}: families and formula differ by", apart, expected=equals(0)),
        ]
    claim, rule = "DeepSeek-V3: all", equals(671_026_404_352)
    findings.append(Finding(claim, total.total(), expected=rule, source=DEEPSEEK_COUNT))
    for claim, count, rule, source in (
        ("DeepSeek-V3: all", total, within(670.5, 671.5), "671B, DeepSeek-AI 2024"),
        ("DeepSeek-V3: active", used, within(36.55, 36.65), "36.6B, README_WEIGHTS.md; 37B"),
        ("DeepSeek-V3: active, were the embedding counted", active, None, ""),
    ):
        findings.append(Finding(claim, count.total() / 1e9, "billion", rule, source=source))
    scores = 4 * config.length * SMOLLM2.width * SMOLLM2.layers  # two products of length · width
    products = operations(models["SmolLM2-135M"], config.length) - scores
    claim = "SmolLM2: operations for a token besides its scores, in units of 2 N"
    source, rule = "all but the norms multiply and add once", within(0.999, 1.0)
    findings.append(Finding(claim, products / (2 * smollm2.total()), expected=rule, source=source))
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config())
