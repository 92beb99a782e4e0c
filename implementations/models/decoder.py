"""The decoder: causal blocks that score the next token. GPT-2 and Llama are settings of it.

    h_0 = table[token] (+ learned positions);   h_i = block_i(h_{i-1});   logits = norm(h) tableᵀ

    GPT-2   LayerNorm, learned positions, GELU by tanh, biases
    Llama   RMSNorm, rotary positions (half split), SwiGLU, no biases, key heads shared by groups

Paper   Radford et al. 2019 (GPT-2); Touvron et al. 2023, arXiv:2302.13971 (Llama)
Shapes  tokens [batch, token]    logits [batch, token, vocabulary]
Run     uv run python implementations/models/decoder.py
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from implementations.attention.multi_head import MultiHeadAttention
from implementations.attention.positions import (
    LearnedPositions,
    convert_projection,
    interleaved_to_half_split,
    rotate_half_split,
)
from implementations.attention_basic import attention_naive
from implementations.lab.files import write_atomically
from implementations.layers.block import Block
from implementations.layers.dropout import Dropout
from implementations.layers.embeddings import Embedding
from implementations.layers.feed_forward import FeedForward, SwiGLU, gelu_tanh
from implementations.layers.layer_norm import LayerNorm
from implementations.layers.rms_norm import RMSNorm
from implementations.models.parameter_names import from_published, to_published
from implementations.serving.kv_cache import KeyValueCache
from implementations.sources.weights import smollm2_weights

LLAMA_NAMES = {
    "embedding": "model.embed_tokens",
    "blocks.{layer}.attention_norm": "model.layers.{layer}.input_layernorm",
    "blocks.{layer}.attention.query": "model.layers.{layer}.self_attn.q_proj",
    "blocks.{layer}.attention.key": "model.layers.{layer}.self_attn.k_proj",
    "blocks.{layer}.attention.value": "model.layers.{layer}.self_attn.v_proj",
    "blocks.{layer}.attention.output": "model.layers.{layer}.self_attn.o_proj",
    "blocks.{layer}.feed_forward_norm": "model.layers.{layer}.post_attention_layernorm",
    "blocks.{layer}.feed_forward.gate": "model.layers.{layer}.mlp.gate_proj",
    "blocks.{layer}.feed_forward.expand": "model.layers.{layer}.mlp.up_proj",
    "blocks.{layer}.feed_forward.contract": "model.layers.{layer}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
GGUF_NAMES = {
    "embedding": "token_embd",
    "blocks.{layer}.attention_norm": "blk.{layer}.attn_norm",
    "blocks.{layer}.attention.query": "blk.{layer}.attn_q",
    "blocks.{layer}.attention.key": "blk.{layer}.attn_k",
    "blocks.{layer}.attention.value": "blk.{layer}.attn_v",
    "blocks.{layer}.attention.output": "blk.{layer}.attn_output",
    "blocks.{layer}.feed_forward_norm": "blk.{layer}.ffn_norm",
    "blocks.{layer}.feed_forward.gate": "blk.{layer}.ffn_gate",
    "blocks.{layer}.feed_forward.expand": "blk.{layer}.ffn_up",
    "blocks.{layer}.feed_forward.contract": "blk.{layer}.ffn_down",
    "norm": "output_norm",
}


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and style of a decoder; the defaults are Llama's style."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    hidden: int  # inside the feed-forward layer
    positions: int  # longest text, in tokens
    key_value_heads: int | None = None  # as many as heads unless given
    norm: Literal["rms", "layer"] = "rms"
    position: Literal["rotary", "learned", "none"] = "rotary"
    feed_forward: Literal["swiglu", "gelu"] = "swiglu"
    bias: bool = False
    tied: bool = True  # the embedding table scores the next token
    epsilon: float = 1e-5
    rotary_base: float = 10000.0
    dropout: float = 0.0

    def require_llama(self) -> None:
        """Refuse what was made for Llama alone: its kernels, its names, its peers.

        Raises:
            ValueError: the style is another one.
        """
        style = (self.norm, self.position, self.feed_forward)
        if style != ("rms", "rotary", "swiglu"):
            given = ", ".join(style)
            raise ValueError(f"Llama's style is rms, rotary, swiglu, the decoder's {given}")

    def make_norm(self, norm: Callable[..., Tensor] | None = None) -> nn.Module:
        """The layer, around another function than the equation if one is given."""
        layer = partial(RMSNorm if self.norm == "rms" else LayerNorm, self.width, self.epsilon)
        return layer() if norm is None else layer(norm=norm)

    def make_feed_forward(self, gated: Callable[..., Tensor] | None = None) -> nn.Module:
        if self.feed_forward == "swiglu":
            # Torch's silu is one pass over the wide space, ours two: 2% of SmolLM2's forward pass.
            silu = nn.functional.silu
            return SwiGLU(self.width, self.hidden, silu, bias=self.bias, gated=gated)
        return FeedForward(self.width, self.hidden, gelu_tanh, bias=self.bias)


SMOLLM2 = DecoderConfig(
    vocabulary=49152,
    width=576,
    layers=30,
    heads=9,
    hidden=1536,
    positions=8192,
    key_value_heads=3,
    rotary_base=1e5,
)
GPT2 = DecoderConfig(
    vocabulary=50257,
    width=768,
    layers=12,
    heads=12,
    hidden=3072,
    positions=1024,
    norm="layer",
    position="learned",
    feed_forward="gelu",
    bias=True,
)


class Decoder(nn.Module):
    """A causal language model around any functions with the signatures of the equations.

    Args:
        attention: in place of `attention_naive`.
        norm: in place of `rms_norm_naive` or `layer_norm_naive`, whichever the config asks for.
        rotate: in place of `rotate_half_split`.
        gated: in place of the two operations of SwiGLU's bend, as `swiglu_naive`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        attention: Callable[..., Tensor] = attention_naive,
        *,
        norm: Callable[..., Tensor] | None = None,
        rotate: Callable[..., Tensor] = rotate_half_split,
        gated: Callable[..., Tensor] | None = None,
    ):
        super().__init__()
        self.config = config
        make_norm = partial(config.make_norm, norm)
        rotated = partial(rotate, base=config.rotary_base)
        self.embedding = Embedding(config.vocabulary, config.width)
        learned = config.position == "learned"
        self.positions = LearnedPositions(config.positions, config.width) if learned else None
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            self.make_block(attention, make_norm, rotated, gated) for _ in range(config.layers)
        )
        self.norm = make_norm()
        self.head = None if config.tied else nn.Linear(config.width, config.vocabulary, bias=False)
        if not self.embedding.weight.is_meta:
            self.initialize()

    def make_block(
        self,
        attention: Callable[..., Tensor],
        make_norm: Callable[[], nn.Module],
        rotate: Callable[[Tensor], Tensor],
        gated: Callable[..., Tensor] | None,
    ) -> Block:
        config = self.config
        return Block(
            MultiHeadAttention(
                config.width,
                config.heads,
                config.key_value_heads,
                bias=config.bias,
                attention=attention,
                rotate=rotate if config.position == "rotary" else None,
            ),
            config.make_feed_forward(gated),
            make_norm,
            dropout=config.dropout,
        )

    def initialize(self) -> None:
        """GPT-2's start: N(0, 0.02²), and what enters the stream smaller by sqrt(2 · layers)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim >= 2:
                enters = name.endswith(("attention.output.weight", "feed_forward.contract.weight"))
                scale = math.sqrt(2 * self.config.layers) if enters else 1
                nn.init.normal_(parameter, std=0.02 / scale)

    def forward(
        self, tokens: Int[Tensor, "batch token"], cache: KeyValueCache | None = None
    ) -> Float[Tensor, "batch token vocabulary"]:
        """Scores of the next token after each token.

        With a cache, `tokens` continue the text that it holds, and are added to it.

        Raises:
            ValueError: the text is longer than the model's positions or than the cache, or the
                cache has another size than the model.
        """
        return self.logits(self.hidden(tokens, cache))

    def logits(self, hidden: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch vocabulary"]:
        """Scores of the next token from last hidden states."""
        return self.embedding.logits(hidden) if self.head is None else self.head(hidden)

    def hidden(
        self, tokens: Int[Tensor, "batch token"], cache: KeyValueCache | None = None
    ) -> Float[Tensor, "batch token width"]:
        """The last hidden states, normalised: what the logits are read from."""
        start = 0 if cache is None else cache.length
        longest, length = self.config.positions, start + tokens.shape[1]
        if length > longest:
            raise ValueError(f"the model reads at most {longest} tokens, got {length}")
        if cache is not None and len(cache.layers) != len(self.blocks):
            layers = f"{len(cache.layers)} layers, the model {len(self.blocks)}"
            raise ValueError(f"the cache has {layers}")
        x = self.embedding(tokens)
        x = self.dropout(x if self.positions is None else self.positions(x, start))
        for i, block in enumerate(self.blocks):
            cached = {} if cache is None else {"cache": cache.layers[i]}
            x = block(x, causal=True, **cached)
        return self.norm(x)

    def empty_cache(self, batch: int, capacity: int) -> KeyValueCache:
        """Room for the keys and values of `batch` texts of `capacity` tokens, as the weights are.

        Raises:
            ValueError: a size is below 1.
        """
        config, weight = self.config, self.embedding.weight
        return KeyValueCache.empty(
            config.layers,
            batch,
            config.key_value_heads or config.heads,
            capacity,
            config.width // config.heads,
            dtype=weight.dtype,
            device=weight.device,
        )

    @classmethod
    def from_smollm2(
        cls, attention: Callable[..., Tensor] = attention_naive, **parts: Callable[..., Tensor]
    ) -> "Decoder":
        """SmolLM2-135M-Instruct from its packaged 4-bit file, in float32. Apache-2.0.

        `parts` are other functions, as the class takes them.

        The file keeps queries and keys in the interleaved rotary layout; they are reordered for the
        half-split one. Read without that, the model still writes words, and loses the thread.
        """
        with torch.device("meta"):
            decoder = cls(SMOLLM2, attention, **parts)
        weights = from_published(smollm2_weights(), decoder.state_dict(), GGUF_NAMES)
        heads = {"query": SMOLLM2.heads, "key": SMOLLM2.key_value_heads}
        for name in weights:
            part = name.split(".")[-2]
            if part in heads:
                convert = interleaved_to_half_split
                weights[name] = convert_projection(weights[name], heads[part], convert)
        decoder.load_state_dict(weights, strict=True, assign=True)
        return decoder.eval()

    def save(self, path: Path) -> None:
        """Write the weights as safetensors, whole or not at all, under Hugging Face's Llama names.

        Raises:
            ValueError: the decoder is not of Llama's style, so that nobody else could read it.
        """
        self.config.require_llama()
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        write_atomically(path, safetensors.torch.save(to_published(state, LLAMA_NAMES)))

    @classmethod
    def load(
        cls,
        path: Path,
        config: DecoderConfig,
        attention: Callable[..., Tensor] = attention_naive,
    ) -> "Decoder":
        """A decoder with the weights that `save`, or a Llama of that size, wrote.

        Raises:
            RuntimeError: the file's names or shapes are not those of `config`.
        """
        with torch.device("meta"):
            decoder = cls(config, attention)
        weights = safetensors.torch.load_file(path)
        state = from_published(weights, decoder.state_dict(), LLAMA_NAMES)
        decoder.load_state_dict(state, strict=True, assign=True)
        return decoder.eval()


def main() -> None:
    from implementations.sources.weights import smollm2_tokenizer

    decoder, tokenizer = Decoder.from_smollm2(), smollm2_tokenizer()
    prompt = "The capital of France is"
    with torch.no_grad():
        logits = decoder(torch.tensor([tokenizer.encode(prompt).ids]))[0, -1]
    best = logits.softmax(-1).topk(5)
    print(prompt)
    for probability, token in zip(*best, strict=True):
        print(f"  {probability:.3f}  {tokenizer.decode([token.item()])!r}")


if __name__ == "__main__":
    main()
