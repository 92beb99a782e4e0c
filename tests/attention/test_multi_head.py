"""MultiHeadAttention against torch's nn.MultiheadAttention on its own weights."""

import pytest
import torch
from torch import nn

from implementations.attention.multi_head import MultiHeadAttention
from implementations.attention_basic import attention_naive
from implementations.lab.compare import assert_same_function

SIZES = [(16, 1), (48, 3), (64, 8)]


def torch_layer(width: int, heads: int, bias: bool = True) -> nn.MultiheadAttention:
    """Torch's layer in float64 with biases that are not zero, as they are at its start."""
    layer = nn.MultiheadAttention(width, heads, bias=bias, batch_first=True).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width, heads", SIZES)
def test_self_and_cross_attention_equal_torch(width, heads, bias):
    theirs = torch_layer(width, heads, bias)
    ours = MultiHeadAttention.from_torch(theirs)
    x = torch.randn(2, 7, width, dtype=torch.float64)
    context = torch.randn(2, 5, width, dtype=torch.float64)
    assert_same_function(lambda x: ours(x), lambda x: theirs(x, x, x, need_weights=False)[0], x)
    assert_same_function(
        lambda x, context: ours(x, context),
        lambda x, context: theirs(x, context, context, need_weights=False)[0],
        x,
        context,
    )


def test_in_float32_it_is_within_1e_6_of_torch():
    theirs = nn.MultiheadAttention(384, 12, batch_first=True).eval()
    ours = MultiHeadAttention.from_torch(theirs)
    x = torch.randn(2, 63, 384)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0], rtol=0, atol=1e-6)


def test_masks_mean_the_opposite_of_torchs_layer():
    """Ours is True where a query may look (as in SDPA), theirs where it may not."""
    theirs = torch_layer(48, 3)
    ours = MultiHeadAttention.from_torch(theirs)
    x = torch.randn(2, 6, 48, dtype=torch.float64)
    real = torch.arange(6) < torch.tensor([[6], [4]])
    visible = torch.ones(6, 6).tril().bool()
    expected, _ = theirs(x, x, x, key_padding_mask=~real, attn_mask=~visible)
    got = ours(x, causal=True, mask=real[:, None, None, :])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_heads_are_slices_of_the_width():
    """Head i reads channels i * dim to (i + 1) * dim, as an identity projection shows."""
    layer = MultiHeadAttention(6, 3, bias=False)
    layer.query.weight.data = torch.eye(6)
    x = torch.arange(12.0).reshape(1, 2, 6)
    query, _, _ = layer.project(x)
    assert query[0, 1].tolist() == [[2.0, 3.0], [8.0, 9.0]]


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_grouped_heads_equal_torch_with_repeated_weights(key_value_heads):
    """Key heads shared by a group are full multi-head attention whose key weights repeat."""
    theirs = torch_layer(32, 8)
    with torch.no_grad():
        for start in (32, 64):  # key rows, then value rows, of the stacked matrix
            for parameter in (theirs.in_proj_weight, theirs.in_proj_bias):
                part = parameter[start : start + 32].unflatten(0, (key_value_heads, -1, 4))
                part[:] = part[:, :1].clone()
    full = MultiHeadAttention.from_torch(theirs)
    ours = MultiHeadAttention(32, 8, key_value_heads).double()
    state = full.state_dict()
    for name in ("key.weight", "key.bias", "value.weight", "value.bias"):
        state[name] = state[name].unflatten(0, (key_value_heads, -1, 4))[:, 0].flatten(0, 1)
    ours.load_state_dict(state)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    assert_same_function(lambda x: ours(x), lambda x: theirs(x, x, x, need_weights=False)[0], x)


def test_permuted_batch_permutes_the_output():
    layer = MultiHeadAttention(32, 4).double()
    x, order = torch.randn(4, 5, 32, dtype=torch.float64), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(layer(x)[order], layer(x[order]))


def test_attention_is_passed_as_a_function():
    """The layer calls what it was given, with the options of the call."""
    seen = {}

    def spy(*inputs, **options):
        seen.update(options)
        return attention_naive(*inputs, **options)

    MultiHeadAttention(32, 4, attention=spy)(torch.randn(1, 3, 32), causal=True)
    assert seen == {"causal": True, "mask": None}


def test_rotate_touches_queries_and_keys_but_not_values():
    plain, turned = (MultiHeadAttention(32, 4, rotate=turn) for turn in (None, lambda x: -x))
    turned.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 32)
    for before, after, sign in zip(plain.project(x), turned.project(x), (-1, -1, 1), strict=True):
        assert torch.equal(after, sign * before)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((30, 4), "4 heads cannot share a width of 30 evenly"),
        ((32, 4, 3), "3 key heads cannot serve 4 heads evenly"),
    ],
)
def test_sizes_that_do_not_divide(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        MultiHeadAttention(*arguments)


def test_a_torch_layer_of_two_widths_is_refused():
    theirs = nn.MultiheadAttention(32, 4, kdim=16, batch_first=True)
    with pytest.raises(ValueError, match="of one width"):
        MultiHeadAttention.from_torch(theirs)
