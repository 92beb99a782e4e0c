"""One model, two vocabularies: our parameter names and those of published checkpoints.

A table maps our prefix to theirs, `{layer}` standing for a block's number; weight and bias keep
their names. A parameter that is neither stands with its whole name:

    {"blocks.{layer}.attention.query": "encoder.layer.{layer}.attention.self.query"}
    {"class_token": "embeddings.cls_token"}

Run     uv run python implementations/models/parameter_names.py
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor


def published_name(ours: str, table: Mapping[str, str]) -> str:
    """The published name of one of our parameters; KeyError when the table lacks it."""
    if ours in table:
        return table[ours]
    prefix, _, kind = ours.rpartition(".")
    layer = re.search(r"(?<=\.)\d+(?=\.)", f"{prefix}.")
    pattern = prefix.replace(f".{layer[0]}", ".{layer}", 1) if layer else prefix
    theirs = table[pattern].replace("{layer}", layer[0] if layer else "")
    return f"{theirs}.{kind}" if theirs else kind


def to_published(state: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    """Our state dict under published names."""
    return {published_name(name, table): tensor for name, tensor in state.items()}


def from_published(
    weights: Mapping[str, Tensor], names: Iterable[str], table: Mapping[str, str]
) -> dict[str, Tensor]:
    """Published weights under our names; an unknown one keeps its own: a strict load fails."""
    ours = {published_name(name, table): name for name in names}
    return {ours.get(name, name): tensor for name, tensor in weights.items()}


def main() -> None:
    table = {"blocks.{layer}.attention.query": "encoder.layer.{layer}.attention.self.query"}
    print(
        "blocks.3.attention.query.weight ->",
        published_name("blocks.3.attention.query.weight", table),
    )


if __name__ == "__main__":
    main()
