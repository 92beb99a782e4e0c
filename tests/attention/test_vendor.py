"""Torch's kernels behind our signature are the equation, where torch's conventions differ too."""

import pytest
import torch

from implementations.attention.vendor import attention_sdpa
from implementations.attention_basic import attention_naive
from implementations.lab.compare import assert_same_function

MASKS = {
    "none": None,
    "boolean": torch.rand(5, 9, generator=torch.Generator().manual_seed(1)) > 0.3,
    "additive": torch.randn(5, 9, generator=torch.Generator().manual_seed(2)).double(),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_equals_the_equation(key_heads, causal, mask):
    """Queries < keys, heads in groups, causal together with a mask."""
    inputs = [
        torch.randn(2, h, n, 16).double() for h, n in ((4, 5), (key_heads, 9), (key_heads, 9))
    ]
    options = {"causal": causal, "mask": MASKS[mask], "scale": 0.3}
    assert_same_function(
        lambda *x: attention_sdpa(*x, **options), lambda *x: attention_naive(*x, **options), *inputs
    )


@pytest.mark.parametrize("queries", [1, 9])
def test_causal_with_as_many_queries_or_one(queries):
    inputs = [torch.randn(2, 4, n, 16).double() for n in (queries, 9, 9)]
    assert_same_function(
        lambda *x: attention_sdpa(*x, causal=True),
        lambda *x: attention_naive(*x, causal=True),
        *inputs,
    )


def test_bad_input_is_a_sentence():
    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="causal attention needs queries <= keys, got 5 > 3"):
        attention_sdpa(query, key, key, causal=True)
