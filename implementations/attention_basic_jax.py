"""Attention in JAX: the equation of attention_basic.py, line for line, in the other framework.

    weights = softmax(query keyᵀ / sqrt(dim))
    output  = weights value

Pure functions of arrays, so `jax.jit`, `jax.grad` and `jax.vmap` apply as they are.

Paper   Vaswani et al. 2017, arXiv:1706.03762
Shapes  query [..., head, query, dim]    key, value [..., key_head, key, dim]
Run     uv run python implementations/attention_basic_jax.py
"""

import jax
import jax.numpy as jnp
from einops import einsum, repeat
from jaxtyping import Array, Bool, Float

Mask = Bool[Array, "... #query #key"] | Float[Array, "... #query #key"]


def attention_jax(
    query: Float[Array, "*batch head query dim"],
    key: Float[Array, "*batch key_head key dim"],
    value: Float[Array, "*batch key_head key value_dim"],
    *,
    causal: bool = False,
    mask: Mask | None = None,
    scale: float | None = None,
) -> Float[Array, "*batch head query value_dim"]:
    """softmax(query keyᵀ · scale) value, with the arguments and errors of `attention_naive`."""
    weights = attention_weights_jax(query, key, causal=causal, mask=mask, scale=scale)
    value = repeat_heads_jax(value, query.shape[-3]).astype(weights.dtype)
    output = einsum(weights, value, "... query key, ... key dim -> ... query dim")
    return output.astype(query.dtype)


def attention_weights_jax(
    query: Float[Array, "*batch head query dim"],
    key: Float[Array, "*batch key_head key dim"],
    *,
    causal: bool = False,
    mask: Mask | None = None,
    scale: float | None = None,
) -> Float[Array, "*batch head query key"]:
    """Each row is a distribution over keys, or zeros where no key is allowed.

    Raises:
        ValueError: as `attention_weights`.
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    key = repeat_heads_jax(key, query.shape[-3]).astype(wide)
    scores = einsum(query.astype(wide), key, "... query dim, ... key dim -> ... query key")
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = jnp.where(future_jax(*scores.shape[-2:]), -jnp.inf, scores)
    if mask is not None:
        scores = masked_jax(scores, mask)
    sees_nothing = (scores == -jnp.inf).all(-1, keepdims=True)
    weights = jax.nn.softmax(jnp.where(sees_nothing, 0.0, scores), axis=-1)
    return jnp.where(sees_nothing, 0.0, weights)


def masked_jax(
    scores: Float[Array, "*batch head query key"], mask: Mask
) -> Float[Array, "*batch head query key"]:
    """Scores with -inf where a Boolean mask is False, or with a floating-point mask added."""
    if mask.dtype == bool:
        return jnp.where(mask, scores, -jnp.inf)
    if not jnp.issubdtype(mask.dtype, jnp.floating):
        raise ValueError(f"a mask is Boolean or added to the scores as floats, got {mask.dtype}")
    return scores + mask


def future_jax(queries: int, keys: int) -> Bool[Array, "query key"]:
    """True where a key comes after its query, the last query standing at the last key."""
    if queries > keys:
        raise ValueError(f"causal attention needs queries <= keys, got {queries} > {keys}")
    return jnp.arange(keys) > (jnp.arange(queries) + keys - queries)[:, None]


def repeat_heads_jax(
    x: Float[Array, "*batch key_head key dim"], heads: int
) -> Float[Array, "*batch head key dim"]:
    """Grouped-query attention: heads 0, 1, ... of one group all read the same key head."""
    key_heads = x.shape[-3]
    if heads % key_heads:
        raise ValueError(f"{key_heads} key heads cannot be shared evenly by {heads} query heads")
    return repeat(x, "... head key dim -> ... (head group) key dim", group=heads // key_heads)


def main() -> None:
    import torch

    from implementations.attention_basic import attention_naive

    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 8, 33, 64, dtype=torch.float64) for _ in range(3))
    expected = attention_naive(query, key, value, causal=True)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x.numpy()) for x in (query, key, value)]
        output = jax.jit(attention_jax, static_argnames="causal")(*arrays, causal=True)
        difference = abs(torch.from_dlpack(output) - expected).max()
    print(f"{list(expected.shape)} in float64: largest difference from torch {difference:.1e}")


if __name__ == "__main__":
    main()
