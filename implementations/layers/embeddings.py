"""Embeddings: a token's number picks a row of a table; tied, the same table scores the next token.

    vector = table[token]                   in
    logits = hidden tableᵀ                  out: how much a state looks like each vector

Tying saves vocabulary · width parameters: 21% of SmolLM2-135M, 31% of GPT-2.

Paper   Press & Wolf 2017, arXiv:1608.05859
Shapes  tokens [..., token]    hidden [..., width]    logits [..., vocabulary]
Run     uv run python implementations/layers/embeddings.py
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Embedding(nn.Module):
    """A table of vectors, one a token; the parameter is torch's `weight`."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        weight = torch.empty(vocabulary, width)
        # GPT-2's scale. On the meta device nothing is filled: trying costs 3 s of torch's imports.
        self.weight = nn.Parameter(weight if weight.is_meta else weight.normal_(std=0.02))

    def forward(self, tokens: Int[Tensor, "*batch token"]) -> Float[Tensor, "*batch token width"]:
        """The rows of the tokens; IndexError for a token that the table does not have."""
        return nn.functional.embedding(tokens, self.weight)

    def logits(self, hidden: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch vocabulary"]:
        """The scores of all tokens by the same table."""
        return nn.functional.linear(hidden, self.weight)


def main() -> None:
    torch.manual_seed(0)
    table = Embedding(49152, 576)
    tokens = torch.randint(49152, (1000,))
    right = (table.logits(table(tokens)).argmax(-1) == tokens).double().mean()
    print(f"a random table of {table.weight.numel():,} numbers recognizes {right:.1%} of its rows")


if __name__ == "__main__":
    main()
