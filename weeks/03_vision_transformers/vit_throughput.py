"""How fast does a readable vision transformer train?

A training step (forward, backward, fused AdamW; bfloat16 autocast) on random pictures, in turn with
transformers' ViT of the same sizes, attention being the kernel that torch chooses for either. On a
GPU at the shape of ViT-S/16, 224 x 224 pixels, both through torch.compile. On a CPU at a small
shape and not compiled, which says little about a GPU.

Expected: nothing; as fast as transformers' is the goal.

Run     uv run python weeks/03_vision_transformers/vit_throughput.py --device cuda --batch 512
"""

from dataclasses import dataclass

import torch
from transformers import ViTForImageClassification

from implementations.attention.vendor import attention_sdpa
from implementations.lab.findings import Finding, at_least, equals
from implementations.lab.script import run
from implementations.lab.timing import time_interleaved
from implementations.models.vision_transformer import VisionTransformer, ViTConfig
from implementations.models.vit_in_transformers import vit_config
from implementations.training.throughput import training_step

SMALL = {"image": 64, "patch": 8, "width": 128, "layers": 4, "heads": 4, "hidden": 512}
VIT_S = {"image": 224, "patch": 16, "width": 384, "layers": 12, "heads": 6, "hidden": 1536}


@dataclass(frozen=True)
class Config:
    """A training step of ours against one of transformers', in turns."""

    device: str = "cpu"
    """cuda measures ViT-S/16, compiled; cpu a small shape, as it stands"""
    batch: int = 16
    """pictures in a step: 512 fills an H200"""
    rounds: int = 15
    """timed rounds"""


def main(config: Config) -> list[Finding]:
    torch.manual_seed(0)
    shape = ViTConfig(**(SMALL if config.device == "cpu" else VIT_S), classes=1000)
    theirs = ViTForImageClassification(vit_config(shape, attn_implementation="sdpa"))
    theirs = theirs.to(config.device)
    ours = VisionTransformer(shape, attention_sdpa).to(config.device)
    pixels = torch.randn(config.batch, 3, shape.image, shape.image, device=config.device)
    labels = torch.randint(1, 1000, (config.batch,), device=config.device)
    parameters = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    how = {"device": config.device, "compiled": config.device != "cpu"}
    steps = {
        "ours": training_step(ours, ours.parameters(), **how),
        "transformers": training_step(lambda x: theirs(x).logits, theirs.parameters(), **how),
    }
    timings = time_interleaved(steps, pixels, labels, rounds=config.rounds)
    what = "a small ViT" if config.device == "cpu" else "ViT-S/16, compiled"
    findings = [
        Finding("parameters of the model", parameters[0]),
        Finding(
            "transformers' has as many, but for", parameters[1] - parameters[0], expected=equals(0)
        ),
        Finding(
            f"{what}: our training step, times transformers' speed",
            timings.ratio("ours", "transformers"),
            "x",
            goal=at_least(1.0),
            spread=timings.spread("ours", "transformers"),
        ),
    ]
    for name in steps:
        speed = config.batch / timings.median(name)
        findings.append(Finding(f"{name}: training throughput", speed, "images/s"))
    return findings


if __name__ == "__main__":
    run(main, Config(), quick=Config(batch=2, rounds=2))
