"""Multi-head latent attention: cache one short vector a token, and make all heads' keys of it.

    c       = norm(x W_C)                         the latent, cached
    r       = rotate(x W_R)                       one rotary key for all heads, cached
    key_h   = [c K_h, r]     value_h = c V_h      K_h, V_h make head h of the latent
    query_h = [a_h, rotate(b_h)]                  a_h, b_h = the two parts of x W_Q for head h
    score_h = query_h · key_h / sqrt(dim + rotary_dim)

Rotation has its own channels (decoupled) because a turn between a_h and K_h would depend on the
place. Without one between them, K_h can change sides:

    absorbed    a_h · (c K_h) = (a_h K_hᵀ) · c      and      weights (c V_h) = (weights c) V_h

so that decoding attends to the latents themselves, as to one key head that all heads share, and
never makes a key. Queries are not compressed here, as in DeepSeek-V2-Lite.

Paper   DeepSeek-AI 2024, arXiv:2405.04434, section 2.1
Shapes  x [batch, query, width]    c [batch, 1, key, latent]    r [batch, 1, key, rotary_dim]
Run     uv run python implementations/attention/latent.py
"""

from collections.abc import Callable

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from implementations.attention.multi_head import Cache
from implementations.attention.positions import rotate_interleaved
from implementations.attention_basic import Mask, attention_naive
from implementations.layers.rms_norm import RMSNorm


class LatentAttention(nn.Module):
    """Self-attention through a latent, in the plain and in the absorbed form.

    Args:
        width: size of a token's vector.
        heads: how many heads.
        dim: channels of a head's query and key that are not turned.
        rotary_dim: channels that are, of every query and of the one rotary key.
        value_dim: size of a head's value.
        latent: size of what is cached beside the rotary key.
        attention: any function with the signature of `attention_naive`.
        rotate: turns [batch, head, token, rotary_dim], and takes positions after a cache.
        epsilon: of the latent's norm.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        dim: int,
        rotary_dim: int,
        value_dim: int,
        latent: int,
        *,
        attention: Callable[..., Tensor] = attention_naive,
        rotate: Callable[..., Tensor] = rotate_interleaved,
        epsilon: float = 1e-6,
    ):
        super().__init__()
        self.sizes, self.compressed = [dim, rotary_dim], [latent, rotary_dim]
        self.parts = [dim, value_dim]
        self.heads, self.attention, self.rotate = heads, attention, rotate
        self.query = nn.Linear(width, heads * (dim + rotary_dim), bias=False)
        self.compress = nn.Linear(width, latent + rotary_dim, bias=False)
        self.norm = RMSNorm(latent, epsilon)
        self.expand = nn.Linear(latent, heads * (dim + value_dim), bias=False)
        self.output = nn.Linear(heads * value_dim, width, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch query width"],
        *,
        causal: bool = False,
        mask: Mask | None = None,
        cache: Cache | None = None,
        absorbed: bool = False,
    ) -> Float[Tensor, "batch query width"]:
        """Attend from `x` to itself, and to the tokens before it that a cache holds.

        Args:
            cache: the rotary keys as its keys, the latents as its values, one head each.
            absorbed: attend to the latents: the same function, cheaper where queries are few.
        """
        content, turned, latent, shared = self.project(x, 0 if cache is None else cache.length)
        if cache is not None:
            shared, latent = cache.append(shared, latent)
        attend = self.attend_absorbed if absorbed else self.attend
        heads = attend(content, turned, latent, shared, causal=causal, mask=mask)
        return self.output(rearrange(heads, "batch head query value -> batch query (head value)"))

    def project(
        self, x: Float[Tensor, "batch query width"], start: int = 0
    ) -> tuple[
        Float[Tensor, "batch head query dim"],
        Float[Tensor, "batch head query rotary_dim"],
        Float[Tensor, "batch 1 query latent"],
        Float[Tensor, "batch 1 query rotary_dim"],
    ]:
        """Queries in two parts, the latent, the rotary key; `start` tokens stand before."""
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        split = "batch token (head dim) -> batch head token dim"
        content, turned = rearrange(self.query(x), split, head=self.heads).split(self.sizes, -1)
        latent, shared = self.compress(x)[:, None].split(self.compressed, -1)
        turned, shared = (self.rotate(part, positions) for part in (turned, shared))
        return content, turned, self.norm(latent), shared

    def attend(
        self,
        content: Float[Tensor, "batch head query dim"],
        turned: Float[Tensor, "batch head query rotary_dim"],
        latent: Float[Tensor, "batch 1 key latent"],
        shared: Float[Tensor, "batch 1 key rotary_dim"],
        **options,
    ) -> Float[Tensor, "batch head query value_dim"]:
        """The equation: make every head's keys and values of the latent, then attend."""
        split = "batch 1 key (head dim) -> batch head key dim"
        made = rearrange(self.expand(latent), split, head=self.heads)
        key, value = made.split(self.parts, -1)
        key = torch.cat((key, shared.expand(-1, self.heads, -1, -1)), -1)
        return self.attention(torch.cat((content, turned), -1), key, value, **options)

    def attend_absorbed(
        self,
        content: Float[Tensor, "batch head query dim"],
        turned: Float[Tensor, "batch head query rotary_dim"],
        latent: Float[Tensor, "batch 1 key latent"],
        shared: Float[Tensor, "batch 1 key rotary_dim"],
        **options,
    ) -> Float[Tensor, "batch head query value_dim"]:
        """The same with the expansion moved to the queries and to the output."""
        made = rearrange(
            self.expand.weight, "(head dim) latent -> head dim latent", head=self.heads
        )
        to_key, to_value = made.split(self.parts, 1)
        query = einsum(
            content, to_key, "batch head query dim, head dim latent -> batch head query latent"
        )
        heads = self.attention(
            torch.cat((query, turned), -1),
            torch.cat((latent, shared), -1),
            latent,
            scale=sum(self.sizes) ** -0.5,  # of the plain form, whose keys are shorter
            **options,
        )
        return einsum(
            heads, to_value, "batch head query latent, head dim latent -> batch head query dim"
        )


def main() -> None:
    torch.manual_seed(0)
    heads, dim, rotary_dim, latent = 16, 128, 64, 512  # DeepSeek-V2-Lite's
    layer = LatentAttention(2048, heads, dim, rotary_dim, dim, latent).double()
    x = torch.randn(1, 16, 2048, dtype=torch.float64)
    with torch.no_grad():
        plain, absorbed = layer(x, causal=True), layer(x, causal=True, absorbed=True)
    apart = (plain - absorbed).abs().max() / plain.abs().max()
    print(f"plain and absorbed form differ by {apart:.1e} of the largest output")
    ours, full = latent + rotary_dim, 2 * heads * dim
    print(f"cached a token and layer: {ours} numbers, multi-head attention {full}")


if __name__ == "__main__":
    main()
