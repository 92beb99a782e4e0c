"""The encoder-decoder, the transformer of 2017: one stack reads a text, another writes a second
text, and looks into the first at every layer.

    x = table[token] · sqrt(width) + position
    context = norm(encoder(x_source))                 every source token sees every other
    hidden = norm(decoder(x_target, context))         causal, with cross-attention to the context
    logits = hidden tableᵀ                            one table reads, writes and scores

The norm after each stack is torch's nn.Transformer's; the paper, whose blocks end in one, has none.

Paper   Vaswani et al. 2017, arXiv:1706.03762, section 3
Shapes  source [batch, source]    target [batch, target]    logits [batch, target, vocabulary]
Run     uv run python implementations/models/encoder_decoder.py
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from implementations.attention.multi_head import MultiHeadAttention
from implementations.attention.positions import LearnedPositions, sinusoidal_positions
from implementations.attention_basic import attention_naive
from implementations.layers.block import Block
from implementations.layers.dropout import Dropout
from implementations.layers.embeddings import Embedding
from implementations.layers.feed_forward import FeedForward
from implementations.layers.layer_norm import LayerNorm

Source, Target = Int[Tensor, "batch source"], Int[Tensor, "batch target"]
Context = Float[Tensor, "batch source width"]
SourceMask = Bool[Tensor, "batch source"] | None  # True at real tokens; None where all are
Logits = Float[Tensor, "batch target vocabulary"]


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """Sizes and style; the defaults are the base model of 2017 (table 3)."""

    vocabulary: int = 37000
    width: int = 512
    layers: int = 6  # of each stack
    heads: int = 8
    hidden: int = 2048  # inside the feed-forward layer
    norm_first: bool = False
    position: Literal["sinusoidal", "learned", "none"] = "sinusoidal"
    positions: int = 512  # rows of a learned table, the longest text; the others have no longest
    epsilon: float = 1e-5
    dropout: float = 0.0

    def make_norm(self) -> nn.Module:
        return LayerNorm(self.width, self.epsilon)


class EncoderDecoder(nn.Module):
    """Two stacks around one table of tokens. After `embed` it is torch's nn.Transformer."""

    def __init__(
        self, config: EncoderDecoderConfig, attention: Callable[..., Tensor] = attention_naive
    ):
        super().__init__()
        self.config, self.attention = config, attention
        self.embedding = Embedding(config.vocabulary, config.width)
        learned = config.position == "learned"
        self.positions = LearnedPositions(config.positions, config.width) if learned else None
        self.dropout = Dropout(config.dropout)
        layers = range(config.layers)
        self.encoder = nn.ModuleList(self.make_block() for _ in layers)
        self.decoder = nn.ModuleList(self.make_block(self.make_attention()) for _ in layers)
        self.encoder_norm, self.decoder_norm = config.make_norm(), config.make_norm()
        for parameter in (*self.encoder.parameters(), *self.decoder.parameters()):
            if parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
        # Embeddings have size one after the factor sqrt(width), and logits without it.
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)

    def make_attention(self) -> MultiHeadAttention:
        return MultiHeadAttention(self.config.width, self.config.heads, attention=self.attention)

    def make_block(self, cross_attention: MultiHeadAttention | None = None) -> Block:
        config, attention = self.config, self.make_attention()
        feed_forward = FeedForward(config.width, config.hidden, torch.relu)
        options = {"norm_first": config.norm_first, "dropout": config.dropout}
        options["cross_attention"] = cross_attention
        return Block(attention, feed_forward, config.make_norm, **options)

    def embed(self, tokens: Int[Tensor, "batch token"]) -> Float[Tensor, "batch token width"]:
        """Section 3.4's scaled embeddings, and positions; ValueError if learned ones run out."""
        x = self.embedding(tokens) * math.sqrt(self.config.width)
        if self.positions is not None:
            x = self.positions(x)
        elif self.config.position == "sinusoidal":
            x = x + sinusoidal_positions(*x.shape[1:], dtype=x.dtype).to(x.device)
        return self.dropout(x)

    def encode(self, source: Source, mask: SourceMask = None) -> Context:
        """What the source says, for the decoder to read."""
        x, keys = self.embed(source), as_keys(mask, source.shape)
        for block in self.encoder:
            x = block(x, mask=keys)
        return self.encoder_norm(x)

    def decode(self, target: Target, context: Context, mask: SourceMask = None) -> Logits:
        """`forward` for a source that is already encoded, with its errors."""
        if len(target) != len(context):
            raise ValueError(f"{len(target)} targets need as many sources, got {len(context)}")
        x, keys = self.embed(target), as_keys(mask, context.shape[:2])
        for block in self.decoder:
            x = block(x, context, causal=True, context_mask=keys)
        return self.embedding.logits(self.decoder_norm(x))

    def forward(self, source: Source, target: Target, mask: SourceMask = None) -> Logits:
        """Scores of the token after each target token.

        Padding at the end of a target needs no mask: no token sees what follows it.

        Raises:
            ValueError: more tokens than learned positions, not as many sources as targets, or a
                mask of another shape than the source's.
        """
        return self.decode(target, self.encode(source, mask), mask)

    @torch.no_grad()
    def translate(
        self, source: Source, start: int, stop: int, longest: int, mask: SourceMask = None
    ) -> list[list[int]]:
        """Greedy: from `start` on the likeliest token each time, until `stop` or `longest` tokens.

        Returns each text's tokens between the two. Call `eval()` first if there is dropout.

        Raises:
            ValueError: no token may be written, or `forward` would refuse.
        """
        if longest < 1:
            raise ValueError(f"a translation may have 1 token or more, got longest={longest}")
        context, written = self.encode(source, mask), torch.full_like(source[:, :1], start)
        while written.shape[1] <= longest and not (written[:, 1:] == stop).any(1).all():
            best = self.decode(written, context, mask)[:, -1].argmax(-1, keepdim=True)
            written = torch.cat((written, best), 1)
        rows = written[:, 1:].tolist()
        return [row[: row.index(stop)] if stop in row else row for row in rows]


def as_keys(mask: SourceMask, shape: Sequence[int]) -> Tensor | None:
    """The mask as attention reads it; ValueError unless it has the shape of the source."""
    if mask is not None and mask.shape != shape:
        raise ValueError(f"the source is {list(shape)}, its mask {list(mask.shape)}")
    return None if mask is None else rearrange(mask, "batch source -> batch 1 1 source")


def main() -> None:
    with torch.device("meta"):
        model = EncoderDecoder(EncoderDecoderConfig())
    parts = {"table": model.embedding, "encoder": model.encoder, "decoder": model.decoder}
    for name, part in {**parts, "base model of 2017": model}.items():
        count = sum(parameter.numel() for parameter in part.parameters())
        print(f"{name:18} {count:11,} parameters")


if __name__ == "__main__":
    main()
