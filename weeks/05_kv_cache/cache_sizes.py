"""How many bytes does a token leave behind?

    multi-head, grouped, one head      2 · layers · key heads · dim numbers a token
    latent (MLA)                       layers · (latent + rotary dim)

The cache of a real configuration is made, on a device without memory, and its bytes are added up;
papers say what should come out. DeepSeek-V2 reports a cache 93.3% smaller than that of DeepSeek
67B. Its latent attention alone saves less, because 67B shares its key heads already; the rest comes
from storing 6 bits a number instead of 16.

Expected: the published numbers, exactly where they are exact.

Run     uv run python weeks/05_kv_cache/cache_sizes.py
"""

from dataclasses import dataclass
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch

from implementations.lab.findings import Finding, equals, within
from implementations.lab.script import run
from implementations.models.decoder import SMOLLM2, Decoder
from implementations.serving.kv_cache import KeyValueCache, LayerCache

V2 = "DeepSeek-AI 2024, arXiv:2405.04434"


class Shape(NamedTuple):
    """What of a model's shape its cache depends on."""

    kind: str
    layers: int
    key_heads: int
    dim: int
    value_dim: int | None = None
    """as `dim` unless given; latent attention keeps its latent as the value of one head"""

    def cache(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> KeyValueCache:
        """The cache of one text, which holds no numbers."""
        dims = self.dim, self.value_dim or self.dim
        return KeyValueCache(
            [
                LayerCache(
                    *(
                        torch.empty(1, self.key_heads, tokens, dim, dtype=dtype, device="meta")
                        for dim in dims
                    )
                )
                for _ in range(self.layers)
            ]
        )

    def numbers(self) -> int:
        """Numbers kept for one token."""
        layers = self.cache(1).layers
        return sum(layer.key.numel() + layer.value.numel() for layer in layers)

    def bytes(self, tokens: int = 1) -> int:
        layers = self.cache(tokens).layers
        return sum(layer.key.nbytes + layer.value.nbytes for layer in layers)


MODELS = {
    "GPT-3 175B": Shape("multi-head", 96, 96, 128),
    "OPT 13B": Shape("multi-head", 40, 40, 128),
    "Llama 2 7B": Shape("multi-head", 32, 32, 128),
    "Llama 3 70B": Shape("grouped", 80, 8, 128),
    "DeepSeek 67B": Shape("grouped", 95, 8, 128),
    "Llama 3 8B": Shape("grouped", 32, 8, 128),
    "SmolLM2 135M": Shape("grouped", 30, 3, 64),
    "PaLM 540B": Shape("one key head", 118, 1, 256),
    "Falcon 7B": Shape("one key head", 32, 1, 64),
    "DeepSeek-V2 236B": Shape("latent", 60, 1, 64, 512),
    "DeepSeek-V3 671B": Shape("latent", 61, 1, 64, 512),
}
# Models of one size with either attention, from appendix D of DeepSeek-V2: numbers a token.
PAIRS = {
    "small": (Shape("multi-head", 27, 16, 128), 110.6e3, Shape("latent", 27, 1, 64, 512), 15.6e3),
    "large": (Shape("multi-head", 60, 56, 128), 860.2e3, Shape("latent", 60, 1, 64, 512), 34.6e3),
}
COLORS = {"multi-head": "C0", "grouped": "C1", "one key head": "C2", "latent": "C3"}


@dataclass(frozen=True)
class Config:
    """Bytes a token and texts in a memory, of real models."""

    memory: float = 80.0
    """GB that hold nothing but caches"""
    text: int = 8192
    """tokens of a text"""


def draw(config: Config) -> None:
    """Bytes a token of every model, smallest last, and how many texts fit."""
    names = sorted(MODELS, key=lambda name: -MODELS[name].bytes())
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for place, name in enumerate(names):
        shape = MODELS[name]
        axes.barh(place, shape.bytes() / 1024, color=COLORS[shape.kind])
        texts = int(config.memory * 1e9 // shape.bytes(config.text))
        axes.text(shape.bytes() / 1024 * 1.08, place, f"{texts:,} texts", va="center")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(right=3e4)
    title = f"and how many texts of {config.text:,} tokens fit into {config.memory:.0f} GB"
    axes.set(xlabel="KiB a token in 16 bits", title=title)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
    figure.legend(handles, list(COLORS), loc="outside lower center", ncols=4, frameon=False)


def main(config: Config) -> list[Finding]:
    draw(config)
    findings = [
        Finding(f"{name}, {shape.kind}", shape.bytes() / 1024, "KiB a token")
        for name, shape in MODELS.items()
    ]
    old, new = MODELS["DeepSeek 67B"], MODELS["DeepSeek-V2 236B"]
    fewer = 1 - new.numbers() / old.numbers()
    smaller = 1 - new.numbers() * 6 / (old.numbers() * 16)
    with torch.device("meta"):
        layers = Decoder(SMOLLM2).empty_cache(1, 1).layers
    ours = sum(layer.key.numel() + layer.value.numel() for layer in layers)
    findings += [
        Finding(
            "OPT 13B: a token takes, as PagedAttention's authors say",
            MODELS["OPT 13B"].bytes() / 1024,
            "KiB",
            expected=equals(800.0),
            source="Kwon et al. 2023, arXiv:2309.06180, section 3",
        ),
        Finding(
            "Llama 2 7B: a token takes",
            MODELS["Llama 2 7B"].bytes() / 1024,
            "KiB",
            expected=equals(512.0),
            source="2 · 32 layers · 32 heads · 128 · 2 bytes",
        ),
        Finding(
            "SmolLM2: numbers of our decoder's own cache, over the shape's",
            ours / MODELS["SmolLM2 135M"].numbers(),
            expected=equals(1.0),
        ),
    ]
    for size, (heads, published_heads, latent, published_latent) in PAIRS.items():
        for shape, published in ((heads, published_heads), (latent, published_latent)):
            findings.append(
                Finding(
                    f"{size} model of DeepSeek's comparison, {shape.kind}: over the published",
                    shape.numbers() / published,
                    expected=within(0.995, 1.005),
                    source=f"{V2}, appendix D",
                )
            )
    return [
        *findings,
        Finding("DeepSeek-V2 keeps fewer numbers than 67B, by", fewer),
        Finding(
            "and fewer bytes, with 6 bits a number against 16, by",
            smaller,
            expected=within(0.9325, 0.9335),
            source=f"{V2}, abstract and section 3.2.3",
        ),
        Finding(
            "DeepSeek-V2's latent, in key heads of dim 128 shared by all",
            new.numbers() / (2 * new.layers * 128),
            "heads",
            expected=equals(2.25),
            source=f"{V2}, section 2.1.4",
        ),
    ]


if __name__ == "__main__":
    run(main, Config(), quick=Config())
