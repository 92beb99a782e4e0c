"""Recall at k: scikit-learn's top-k accuracy, a table by hand, ties against the query."""

import pytest
import torch
from sklearn.metrics import top_k_accuracy_score

from implementations.contrastive.retrieval import ranks, recall, recalls_both_ways

TABLE = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.7, 0.1], [0.3, 0.4, 0.2]])


def test_ranks_by_hand():
    """Row 0 finds its own first, row 1 second, row 2 last; by column: 1, 1 and 1 (a tie: 2)."""
    assert ranks(TABLE).tolist() == [1, 2, 3]
    assert ranks(TABLE.T).tolist() == [1, 1, 2]
    assert ranks(TABLE, torch.tensor([2, 0, 1])).tolist() == [2, 1, 1]


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recall_is_scikit_learns_top_k_accuracy(k):
    scores = torch.randn(40, 40) + torch.eye(40)
    theirs = top_k_accuracy_score(range(40), scores.numpy(), k=k, labels=range(40))
    assert recall(ranks(scores), k) == theirs


def test_both_ways_are_rows_and_columns():
    found = recalls_both_ways(TABLE, at=(1, 2))
    assert list(found) == [
        "image to text @1",
        "image to text @2",
        "text to image @1",
        "text to image @2",
    ]
    assert list(found.values()) == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1])


def test_embeddings_that_are_all_alike_retrieve_nothing():
    assert recall(ranks(torch.zeros(50, 50)), 10) == 0


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: ranks(torch.zeros(3, 2)), "each of 3 queries needs one of 2 candidates"),
        (lambda: ranks(torch.zeros(3, 3), torch.tensor([0, 1])), "each of 3 queries"),
        (lambda: ranks(torch.zeros(2, 2), torch.tensor([0, -1])), "each of 2 queries"),
        (lambda: ranks(torch.full((2, 2), torch.nan)), "a score is NaN"),
        (lambda: recall(torch.tensor([1]), 0), "k >= 1"),
        (lambda: recall(torch.tensor([], dtype=torch.long), 1), "0 queries"),
    ],
)
def test_bad_input(call, sentence, unchecked):
    with pytest.raises(ValueError, match=sentence):
        call()
