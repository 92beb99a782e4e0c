"""The JAX form is the torch form: outputs and gradients in float64."""

import jax
import jax.numpy as jnp
import pytest
import torch

from implementations.attention_basic import attention_naive
from implementations.attention_basic_jax import attention_jax, attention_weights_jax

OPTIONS = ["plain", "causal", "boolean mask", "additive mask", "scale"]


def options(kind: str, queries: int, keys: int) -> dict:
    """The keyword arguments of one case, masks as torch tensors."""
    if kind == "boolean mask":
        mask = torch.rand(queries, keys) > 0.3
        mask[0] = False  # a query that sees nothing
        return {"mask": mask}
    if kind == "additive mask":
        return {"mask": torch.randn(queries, keys, dtype=torch.float64)}
    return {"causal": {"causal": True}, "scale": {"scale": 0.3}}.get(kind, {})


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 16), (4, 4, 63, 63, 16), (8, 2, 5, 65, 80)])
def test_equals_torch_form(shape, kind):
    """rtol 1e-12, outputs and the three gradients under one random upstream gradient."""
    heads, key_heads, queries, keys, dim = shape
    inputs = [
        torch.randn(2, h, n, dim, dtype=torch.float64, requires_grad=True)
        for h, n in [(heads, queries), (key_heads, keys), (key_heads, keys)]
    ]
    chosen = options(kind, queries, keys)
    output = attention_naive(*inputs, **chosen)
    upstream = torch.randn_like(output)
    expected = [output, *torch.autograd.grad(output, inputs, upstream)]
    with jax.enable_x64(True):
        as_jax = lambda x: jnp.asarray(x.detach().numpy()) if torch.is_tensor(x) else x  # noqa: E731
        chosen = {name: as_jax(value) for name, value in chosen.items()}
        function = jax.jit(lambda *x: attention_jax(*x, **chosen))
        output, pull = jax.vjp(function, *map(as_jax, inputs))
        got = [torch.from_dlpack(x) for x in (output, *pull(as_jax(upstream)))]
    for value, want in zip(got, expected, strict=True):
        torch.testing.assert_close(value, want.detach(), rtol=1e-12, atol=1e-12)


def test_narrow_inputs_keep_their_type():
    """bfloat16 in, float32 inside, bfloat16 out."""
    x = jnp.ones((1, 2, 3, 16), jnp.bfloat16)
    assert attention_jax(x, x, x).dtype == jnp.bfloat16
    assert attention_weights_jax(x, x).dtype == jnp.float32


@pytest.mark.parametrize(
    "shapes, chosen, sentence",
    [
        ([(2, 5), (2, 3)], {"causal": True}, "causal attention needs queries <= keys, got 5 > 3"),
        ([(4, 5), (3, 5)], {}, "3 key heads cannot be shared evenly by 4 query heads"),
        ([(2, 3), (2, 3)], {"mask": jnp.ones((3, 3), int)}, "a mask is Boolean or added"),
    ],
    ids=str,
)
def test_bad_input_is_a_sentence(unchecked, shapes, chosen, sentence):
    query, key = (jnp.ones((1, heads, tokens, 16)) for heads, tokens in shapes)
    with pytest.raises(ValueError, match=sentence):
        attention_jax(query, key, key, **chosen)
