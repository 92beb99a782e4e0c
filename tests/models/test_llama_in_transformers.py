"""The peer of the speed records computes what our decoder computes."""

from dataclasses import replace

import pytest
import torch

from implementations.models.decoder import GPT2, Decoder, DecoderConfig
from implementations.models.llama_in_transformers import llama_in_transformers

SMALL = DecoderConfig(
    vocabulary=97, width=32, layers=2, heads=4, hidden=80, positions=64, key_value_heads=2
)


@torch.no_grad()
@pytest.mark.parametrize(
    "changed", [{}, {"tied": False, "key_value_heads": None}, {"bias": True, "rotary_base": 500.0}]
)
def test_the_same_logits(changed):
    decoder = Decoder(replace(SMALL, **changed)).double().eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs, tokens = llama_in_transformers(decoder), torch.randint(97, (2, 63))
    # transformers computes rotary angles in float32: 2e-7 in the angle at position 63.
    expected = theirs(tokens).logits
    assert expected.dtype == torch.float64
    assert (decoder(tokens) - expected).abs().max() < 2e-5 * expected.abs().max()
    if changed == {}:  # no token ends a text before its time, and ours stay ours
        count = {"max_new_tokens": 8, "attention_mask": torch.ones_like(tokens)}
        assert theirs.generate(tokens, do_sample=False, **count).shape == (2, 71)
        theirs.lm_head.weight.zero_()
        assert decoder.embedding.weight.all()


def test_another_style_is_refused():
    with torch.device("meta"), pytest.raises(ValueError, match="rms, rotary, swiglu"):
        llama_in_transformers(Decoder(GPT2))
