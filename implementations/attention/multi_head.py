"""Multi-head attention: several small attentions side by side, each reading its own projection of
the tokens.

    head_i = attention(x W_iQ, context W_iK, context W_iV)
    output = concatenate(head_1, ..., head_h) W_O

Self-attention has context = x; cross-attention reads another sequence. With fewer key heads than
heads, several query heads share one key head (grouped-query attention).

Paper   Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2; Ainslie et al. 2023, arXiv:2305.13245
Shapes  x [batch, query, width]    context [batch, key, width]
Run     uv run python implementations/attention/multi_head.py
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from implementations.attention_basic import Mask, attention_naive


@runtime_checkable
class Cache(Protocol):
    """Keys and values of the tokens before, as serving/kv_cache.py keeps them."""

    length: int

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values so far, the new ones last."""


@runtime_checkable
class RaggedCache(Protocol):
    """Keys and values of several texts, as serving/paged_cache.py keeps them: `x` is one row in
    which their new tokens follow one another."""

    positions: Tensor
    """where each token of the row stands in its own text"""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keep the new keys and values; each query then looks at its own text up to itself."""


class MultiHeadAttention(nn.Module):
    """Query, key, value and output projections around an attention function.

    Args:
        width: size of a token's vector, a multiple of `heads`.
        heads: how many query heads.
        key_value_heads: how many key and value heads, a divisor of `heads`; all of them unless
            given.
        bias: whether the four projections have one.
        attention: any function with the signature of `attention_naive`.
        rotate: applied to queries and to keys when they are split into heads: rotary positions,
            say. After a cache it is given the positions too.

    Raises:
        ValueError: `heads` does not divide `width`, or `key_value_heads` does not divide `heads`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        key_value_heads: int | None = None,
        *,
        bias: bool = True,
        attention: Callable[..., Tensor] = attention_naive,
        rotate: Callable[..., Tensor] | None = None,
    ):
        super().__init__()
        key_value_heads = heads if key_value_heads is None else key_value_heads
        if width % heads:
            raise ValueError(f"{heads} heads cannot share a width of {width} evenly")
        if heads % key_value_heads:
            raise ValueError(f"{key_value_heads} key heads cannot serve {heads} heads evenly")
        self.dim, self.attention, self.rotate = width // heads, attention, rotate
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, key_value_heads * self.dim, bias=bias)
        self.value = nn.Linear(width, key_value_heads * self.dim, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "batch query width"],
        context: Float[Tensor, "batch key width"] | None = None,
        *,
        causal: bool = False,
        mask: Mask | None = None,
        cache: Cache | RaggedCache | None = None,
    ) -> Float[Tensor, "batch query width"]:
        """Attend from `x` to `context`, or to `x` itself. A mask is True where a query may look.

        With a cache, `x` continues the text whose keys it holds, and is added to it. A ragged cache
        holds several texts and does the attending: always causal, without a mask.

        Raises:
            ValueError: a context together with a cache, or a mask or no causality with a ragged
                one.
        """
        if cache is not None and context is not None:
            raise ValueError("a cache holds the text's own keys: it cannot serve a context")
        if hasattr(cache, "attend"):  # a RaggedCache; isinstance asks a protocol for 20 µs
            if mask is not None or not causal:
                raise ValueError("a ragged cache attends causally and takes no mask")
            heads = cache.attend(*self.project(x, start=cache.positions))
        else:
            query, key, value = self.project(x, context, 0 if cache is None else cache.length)
            if cache is not None:
                key, value = cache.append(key, value)
            heads = self.attention(query, key, value, causal=causal, mask=mask)
        return self.output(rearrange(heads, "batch head query dim -> batch query (head dim)"))

    def project(
        self,
        x: Float[Tensor, "batch query width"],
        context: Float[Tensor, "batch key width"] | None = None,
        start: int | Int[Tensor, " query"] = 0,
    ) -> tuple[
        Float[Tensor, "batch head query dim"],
        Float[Tensor, "batch key_head key dim"],
        Float[Tensor, "batch key_head key dim"],
    ]:
        """Queries of `x`, keys and values of `context`; head i is the i-th slice of the width.

        `start` is how many tokens stand before: rotation counts its positions from there. Or it is
        every token's own position.
        """
        context = x if context is None else context
        query, key, value = (
            rearrange(y, "batch token (head dim) -> batch head token dim", dim=self.dim)
            for y in (self.query(x), self.key(context), self.value(context))
        )
        if self.rotate is None:
            return query, key, value
        if isinstance(start, Tensor):
            positions = start
        elif start == 0:
            return self.rotate(query), self.rotate(key), value
        else:
            positions = torch.arange(start, start + x.shape[1], device=x.device)
        return self.rotate(query, positions), self.rotate(key, positions), value

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, **options) -> "MultiHeadAttention":
        """The same layer with a copy of torch's weights. Torch stacks query, key and value in one
        matrix.

        Raises:
            ValueError: the module has separate key or value widths, or learned extra keys.
        """
        if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
            raise ValueError(
                "only nn.MultiheadAttention of one width without extra keys fits this layer"
            )
        bias = module.in_proj_bias is not None
        state = {f"output.{kind}": tensor for kind, tensor in module.out_proj.state_dict().items()}
        for kind in ("weight", "bias") if bias else ("weight",):
            thirds = getattr(module, f"in_proj_{kind}").detach().chunk(3)
            names = (f"{name}.{kind}" for name in ("query", "key", "value"))
            state |= zip(names, thirds, strict=True)
        ours = cls(module.embed_dim, module.num_heads, bias=bias, **options)
        ours.to(module.in_proj_weight).load_state_dict(state)  # first the dtype: no digit is lost
        return ours


def main() -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(64, 8, batch_first=True)
    x, context = torch.randn(2, 5, 64), torch.randn(2, 7, 64)
    output, _ = theirs(x, context, context)
    apart = (MultiHeadAttention.from_torch(theirs)(x, context) - output).abs().max()
    print(f"cross-attention of 5 tokens to 7: largest difference from torch's {apart:.1e}")
    for key_value_heads in (8, 2, 1):
        layer = MultiHeadAttention(64, 8, key_value_heads)
        count = sum(parameter.numel() for parameter in layer.parameters())
        print(f"  8 heads, {key_value_heads} key heads: {count:,} parameters")


if __name__ == "__main__":
    main()
