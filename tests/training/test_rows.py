"""Random rows of several tensors: the same rows of each, by step alone, every row equally often."""

import pytest
import torch
from scipy.stats import chisquare

from implementations.training.rows import RandomRows

IMAGES = torch.arange(20.0)[:, None, None].expand(20, 3, 3)
LABELS = torch.arange(20)


def test_every_tensor_gives_the_same_rows():
    images, labels = RandomRows(IMAGES, LABELS, batch=64)(5)
    assert images.shape == (64, 3, 3)
    assert torch.equal(images[:, 1, 2].long(), labels)


def test_a_batch_depends_on_seed_and_step_alone():
    rows = RandomRows(LABELS, batch=50, seed=2)
    forward = [rows(step) for step in range(5)]
    torch.rand(1)
    for step in reversed(range(5)):
        assert torch.equal(RandomRows(LABELS, batch=50, seed=2)(step), forward[step])
    assert not torch.equal(RandomRows(LABELS, batch=50, seed=3)(0), forward[0])
    assert not torch.equal(forward[0], forward[1])


def test_every_row_is_drawn_equally_often():
    """20 rows, 20,000 draws; false alarm 1 in 1,000, once."""
    counts = torch.bincount(RandomRows(LABELS, batch=20_000)(0), minlength=20)
    assert chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(
    "tensors, chosen, sentence",
    [
        ((), {"batch": 1}, "equally many rows"),
        ((LABELS[:0],), {"batch": 1}, "at least 1"),
        ((LABELS, IMAGES[:3]), {"batch": 1}, "equally many rows"),
        ((LABELS,), {"batch": 0}, "a row at least"),
        ((LABELS,), {"batch": 1, "seed": -1}, "not negative"),
    ],
)
def test_bad_input(tensors, chosen, sentence):
    with pytest.raises(ValueError, match=sentence):
        RandomRows(*tensors, **chosen)
