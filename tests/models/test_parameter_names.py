"""Names go both ways."""

import pytest
import torch

from implementations.models.encoder import BERT_NAMES, Encoder, EncoderConfig
from implementations.models.parameter_names import from_published, published_name, to_published


def test_names_by_hand():
    expected = "encoder.layer.11.attention.self.query.bias"
    assert published_name("blocks.11.attention.query.bias", BERT_NAMES) == expected
    assert published_name("pooler.weight", BERT_NAMES) == "pooler.dense.weight"


def test_there_and_back_is_the_same():
    config = EncoderConfig(vocabulary=11, width=8, layers=12, heads=2, hidden=16, positions=5)
    state = Encoder(config).state_dict()
    back = from_published(to_published(state, BERT_NAMES), state, BERT_NAMES)
    assert list(back) == list(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_an_unknown_weight_keeps_its_name():
    """So that a strict load names it."""
    weights = {"lm_head.weight": torch.zeros(1)}
    assert from_published(weights, ["pooler.weight"], BERT_NAMES) == weights
    with pytest.raises(KeyError):
        published_name("head.weight", BERT_NAMES)
