"""The block against torch's nn.TransformerEncoderLayer, both orders of normalisation."""

import pytest
import torch
from torch import nn

from implementations.attention.multi_head import MultiHeadAttention
from implementations.lab.compare import assert_same_function
from implementations.layers.block import Block
from implementations.layers.feed_forward import FeedForward
from implementations.layers.layer_norm import LayerNorm

NAMES = {
    "self_attn.out_proj": "attention.output",
    "linear1": "feed_forward.expand",
    "linear2": "feed_forward.contract",
    "norm1": "attention_norm",
    "norm2": "feed_forward_norm",
}


def pair(norm_first: bool) -> tuple[nn.Module, Block]:
    """Torch's layer with random weights everywhere, and ours with the same ones."""
    theirs = nn.TransformerEncoderLayer(
        32, 4, 80, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
    ).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    attention = MultiHeadAttention.from_torch(theirs.self_attn)
    ours = Block(attention, FeedForward(32, 80), lambda: LayerNorm(32), norm_first=norm_first)
    state = {f"attention.{name}": tensor for name, tensor in attention.state_dict().items()}
    for name, tensor in theirs.state_dict().items():
        prefix, kind = name.rsplit(".", 1)
        if prefix in NAMES:
            state[f"{NAMES[prefix]}.{kind}"] = tensor
    ours.double().load_state_dict(state, strict=True)
    return theirs, ours


@pytest.mark.parametrize("norm_first", [True, False])
def test_equals_torch(norm_first):
    theirs, ours = pair(norm_first)
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    assert_same_function(lambda x: ours(x), lambda x: theirs(x), x)


def test_options_reach_the_attention():
    theirs, ours = pair(norm_first=True)
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    expected = theirs(x, src_mask=~torch.ones(7, 7).tril().bool())
    torch.testing.assert_close(ours(x, causal=True), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm_first", [True, False])
def test_with_cross_attention_equals_torchs_decoder_layer(norm_first):
    """Self-attention, then attention to the context, then feed-forward."""
    theirs = nn.TransformerDecoderLayer(
        32, 4, 80, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
    ).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = Block(
        MultiHeadAttention.from_torch(theirs.self_attn),
        FeedForward(32, 80),
        lambda: LayerNorm(32),
        cross_attention=MultiHeadAttention.from_torch(theirs.multihead_attn),
        norm_first=norm_first,
    ).double()
    parts = {"linear1": ours.feed_forward.expand, "linear2": ours.feed_forward.contract}
    parts |= {"norm1": ours.attention_norm, "norm2": ours.cross_attention_norm}
    parts |= {"norm3": ours.feed_forward_norm}
    for name, part in parts.items():
        part.load_state_dict(getattr(theirs, name).state_dict(), strict=True)
    x, context = (torch.randn(2, n, 32, dtype=torch.float64) for n in (5, 7))
    assert_same_function(lambda x, c: ours(x, c), lambda x, c: theirs(x, c), x, context)


def test_dropout_touches_what_a_part_adds_and_not_the_stream():
    """With everything silenced but one in a million, the block is the identity."""
    block = Block(
        MultiHeadAttention(8, 2), FeedForward(8, 16), lambda: LayerNorm(8), dropout=1 - 1e-6
    )
    x = torch.randn(1, 3, 8)
    assert torch.equal(block(x), x)
    assert not torch.equal(block.eval()(x), x)


def test_cross_attention_without_a_context_is_refused():
    """It would read the stream itself, and train."""
    parts = MultiHeadAttention(8, 2), FeedForward(8, 16), lambda: LayerNorm(8)
    block = Block(*parts, cross_attention=MultiHeadAttention(8, 2))
    with pytest.raises(ValueError, match="reads a context, and got none"):
        block(torch.randn(1, 3, 8))
