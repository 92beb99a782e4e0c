"""The decoder around this repository's kernels, for a GPU.

    RMSNorm, rotary positions and SwiGLU's bend are one launch each.

Naive   decoder.py, the same parts as equations
Run     uv run python implementations/models/decoder_triton.py
"""

import os
from collections.abc import Callable

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated

from torch import Tensor

from implementations.attention.positions_triton import rotate_half_split_triton
from implementations.attention_basic import attention_naive
from implementations.layers.feed_forward_triton import swiglu_triton
from implementations.layers.rms_norm_triton import rms_norm_triton
from implementations.models.decoder import Decoder, DecoderConfig


def decoder_triton(
    config: DecoderConfig, attention: Callable[..., Tensor] = attention_naive
) -> Decoder:
    """A decoder of Llama's style, on the default device, with new weights.

    Raises:
        ValueError: it is not of Llama's style.
    """
    check_style(config)
    kernels = {"norm": rms_norm_triton, "rotate": rotate_half_split_triton, "gated": swiglu_triton}
    return Decoder(config, attention, **kernels)


def check_style(config: DecoderConfig) -> None:
    """Raise ValueError unless the decoder is of Llama's style."""
    if (config.norm, config.position, config.feed_forward) != ("rms", "rotary", "swiglu"):
        given = f"{config.norm}, {config.position}, {config.feed_forward}"
        raise ValueError(f"the kernels are for rms, rotary, swiglu, the decoder asks for {given}")


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = DecoderConfig(97, 32, 2, 4, 80, positions=64, key_value_heads=2)
    fast, naive = decoder_triton(config).to(device), Decoder(config).to(device)
    naive.load_state_dict(fast.state_dict())
    tokens = torch.randint(97, (2, 20), device=device)
    apart = (fast(tokens) - naive(tokens)).abs().max()
    print(f"two layers on {device}: largest difference of a logit from the equations' {apart:.1e}")


if __name__ == "__main__":
    main()
