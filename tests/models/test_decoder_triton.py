"""The decoder around kernels against the decoder around equations."""

import pytest
import torch

from implementations.models.decoder import GPT2, Decoder, DecoderConfig
from implementations.models.decoder_triton import decoder_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@torch.no_grad()
def test_the_same_logits():
    """Float64, so that only the order of sums differs; positions after a cache too."""
    config = DecoderConfig(29, 16, 2, 4, 24, positions=40, key_value_heads=2, rotary_base=300.0)
    fast = decoder_triton(config).double().to(DEVICE)
    naive = Decoder(config).double().to(DEVICE)
    for parameter in fast.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    naive.load_state_dict(fast.state_dict())
    tokens = torch.randint(29, (2, 9), device=DEVICE)
    cache = fast.empty_cache(2, 9)
    pieces = [fast(piece, cache) for piece in tokens.split([6, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), naive(tokens), rtol=1e-10, atol=1e-10)


def test_another_style_is_refused():
    with torch.device("meta"), pytest.raises(ValueError, match="rms, rotary, swiglu"):
        decoder_triton(GPT2)
