"""Cross-entropy against torch, and by hand."""

import math
import re

import pytest
import torch
from torch.nn import functional

from implementations.lab.compare import assert_same_function
from implementations.layers.cross_entropy import cross_entropy_naive


@pytest.mark.parametrize("ignored", [[], [0], [1, 4]])
@pytest.mark.parametrize("shape", [(5, 1), (5, 63), (5, 3, 7)], ids=str)
def test_equals_torch(shape, ignored):
    logits, targets = torch.randn(shape).double(), torch.randint(shape[-1], shape[:-1])
    targets[ignored] = -100
    assert_same_function(
        lambda logits: cross_entropy_naive(logits, targets),
        lambda logits: functional.cross_entropy(logits.flatten(0, -2), targets.flatten()),
        logits,
    )


def test_z_loss_by_hand():
    """Logits log 1, log 2, log 5: normalizer log 8; the targets' shares are 2/8 and 5/8."""
    logits = torch.tensor([[1.0, 2.0, 5.0]] * 3, dtype=torch.float64).log()
    targets = torch.tensor([1, -1, 2])
    got = cross_entropy_naive(logits, targets, ignore_index=-1, z_loss=0.1)
    want = (math.log(4) + math.log(8 / 5)) / 2 + 0.1 * math.log(8) ** 2
    assert got.item() == pytest.approx(want)


def test_gradcheck():
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 4, -100, 2])
    assert torch.autograd.gradcheck(lambda x: cross_entropy_naive(x, targets, z_loss=0.3), logits)


def test_nothing_valid_is_nan_as_in_torch():
    logits, targets = torch.randn(2, 3), torch.full((2,), -100)
    assert cross_entropy_naive(logits, targets).isnan()
    assert functional.cross_entropy(logits, targets).isnan()


@pytest.mark.parametrize("target", [3, -1])
def test_a_target_outside_is_a_sentence(target):
    with pytest.raises(ValueError, match=r"targets are 0 ... 2 or ignore_index -100"):
        cross_entropy_naive(torch.randn(2, 3), torch.tensor([0, target]))


def test_narrow_logits_give_a_wide_loss():
    assert (
        cross_entropy_naive(torch.randn(2, 3).half(), torch.tensor([0, 1])).dtype is torch.float32
    )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("shape", [(1,), (), (4, 1), (3,), (2, 4)], ids=str)
def test_targets_of_another_shape_are_refused(shape):
    """One target for four rows would broadcast: a loss of four normalizers and one logit."""
    logits, targets = torch.randn(4, 5), torch.zeros(shape, dtype=torch.long)
    sentence = f"rows of (4, 5) need targets of (4,), got {shape}"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        cross_entropy_naive(logits, targets)
