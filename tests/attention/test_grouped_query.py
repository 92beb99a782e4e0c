"""Pooled key heads: by hand, and against torch's layer where the heads of a group agree."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from implementations.attention.grouped_query import grouped, pool_heads
from implementations.attention.multi_head import MultiHeadAttention
from implementations.attention.positions import rotate_half_split
from implementations.attention_basic import attention_naive


def test_pooled_by_hand():
    """Four heads of two rows: the mean of heads 0 and 1, then of 2 and 3, row by row."""
    weight = torch.tensor([[0.0], [10.0], [2.0], [20.0], [5.0], [50.0], [7.0], [90.0]])
    assert pool_heads(weight, 4, 2).tolist() == [[1.0], [15.0], [6.0], [70.0]]
    assert pool_heads(weight, 4, 1).tolist() == [[3.5], [42.5]]
    assert torch.equal(pool_heads(weight, 4, 4), weight)
    assert pool_heads(weight[:, 0], 4, 2).tolist() == [1.0, 15.0, 6.0, 70.0]


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_exact_where_the_heads_of_a_group_agree(groups, bias):
    """Torch's 8 heads with key weights that repeat: fewer key heads, the same function."""
    theirs = nn.MultiheadAttention(32, 8, bias=bias, batch_first=True).double()
    stacked = [theirs.in_proj_weight, theirs.in_proj_bias] if bias else [theirs.in_proj_weight]
    with torch.no_grad():
        for parameter in stacked:
            nn.init.normal_(parameter, std=0.3)
            for start in (32, 64):  # key rows, then value rows
                part = parameter[start : start + 32].unflatten(0, (groups, -1, 4))
                part[:] = part[:, :1].clone()
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    ours = grouped(MultiHeadAttention.from_torch(theirs), groups)
    assert ours.key.out_features == ours.value.out_features == 4 * groups
    assert_close(ours(x), theirs(x, x, x)[0], rtol=1e-10, atol=1e-10)


def test_keys_are_the_mean_keys():
    """Projection is linear: what pooled weights make of x is the mean of the heads' own keys."""
    layer = MultiHeadAttention(24, 6, rotate=rotate_half_split).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    before, after = layer.project(x), grouped(layer, 2).project(x)
    assert torch.equal(before[0], after[0])
    for full, pooled in zip(before[1:], after[1:], strict=True):
        expected = torch.stack((full[:, :3].mean(1), full[:, 3:].mean(1)), 1)
        assert_close(pooled, expected, rtol=1e-10, atol=1e-10)


def test_grouped_twice_is_grouped_once_and_the_layer_stays():
    layer = MultiHeadAttention(24, 6, 6, attention=lambda *x, **o: -attention_naive(*x, **o))
    layer.double()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    twice, once = grouped(grouped(layer, 3), 1), grouped(layer, 1)
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    assert_close(twice(x), once(x), rtol=1e-10, atol=1e-10)
    assert_close(grouped(layer, 6)(x), layer(x), rtol=0, atol=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_uneven_heads_are_sentences():
    with pytest.raises(ValueError, match="3 heads cannot share 8 rows"):
        pool_heads(torch.randn(8, 2), 3, 1)
    for groups in (0, 3, 8):
        with pytest.raises(ValueError, match=f"4 heads cannot form {groups} groups"):
            pool_heads(torch.randn(8, 2), 4, groups)
    with pytest.raises(ValueError, match="2 heads cannot form 4 groups"):
        grouped(MultiHeadAttention(8, 4, 2), 4)
