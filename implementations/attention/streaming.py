"""Streaming attention: a sliding window that never lets go of the first tokens.

    output = softmax(query keyᵀ / sqrt(dim) + mask) value
    query p sees key j  where  p - window < j <= p  (the window)  or  j < sinks, j <= p  (the sinks)

The window counts the query's own token: window = 1 sees itself alone, and a text of at most
`window` tokens is read as by causal attention. Sinks come on top of the window, so a query sees at
most window + sinks keys, however long the text is. Weights that sum to one have to go somewhere:
trained models rest them on the first tokens, and a window without those breaks the model.

Positions are not touched here. The paper numbers the keys anew inside its cache, so that no
distance outgrows the training length. Under this mask rotary keys keep their places in the text: a
sink drifts ever further away, which is sound within the training length and not beyond it.

Paper   Xiao et al. 2023, arXiv:2309.17453, section 3.2. Its cache of r recent tokens is read
        together with the new one: window = r + 1
Shapes  query [..., head, query, dim]    key, value [..., key_head, key, dim]
Run     uv run python implementations/attention/streaming.py
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from implementations.attention_basic import Mask, attention_naive, future


def attention_streaming(
    query: Float[Tensor, "*batch head query dim"],
    key: Float[Tensor, "*batch key_head key dim"],
    value: Float[Tensor, "*batch key_head key value_dim"],
    *,
    window: int,
    sinks: int,
    causal: bool = True,
    mask: Mask | None = None,
    scale: float | None = None,
) -> Float[Tensor, "*batch head query value_dim"]:
    """Causal attention to the last `window` keys and the first `sinks`.

    For a model, fix the two: `Decoder(config, partial(attention_streaming, window=512, sinks=4))`.
    The rest is `attention_naive`'s, errors included.

    Raises:
        ValueError: `causal` is False, or as `window_mask`.
    """
    if not causal:
        raise ValueError("a sliding window looks back from its query: causal must be True")
    visible = window_mask(query.shape[-2], key.shape[-2], window, sinks, query.device)
    if mask is not None and mask.is_floating_point():
        visible = mask.masked_fill(~visible, -torch.inf)
    elif mask is not None:
        visible = visible & mask  # integers stay integers, and are refused below
    return attention_naive(query, key, value, mask=visible, scale=scale)


def window_mask(
    queries: int, keys: int, window: int, sinks: int = 0, device: torch.device | None = None
) -> Bool[Tensor, "query key"]:
    """True where a query may look, the last query standing at the last key.

    Args:
        window: how many keys are near enough, the query's own among them.
        sinks: how many keys at the start of the text stay visible besides.

    Raises:
        ValueError: the window is below 1, the sinks are below 0, or there are more queries than
            keys.
    """
    if window < 1:
        raise ValueError(f"a window holds at least the query's own token, got {window}")
    if sinks < 0:
        raise ValueError(f"the number of sinks is at least 0, got {sinks}")
    position = torch.arange(queries, device=device)[:, None] + keys - queries
    key = torch.arange(keys, device=device)
    return ((key > position - window) | (key < sinks)) & ~future(queries, keys, device)


def main() -> None:
    window, sinks = 6, 2
    print(f"a window of {window} and {sinks} sinks: each row a query, # a key that it sees")
    for row in window_mask(16, 16, window, sinks):
        print("   ", "".join("#" if sees else "." for sees in row), f"{int(row.sum()):2} keys")


if __name__ == "__main__":
    main()
