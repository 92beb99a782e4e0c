"""A decoder of Llama's style as a model of transformers: the peer of tests and of speed records.

The same sizes, the same weights under their published names, torch's attention kernel.

Run     uv run python implementations/models/llama_in_transformers.py
"""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from implementations.models.decoder import LLAMA_NAMES, Decoder, DecoderConfig
from implementations.models.parameter_names import to_published


def llama_config(config: DecoderConfig, **more: Any) -> LlamaConfig:
    """The same sizes in transformers' words. No token pads, begins or ends a text.

    Args:
        more: settings of theirs, which come before these.

    Raises:
        ValueError: the decoder is not of Llama's style.
    """
    config.require_llama()
    same = {
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads or config.heads,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.positions,
        "rms_norm_eps": config.epsilon,
        "rope_theta": config.rotary_base,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "tie_word_embeddings": config.tied,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaConfig(**same | more)


def llama_in_transformers(decoder: Decoder) -> LlamaForCausalLM:
    """The same model with copies of its weights, in their dtype and on their device. No token ends
    its texts.

    Raises:
        ValueError: the decoder is not of Llama's style.
    """
    config, weight = decoder.config, decoder.embedding.weight
    theirs = LlamaForCausalLM(llama_config(config, attn_implementation="sdpa"))
    theirs = theirs.to(weight.device, weight.dtype)
    state = {name: tensor.contiguous() for name, tensor in decoder.state_dict().items()}
    missing, foreign = theirs.load_state_dict(to_published(state, LLAMA_NAMES), strict=False)
    assert foreign == [] and missing == (["lm_head.weight"] if config.tied else [])
    theirs.tie_weights()
    return theirs.eval()


@torch.no_grad()
def main() -> None:
    from dataclasses import replace

    from implementations.models.decoder import SMOLLM2

    torch.manual_seed(0)
    decoder = Decoder(replace(SMOLLM2, layers=2)).eval()
    tokens = torch.randint(SMOLLM2.vocabulary, (1, 64))
    apart = (decoder(tokens) - llama_in_transformers(decoder)(tokens).logits).abs().max()
    print(f"two layers of SmolLM2's shape: largest difference of a logit {apart:.1e}")


if __name__ == "__main__":
    main()
