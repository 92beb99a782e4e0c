"""Batches without false negatives: families never meet, all come equally often, by step alone."""

import pytest
import torch
from scipy.stats import chisquare

from implementations.contrastive.distinct import DistinctRows

FAMILIES = torch.tensor([4, 0, 4, 1, 2, 3, 0, 4, 9, 8])  # 4 three times, 0 twice, the others once


def test_no_family_meets_itself():
    rows = DistinctRows(FAMILIES, batch=5)
    for step in range(50):
        assert len(FAMILIES[rows(step)].unique()) == 5


def test_an_epoch_shows_every_family_once():
    """Seven families in batches of 3: two batches an epoch, and one family left out of each."""
    rows = DistinctRows(FAMILIES, batch=3)
    for epoch in range(20):
        shown = torch.cat([rows(2 * epoch), rows(2 * epoch + 1)])
        assert len(FAMILIES[shown].unique()) == 6


def test_families_and_their_members_come_equally_often():
    """6,000 batches of 3; each of the three 4s a third as often. False alarm 1 in 1,000, twice."""
    rows = DistinctRows(FAMILIES, batch=3)
    shown = torch.cat([rows(step) for step in range(6000)])
    fours = torch.bincount(shown, minlength=10)[[0, 2, 7]]
    assert chisquare(fours.numpy()).pvalue > 1e-3
    # The families left out of 3,000 epochs, one each.
    epochs = FAMILIES[shown].view(3000, 6)
    missing = (FAMILIES.unique()[:, None, None] == epochs).any(2).logical_not().sum(1)
    assert missing.sum() == 3000
    assert chisquare(missing.numpy()).pvalue > 1e-3


def test_a_batch_depends_on_seed_and_step_alone():
    rows = DistinctRows(FAMILIES, batch=4, seed=2)
    forward = [rows(step) for step in range(5)]
    torch.rand(1)
    for step in reversed(range(5)):
        assert torch.equal(DistinctRows(FAMILIES, batch=4, seed=2)(step), forward[step])
    other = [DistinctRows(FAMILIES, batch=4, seed=3)(step) for step in range(5)]
    assert not torch.equal(torch.stack(other), torch.stack(forward))


@pytest.mark.parametrize(
    "batch, seed, sentence",
    [
        (1, 0, "from 2 to all 7 families, got 1"),
        (8, 0, "from 2 to all 7 families, got 8"),
        (2, -1, "not negative, got -1"),
    ],
)
def test_bad_input(batch, seed, sentence):
    with pytest.raises(ValueError, match=sentence):
        DistinctRows(FAMILIES, batch=batch, seed=seed)
