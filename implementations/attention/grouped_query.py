"""Grouped-query attention from multi-head weights: the key heads of a group become their mean.

    W_K of group g = mean of W_K of its heads         values alike; queries and output stay

Multi-head attention keeps a key and a value a head; a cache shrinks with the number of key heads.
One is multi-query attention. Pooling is a start for a short training, not an equal model: it is
exact only where the heads of a group agree already. The grouping itself, heads 0, 1, ... of one
group reading the same key head, is `repeat_heads` of attention_basic.py.

Paper   Ainslie et al. 2023, arXiv:2305.13245, section 2.1; Shazeer 2019, arXiv:1911.02150
Shapes  weight [(head dim), width] or a bias [(head dim)], head after head as in nn.Linear
Run     uv run python implementations/attention/grouped_query.py
"""

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from implementations.attention.multi_head import MultiHeadAttention


def pool_heads(
    weight: Float[Tensor, "output *width"], heads: int, groups: int
) -> Float[Tensor, "pooled *width"]:
    """The mean of each group's heads; a group is heads that stand next to each other.

    Args:
        weight: a key or value projection, or its bias.
        heads: how many heads its rows hold.
        groups: how many are wanted.

    Raises:
        ValueError: the heads do not share the rows evenly, or the groups the heads.
    """
    if weight.shape[0] % heads:
        raise ValueError(f"{heads} heads cannot share {weight.shape[0]} rows evenly")
    if groups < 1 or heads % groups:
        raise ValueError(f"{heads} heads cannot form {groups} groups of equal size")
    pattern = "(group member dim) ... -> (group dim) ..."
    return reduce(weight, pattern, "mean", group=groups, member=heads // groups)


def grouped(layer: MultiHeadAttention, key_value_heads: int) -> MultiHeadAttention:
    """A copy of the layer with fewer key heads, each the mean of those it stands for.

    Raises:
        ValueError: the wanted key heads do not divide those of the layer.
    """
    width, bias = layer.output.in_features, layer.output.bias is not None
    heads, before = (part.out_features // layer.dim for part in (layer.query, layer.key))
    state = layer.state_dict()
    for name in state:
        if name.startswith(("key.", "value.")):
            state[name] = pool_heads(state[name], before, key_value_heads)
    options = {"bias": bias, "attention": layer.attention, "rotate": layer.rotate}
    copy = MultiHeadAttention(width, heads, key_value_heads, **options)
    copy.to(layer.output.weight).load_state_dict(state)  # first the dtype: no digit is lost
    return copy


def main() -> None:
    from implementations.models.encoder import Encoder

    encoder = Encoder.from_minilm()
    x = torch.randn(1, 32, encoder.config.width)
    layer = encoder.blocks[0].attention
    heads = layer.key.out_features // layer.dim
    with torch.no_grad():
        for count in (heads, heads // 2, heads // 4, 1):
            apart = (grouped(layer, count)(x) - layer(x)).norm() / layer(x).norm()
            cache = 2 * count * layer.dim * 4
            print(f"{count:2} key heads: {cache:5,} bytes a token, output off by {apart:.0%}")


if __name__ == "__main__":
    main()
