"""The transformer block: attention, then feed-forward, each added to a stream that runs straight
through.

    norm first   x = x + attention(norm(x));  x = x + feed_forward(norm(x))   GPT-2, Llama, ViT
    norm last    x = norm(x + attention(x));  x = norm(x + feed_forward(x))   BERT, and in 2017

Encoder, decoder and vision transformer are this block, given different parts.

Paper   Vaswani et al. 2017, arXiv:1706.03762; norm first: Xiong et al. 2020, arXiv:2002.04745
Shapes  x [batch, token, width]
Run     uv run python implementations/layers/block.py
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implementations.attention_basic import Mask
from implementations.layers.dropout import Dropout


class Block(nn.Module):
    """Attention and feed-forward on a residual stream, with cross-attention between them if given.

    Args:
        attention: maps [batch, token, width] to the same shape; options of `forward` go to it.
        feed_forward: maps each token alone.
        norm: called for each part, makes its normalisation.
        cross_attention: reads another sequence, `context`: the 2017 transformer's decoder.
        norm_first: normalise what enters each part (True) or what leaves each sum (False).
        dropout: rate at which what a part adds to the stream is silenced in training.
    """

    def __init__(
        self,
        attention: nn.Module,
        feed_forward: nn.Module,
        norm: Callable[[], nn.Module],
        *,
        cross_attention: nn.Module | None = None,
        norm_first: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.attention, self.attention_norm = attention, norm()
        self.cross_attention = cross_attention
        self.cross_attention_norm = norm() if cross_attention else None
        self.feed_forward, self.feed_forward_norm = feed_forward, norm()
        self.norm_first, self.dropout = norm_first, Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "batch token width"],
        context: Float[Tensor, "batch key width"] | None = None,
        *,
        context_mask: Mask | None = None,
        **options,
    ) -> Float[Tensor, "batch token width"]:
        """The stream after this block.

        Raises:
            ValueError: a block with cross-attention got nothing to read.
        """
        if self.cross_attention is not None and context is None:
            raise ValueError("a block with cross-attention reads a context, and got none")
        x = self.add(x, self.attention, self.attention_norm, **options)
        if self.cross_attention is not None:
            reads = {"context": context, "mask": context_mask}
            x = self.add(x, self.cross_attention, self.cross_attention_norm, **reads)
        return self.add(x, self.feed_forward, self.feed_forward_norm)

    def add(
        self, x: Float[Tensor, "batch token width"], part: nn.Module, norm: nn.Module, **options
    ) -> Float[Tensor, "batch token width"]:
        """One part's contribution to the stream."""
        if self.norm_first:
            return x + self.dropout(part(norm(x), **options))
        return norm(x + self.dropout(part(x, **options)))


def main() -> None:
    from implementations.attention.multi_head import MultiHeadAttention
    from implementations.layers.feed_forward import FeedForward
    from implementations.layers.layer_norm import LayerNorm

    torch.manual_seed(0)
    x = torch.randn(8, 32, 64)
    print("size of the stream after 12 blocks, at the start of training")
    for norm_first in (True, False):
        y = x
        for _ in range(12):
            parts = MultiHeadAttention(64, 4), FeedForward(64, 256)
            y = Block(*parts, lambda: LayerNorm(64), norm_first=norm_first)(y)
        print(f"  norm {'first' if norm_first else 'last '}  {y.pow(2).mean().sqrt():.2f}")


if __name__ == "__main__":
    main()
