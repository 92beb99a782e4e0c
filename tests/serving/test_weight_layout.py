"""Another order in memory, the same decoder."""

import torch
from torch.testing import assert_close

from implementations.models.decoder import Decoder, DecoderConfig
from implementations.serving.weight_layout import column_major, store_for_decoding

CONFIG = DecoderConfig(
    vocabulary=97, width=32, layers=2, heads=4, hidden=80, positions=64, key_value_heads=2
)


def test_columns_are_contiguous_and_the_matrix_is_the_same():
    weight = torch.randn(5, 3)
    assert torch.equal(column_major(weight), weight)
    assert column_major(weight).stride() == (1, 5)


@torch.no_grad()
def test_a_decoder_stays_the_same_and_its_wide_weights_are_stored_by_column(tmp_path):
    decoder = Decoder(CONFIG).double().eval()
    tokens = torch.randint(97, (2, 9))
    before, state = decoder(tokens), {k: v.clone() for k, v in decoder.state_dict().items()}
    store_for_decoding(decoder)
    assert_close(decoder(tokens), before, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(value, state[name]) for name, value in decoder.state_dict().items())
    strides = {name: tuple(p.stride()) for name, p in decoder.named_parameters() if p.ndim == 2}
    assert strides["embedding.weight"] == (1, 97)
    assert strides["blocks.1.feed_forward.expand.weight"] == (1, 80)
    assert strides["blocks.1.attention.query.weight"] == (1, 32)
    assert strides["blocks.1.attention.key.weight"] == (32, 1)  # fewer outputs than inputs
    assert strides["blocks.0.feed_forward.contract.weight"] == (80, 1)
    decoder.save(tmp_path / "saved.safetensors")
    loaded = Decoder.load(tmp_path / "saved.safetensors", CONFIG)
    assert_close(loaded(tokens), before, rtol=1e-10, atol=1e-10)
