"""Latent attention against transformers' DeepSeek-V2, its two forms against each other."""

import pytest
import torch
from torch.testing import assert_close
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2Attention,
    DeepseekV2RotaryEmbedding,
)

from implementations.attention.latent import LatentAttention
from implementations.attention.vendor import attention_sdpa
from implementations.lab.compare import assert_same_function
from implementations.serving.kv_cache import LayerCache

# dim, rotary_dim, value_dim, latent: all different, and one where a transpose keeps every shape.
SIZES = [(6, 4, 5, 7), (8, 4, 8, 8), (16, 2, 16, 3)]


def layer(sizes=SIZES[0], heads: int = 3, **options) -> LatentAttention:
    ours = LatentAttention(24, heads, *sizes, **options).double()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return ours


def transformers_layer(ours: LatentAttention):
    """DeepSeek-V2's attention with our weights, as a function of x, causal."""
    (dim, rotary_dim), value_dim = ours.sizes, ours.parts[1]
    config = DeepseekV2Config(
        hidden_size=24,
        num_attention_heads=ours.heads,
        num_key_value_heads=ours.heads,
        q_lora_rank=None,
        kv_lora_rank=ours.compressed[0],
        qk_nope_head_dim=dim,
        qk_rope_head_dim=rotary_dim,
        v_head_dim=value_dim,
        head_dim=rotary_dim,
    )
    config._attn_implementation = "eager"
    theirs = DeepseekV2Attention(config, 0).double().eval()
    names = {"q_proj": "query", "kv_a_proj_with_mqa": "compress", "kv_a_layernorm": "norm"}
    names |= {"kv_b_proj": "expand", "o_proj": "output"}
    state = ours.state_dict()
    theirs.load_state_dict({f"{a}.weight": state[f"{b}.weight"] for a, b in names.items()})
    rotary = DeepseekV2RotaryEmbedding(config)

    def function(x):
        tokens = x.shape[1]
        future = torch.full((tokens, tokens), -torch.inf, dtype=x.dtype).triu(1)[None, None]
        angles = rotary(x, torch.arange(tokens)[None])
        return theirs(x, attention_mask=future, position_embeddings=angles)[0]

    return function


@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_transformers(sizes, absorbed):
    """transformers rotates and takes its softmax in float32: some 1e-7 each, angles up to 2e-6."""
    ours, x = layer(sizes), torch.randn(2, 20, 24, dtype=torch.float64)
    expected = transformers_layer(ours)(x)
    got = ours(x, causal=True, absorbed=absorbed)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_absorbed_equals_plain(sizes, causal):
    """Outputs and gradients of input and weights."""
    ours, x = layer(sizes), torch.randn(2, 9, 24, dtype=torch.float64)
    assert_same_function(
        lambda x: ours(x, causal=causal, absorbed=True), lambda x: ours(x, causal=causal), x
    )
    upstream = torch.randn(2, 9, 24, dtype=torch.float64)
    forms = (ours(x, causal=causal, absorbed=absorbed) for absorbed in (False, True))
    plain, absorbed = (torch.autograd.grad(y, [*ours.parameters()], upstream) for y in forms)
    for one, other in zip(plain, absorbed, strict=True):
        assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 6]], ids=lambda p: f"{len(p)}")
def test_cached_equals_uncached(pieces):
    """Read in pieces, in both forms by turns, the cache holding latent + rotary_dim numbers."""
    ours, x = layer(), torch.randn(2, 12, 24, dtype=torch.float64)
    cache = LayerCache(*(torch.empty(2, 1, 12, n, dtype=x.dtype) for n in (4, 7)))
    with torch.no_grad():
        got = [
            ours(piece, causal=True, cache=cache, absorbed=i % 2 == 0)
            for i, piece in enumerate(x.split(pieces, 1))
        ]
        assert_close(torch.cat(got, 1), ours(x, causal=True), rtol=1e-10, atol=1e-10)


def test_other_attention_and_masks_serve():
    ours, x = layer(), torch.randn(2, 6, 24, dtype=torch.float64)
    vendor = layer(attention=attention_sdpa)
    vendor.load_state_dict(ours.state_dict())
    mask = torch.rand(6, 6) < 0.7
    mask.fill_diagonal_(True)
    for absorbed in (False, True):
        got = vendor(x, mask=mask, absorbed=absorbed)
        assert_close(got, ours(x, mask=mask), rtol=1e-10, atol=1e-10)
