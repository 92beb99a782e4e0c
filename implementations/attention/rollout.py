"""Attention rollout: through all layers, how much of each token of the input is in each output?

    A_l' = (mean over heads of A_l + I) / 2          the residual stream carries half
    rollout = A_L' A_{L-1}' ... A_1'                 later layers read what earlier ones wrote

Entry (i, j) sums over all paths from token j at the bottom to token i at the top; a path's weight
is the product of its steps. Values, norms and feed-forward layers are left out, so it says where
information can have come from, and not what was made of it.

Paper   Abnar & Zuidema 2020, arXiv:2005.00928
Shapes  maps [layer, batch, head, query, key]    rollout [batch, output, input]
Run     uv run python implementations/attention/rollout.py
"""

import torch
from jaxtyping import Float
from torch import Tensor


def attention_rollout(
    maps: Float[Tensor, "layer batch head query key"],
) -> Float[Tensor, "batch query key"]:
    """Each row a distribution over the tokens that entered the first layer.

    Raises:
        ValueError: there is no layer, or queries and keys are not the same tokens.
    """
    layers, queries, keys = maps.shape[0], *maps.shape[-2:]
    if not layers or queries != keys:
        raise ValueError(
            f"rollout needs a layer and square maps, got {layers} layers of {queries} x {keys}"
        )
    identity = torch.eye(keys, dtype=maps.dtype, device=maps.device)
    steps = (maps.mean(2) + identity) / 2
    rollout = identity.expand(maps.shape[1], -1, -1)
    for step in steps:
        rollout = step @ rollout
    return rollout


def attention_distance(
    maps: Float[Tensor, "layer batch head query key"], coordinates: Float[Tensor, "patch 2"]
) -> Float[Tensor, "layer head"]:
    """How far a patch looks on average, in patches: the distance of keys, weighted by attention.

    Only from patch to patch: tokens before the patches stand nowhere (Dosovitskiy et al., D.7).
    """
    patches = len(coordinates)
    between = maps[..., -patches:, -patches:]
    weights = between / between.sum(-1, keepdim=True)
    apart = torch.cdist(coordinates, coordinates).to(maps)
    return (weights * apart).sum(-1).mean((1, 3))


def main() -> None:
    torch.manual_seed(0)
    # Every token looks at the one before it, and the first at itself.
    back = torch.eye(8)[(torch.arange(8) - 1).clamp(0)]
    print("each token looks one back: what the last of 8 tokens is made of")
    for layers in (1, 2, 4, 7):
        row = attention_rollout(back.expand(layers, 1, 1, 8, 8))[0, -1]
        print(f"  {layers} layers  " + " ".join(f"{share:.3f}" for share in row.tolist()))


if __name__ == "__main__":
    main()
