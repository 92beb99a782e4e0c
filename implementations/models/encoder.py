"""The encoder: a stack of blocks in which every token sees every other. BERT, and MiniLM's real
weights.

    h_0 = norm(word + position + type)
    h_i = block_i(h_{i-1}), norm last
    sentence = mean of the last h over the text's tokens, scaled to length one

Paper   Devlin et al. 2018, arXiv:1810.04805; sentence embeddings: Reimers & Gurevych 2019,
        arXiv:1908.10084
Shapes  tokens [batch, token]    hidden [batch, token, width]
Run     uv run python implementations/models/encoder.py
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer
from torch import Tensor, nn

from implementations.attention.multi_head import MultiHeadAttention
from implementations.attention_basic import attention_naive
from implementations.layers.block import Block
from implementations.layers.feed_forward import FeedForward
from implementations.layers.layer_norm import LayerNorm
from implementations.models.parameter_names import from_published
from implementations.sources.weights import minilm_tokenizer, minilm_weights

BERT_NAMES = {
    "embeddings": "embeddings",
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "blocks.{layer}.attention.query": "encoder.layer.{layer}.attention.self.query",
    "blocks.{layer}.attention.key": "encoder.layer.{layer}.attention.self.key",
    "blocks.{layer}.attention.value": "encoder.layer.{layer}.attention.self.value",
    "blocks.{layer}.attention.output": "encoder.layer.{layer}.attention.output.dense",
    "blocks.{layer}.attention_norm": "encoder.layer.{layer}.attention.output.LayerNorm",
    "blocks.{layer}.feed_forward.expand": "encoder.layer.{layer}.intermediate.dense",
    "blocks.{layer}.feed_forward.contract": "encoder.layer.{layer}.output.dense",
    "blocks.{layer}.feed_forward_norm": "encoder.layer.{layer}.output.LayerNorm",
    "pooler": "pooler.dense",
}


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of an encoder; the defaults are MiniLM's."""

    vocabulary: int = 30522
    width: int = 384
    layers: int = 6
    heads: int = 12
    hidden: int = 1536  # inside the feed-forward layer
    positions: int = 512  # longest text, in tokens
    token_types: int = 2  # first or second text of a pair
    epsilon: float = 1e-12

    def check_layer_and_head(self, layer: int, head: int) -> None:
        """Raises ValueError, with the range, for a layer or head that does not exist."""
        for name, number, count in (("layer", layer, self.layers), ("head", head, self.heads)):
            if not 0 <= number < count:
                raise ValueError(f"the model has {name}s 0 to {count - 1}, got {name} {number}")


class Embeddings(nn.Module):
    """What a token is, where it stands and which text it belongs to, added and normalised."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.word = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.positions, config.width)
        self.token_type = nn.Embedding(config.token_types, config.width)
        self.norm = LayerNorm(config.width, config.epsilon)
        self.register_buffer("position_ids", torch.arange(config.positions)[None])

    def forward(
        self, tokens: Int[Tensor, "batch token"], token_types: Int[Tensor, "batch token"] | None
    ) -> Float[Tensor, "batch token width"]:
        longest = self.position.num_embeddings
        if tokens.shape[1] > longest:
            raise ValueError(f"the model reads at most {longest} tokens, got {tokens.shape[1]}")
        position = self.position(self.position_ids[:, : tokens.shape[1]])
        token_types = torch.zeros_like(tokens) if token_types is None else token_types
        return self.norm(self.word(tokens) + position + self.token_type(token_types))


class Encoder(nn.Module):
    """A BERT-class encoder."""

    def __init__(self, config: EncoderConfig, attention: Callable[..., Tensor] = attention_naive):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.blocks = nn.ModuleList(
            Block(
                MultiHeadAttention(config.width, config.heads, attention=attention),
                FeedForward(config.width, config.hidden),
                lambda: LayerNorm(config.width, config.epsilon),
                norm_first=False,
            )
            for _ in range(config.layers)
        )
        self.pooler = nn.Linear(config.width, config.width)

    @classmethod
    def from_minilm(cls) -> "Encoder":
        """MiniLM's published weights; every one of the 104 tensors is used."""
        encoder = cls(EncoderConfig())
        weights = from_published(minilm_weights(), encoder.state_dict(), BERT_NAMES)
        encoder.load_state_dict(weights, strict=True)
        return encoder.eval()

    def hidden_states(
        self,
        tokens: Int[Tensor, "batch token"],
        mask: Bool[Tensor, "batch token"] | None = None,
        token_types: Int[Tensor, "batch token"] | None = None,
    ) -> list[Float[Tensor, "batch token width"]]:
        """The embeddings, then what each block makes of them: layers + 1 tensors.

        Args:
            mask: True at real tokens, False at padding, which nobody attends to.

        Raises:
            ValueError: more tokens than the model has positions.
        """
        hidden = [self.embeddings(tokens, token_types)]
        keys = None if mask is None else rearrange(mask, "batch key -> batch 1 1 key")
        for block in self.blocks:
            hidden.append(block(hidden[-1], mask=keys))
        return hidden

    def forward(
        self,
        tokens: Int[Tensor, "batch token"],
        mask: Bool[Tensor, "batch token"] | None = None,
        token_types: Int[Tensor, "batch token"] | None = None,
    ) -> Float[Tensor, "batch token width"]:
        """The last hidden states."""
        return self.hidden_states(tokens, mask, token_types)[-1]

    def pooled(self, hidden: Float[Tensor, "batch token width"]) -> Float[Tensor, "batch width"]:
        """BERT's summary of a text: tanh of a projection of its first token, [CLS]."""
        return torch.tanh(self.pooler(hidden[:, 0]))

    def embed(self, texts: Sequence[str], tokenizer: Tokenizer) -> Float[Tensor, "text width"]:
        """Sentence embeddings: each text's mean last hidden state, scaled to length one."""
        tokens, mask = pad([tokenizer.encode(text).ids for text in texts])
        device = self.pooler.weight.device
        with torch.no_grad():
            hidden = self(tokens.to(device), mask.to(device))
        count = mask.to(hidden).sum(1, keepdim=True)
        mean = (hidden * mask.to(hidden)[..., None]).sum(1) / count
        return nn.functional.normalize(mean, dim=-1)


def pad(
    texts: Sequence[Sequence[int]], padding: int = 0
) -> tuple[Int[Tensor, "text token"], Bool[Tensor, "text token"]]:
    """Token lists of different lengths as one rectangle, and where it is real.

    Raises:
        ValueError: there is no text at all.
    """
    if not texts:
        raise ValueError("give at least one text")
    rows = [torch.tensor(text, dtype=torch.long) for text in texts]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
    lengths = torch.tensor([len(text) for text in texts])
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


def main() -> None:
    encoder, tokenizer = Encoder.from_minilm(), minilm_tokenizer()
    texts = ["cat", "kitten", "dog", "stock prices fell on Monday"]
    similarity = encoder.embed(texts, tokenizer) @ encoder.embed(["cat"], tokenizer).T
    for text, cosine in zip(texts, similarity.flatten().tolist(), strict=True):
        print(f"  cosine with 'cat'  {cosine:5.2f}  {text}")


if __name__ == "__main__":
    main()
