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


@pytest.mark.parametrize("decay", [1.0, -0.1, 2.0])
def test_bad_decay(decay):
    with pytest.raises(ValueError, match=f"less than 1, got {decay}"):
        decay_at(0, decay)
    with pytest.raises(ValueError, match=f"less than 1, got {decay}"):
        follow_weights([torch.zeros(2)], [torch.ones(2)], decay)


def test_an_average_of_narrow_weights_goes_all_the_way():
    """1,000 updates towards 1 come to 1 - 0.999^1000. In bfloat16 it would stop at 0.25, and is
    refused."""
    average, weights = [torch.zeros(2)], [torch.ones(2, dtype=torch.bfloat16)]
    for _ in range(1000):
        follow_weights(average, weights, 0.999)
    torch.testing.assert_close(average[0], torch.full((2,), 1 - 0.999**1000), rtol=1e-4, atol=0)
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=f"float32 at least, got {dtype}"):
            follow_weights([torch.zeros(2, dtype=dtype)], weights, 0.999)


def test_an_average_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"got \(2,\) for \(1,\)"):
        follow_weights([torch.zeros(2)], [torch.ones(1)], 0.9)
