"""Torch's own attention kernels behind the signature of `attention_naive`.

    attention_sdpa = softmax(query keyᵀ · scale) value, by whichever kernel torch picks

For models that should be as fast as torch is today, and as the peer that our own kernels are
measured against.

Shapes  query [batch, head, query, dim]    key, value [batch, key_head, key, dim]
Run     uv run python implementations/attention/vendor.py
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from implementations.attention_basic import Mask, attention_naive, future
from implementations.lab.compare import error
from implementations.lab.timing import time_interleaved


def attention_sdpa(
    query: Float[Tensor, "*batch head query dim"],
    key: Float[Tensor, "*batch key_head key dim"],
    value: Float[Tensor, "*batch key_head key value_dim"],
    *,
    causal: bool = False,
    mask: Mask | None = None,
    scale: float | None = None,
) -> Float[Tensor, "*batch head query value_dim"]:
    """Torch's `scaled_dot_product_attention`, the last query standing at the last key.

    Torch's `is_causal` aligns the first query with the first key, so it serves only where there are
    as many queries as keys; elsewhere, and beside another mask, the future is masked explicitly.

    Raises:
        ValueError: causal with more queries than keys.
    """
    queries, keys = query.shape[-2], key.shape[-2]
    if queries == 1 <= keys:  # the last query sees all: no mask to make and to add
        causal = False
    if causal and (mask is not None or queries != keys):
        past = ~future(queries, keys, query.device)
        if mask is None:
            mask = past
        else:
            mask = mask & past if mask.dtype == torch.bool else mask.masked_fill(~past, -torch.inf)
        causal = False
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=query.shape[-3] != key.shape[-3],
    )


def main() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 9, 512, 64) for _ in range(3))
    peers = {"equation": attention_naive, "torch": attention_sdpa}
    timings = time_interleaved(peers, query, key, value)
    apart = error(attention_sdpa(query, key, value), attention_naive(query, key, value)).largest
    print(f"{list(query.shape)}: {apart:.1e} apart")
    print(f"torch's kernel is {timings.ratio('torch', 'equation'):.1f} times as fast")


if __name__ == "__main__":
    main()
