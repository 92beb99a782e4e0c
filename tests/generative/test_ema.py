"""The average of weights against torch's, and its warm-up by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from implementations.generative.ema import decay_at, follow_weights


@pytest.mark.parametrize("tensor", [False, True])
def test_equals_torchs(tensor):
    model = nn.Linear(3, 2).double()
    average = copy.deepcopy(model).requires_grad_(False)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(model)  # the first of theirs copies
    for _ in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        decay = torch.tensor(0.9, dtype=torch.float64) if tensor else 0.9
        follow_weights(average.parameters(), model.parameters(), decay)
        theirs.update_parameters(model)
    for ours, other in zip(average.parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-10)


def test_warm_up_by_hand():
    assert [decay_at(n, 0.999) for n in (0, 1, 8, 90)] == [0.1, 2 / 11, 0.5, 0.91]
    assert decay_at(100_000, 0.999) == 0.999


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_bad_decay(decay):
    with pytest.raises(ValueError, match=f"less than 1, got {decay}"):
        decay_at(0, decay)
