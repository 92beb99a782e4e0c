"""A vision transformer's sizes in transformers' words: the peer of tests and of speed records.

Run     uv run python implementations/models/vit_in_transformers.py
"""

from typing import Any

import torch
from transformers import ViTConfig as TheirConfig
from transformers import ViTForImageClassification

from implementations.models.vision_transformer import VisionTransformer, ViTConfig


def vit_config(config: ViTConfig, **more: Any) -> TheirConfig:
    """The same sizes.

    Args:
        more: settings of theirs, which come before these.

    Raises:
        ValueError: the style is one that transformers does not have.
    """
    given = (config.position, config.pooling, config.registers)
    if given != ("learned", "class", 0):
        style = ", ".join(map(str, given))
        raise ValueError(f"transformers' ViT is learned, class, 0 registers, this one {style}")
    same = {
        "image_size": config.image,
        "patch_size": config.patch,
        "num_channels": config.channels,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "layer_norm_eps": config.epsilon,
        "num_labels": config.classes,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
    }
    return TheirConfig(**same | more)


def main() -> None:
    config = ViTConfig(224, 16, width=384, layers=12, heads=6, hidden=1536, classes=1000)
    with torch.device("meta"):
        models = VisionTransformer(config), ViTForImageClassification(vit_config(config))
    ours, theirs = (sum(p.numel() for p in model.parameters()) for model in models)
    print(f"ViT-S/16: {ours:,} parameters here, {theirs:,} in transformers")


if __name__ == "__main__":
    main()
