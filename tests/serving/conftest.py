"""A decoder small enough for thousands of passes, whose texts do not fall into a loop at once."""

import pytest
import torch

from implementations.models.decoder import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocabulary=29, width=16, layers=2, heads=4, hidden=24, positions=64, key_value_heads=2
)


@pytest.fixture
def tiny() -> Decoder:
    """Two layers in float64, wide awake: its logits spread over several nats."""
    decoder = Decoder(CONFIG).double().eval()
    for parameter in decoder.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return decoder
