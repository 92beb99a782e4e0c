"""The table turns as `rotate_half_split` does, bit by bit, and refuses what it does not hold."""

import pytest
import torch

from implementations.attention.positions import rotate_half_split
from implementations.attention.rotary_table import RotaryTable
from implementations.attention.vendor import attention_sdpa
from implementations.models.decoder import Decoder, DecoderConfig


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [2, 16, 64])
def test_the_same_bits(dtype, dim):
    table = RotaryTable(300, dim, 500.0, torch.promote_types(dtype, torch.float32))
    x = torch.randn(2, 3, 7, dim, dtype=dtype)
    for positions in (None, torch.tensor([299, 0, 5, 5, 17, 256, 3])):
        turned = table(x, positions)
        assert turned.dtype == dtype and turned.equal(rotate_half_split(x, positions, 500.0))
    assert not turned.equal(rotate_half_split(x, positions + 1, 500.0))


@torch.no_grad()
def test_a_decoder_writes_the_same_logits_over_its_cache():
    config = DecoderConfig(29, 16, 2, 4, 24, positions=40, key_value_heads=2, rotary_base=300.0)
    plain, table = Decoder(config, attention_sdpa), RotaryTable(40, 4, 300.0)
    turned = Decoder(config, attention_sdpa, rotate=table)
    turned.load_state_dict(plain.state_dict())
    tokens = torch.randint(29, (2, 40))
    caches = plain.empty_cache(2, 40), turned.empty_cache(2, 40)
    for piece in tokens.split([30] + [1] * 10, 1):
        pair = zip((plain, turned), caches, strict=True)
        ours, theirs = (decoder(piece, cache) for decoder, cache in pair)
        assert ours.equal(theirs)


def test_the_table_stands_where_the_heads_are():
    table, x = RotaryTable(8, 4, device="meta"), torch.randn(3, 4, device="meta")
    assert table(x, torch.arange(3, device="meta")).is_meta


def test_what_the_table_does_not_hold(unchecked):
    table, x = RotaryTable(8, 4), torch.randn(3, 4)
    for given, sentence in (
        ((x, None, 500.0), "of base 10000.0, asked for 500.0"),
        ((torch.randn(3, 6),), "heads of dim 4, got 6"),
        ((x.double(),), "float32, got torch.float64"),
        ((torch.randn(9, 4),), "9 tokens got 9 of the table's 8"),
        ((x, torch.arange(2)), "3 tokens got 2 of"),
    ):
        with pytest.raises(ValueError, match=sentence):
            table(*given)
    with pytest.raises(IndexError):
        table(x, torch.tensor([0, 1, 8]))
