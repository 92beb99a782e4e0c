"""The tied table, in and out, against torch."""

import pytest
import torch
from torch import nn

from implementations.lab.compare import assert_same_function
from implementations.layers.embeddings import Embedding


def test_in_and_out_equal_torchs_embedding_and_linear():
    ours, theirs = Embedding(11, 8).double(), nn.Embedding(11, 8).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    tokens = torch.randint(11, (2, 5))
    assert torch.equal(ours(tokens), theirs(tokens))
    hidden = torch.randn(2, 5, 8, dtype=torch.float64)
    linear = nn.Linear(8, 11, bias=False).double()
    linear.weight = nn.Parameter(theirs.weight.detach())
    assert_same_function(ours.logits, linear.forward, hidden)


def test_one_table_gets_both_gradients():
    """Its gradient is the sum of what comes through the lookup and through the scores."""
    table = Embedding(5, 4).double()
    tokens = torch.tensor([[1, 3]])
    upstream = torch.randn(1, 2, 5, dtype=torch.float64)
    both = torch.autograd.grad(table.logits(table(tokens)), table.weight, upstream)[0]
    rows = table.weight.detach()[tokens[0]]
    through_scores = upstream[0].T @ rows
    through_lookup = torch.zeros(5, 4, dtype=torch.float64)
    through_lookup[tokens[0]] = upstream[0] @ table.weight.detach()
    torch.testing.assert_close(both, through_scores + through_lookup)


@pytest.mark.parametrize("token", [-1, 11])
def test_a_token_outside_the_table_is_an_error(token):
    with pytest.raises(IndexError):
        Embedding(11, 8)(torch.tensor([[token]]))
