"""The learning rate against its closed form and transformers, and which parameters are decayed."""

import math

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from implementations.training.schedule import learning_rate, parameter_groups


@pytest.mark.parametrize("steps, warmup", [(1, 0), (10, 0), (37, 5), (100, 99)])
def test_decaying_to_zero_it_is_transformers_schedule_at_every_step(steps, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    theirs = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    for step in range(steps + 1):
        ours = learning_rate(step, peak=0.3, steps=steps, warmup=warmup, final=0.0)
        # 1e-15 of the peak: transformers adds and multiplies in another order.
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        theirs.step()


def test_by_hand():
    """Half way up, the peak, the mean of peak and end half way down, the end, and after it."""
    rates = [
        learning_rate(step, peak=2.0, steps=30, warmup=10, final=0.1)
        for step in (0, 5, 10, 20, 30, 99)
    ]
    assert rates == pytest.approx([0.0, 1.0, 2.0, 1.1, 0.2, 0.2], rel=1e-12)
    quarter = learning_rate(15, peak=2.0, steps=30, warmup=10, final=0.1)
    assert quarter == pytest.approx(0.2 + 1.8 * (1 + math.sqrt(0.5)) / 2, rel=1e-12)


@pytest.mark.parametrize(
    "step, sizes, sentence",
    [
        (1, {"steps": 10, "warmup": 10}, "warm-up of 10 steps does not fit into 10"),
        (1, {"steps": 10, "warmup": -1}, "warm-up of -1"),
        (-1, {"steps": 10}, "got -1"),
    ],
)
def test_impossible_schedules_are_refused(step, sizes, sentence):
    with pytest.raises(ValueError, match=sentence):
        learning_rate(step, peak=1.0, **sizes)


class Mixed(nn.Module):
    """Every kind of parameter, one of them shared, one frozen."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.convolution = nn.Conv1d(6, 6, 3)
        self.norm = nn.LayerNorm(6)
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embedding.weight


def test_matrices_and_embeddings_are_decayed_norms_biases_and_scalars_are_not():
    model = Mixed()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, left_alone = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and left_alone["weight_decay"] == 0.0
    assert [names[id(p)] for p in decayed["params"]] == ["embedding.weight", "convolution.weight"]
    assert {names[id(p)] for p in left_alone["params"]} == {
        "convolution.bias",
        "norm.weight",
        "norm.bias",
        "scale",
        "head.bias",
    }


def test_with_gradients_of_zero_only_matrices_shrink():
    """By exactly learning rate times decay: AdamW's decay does not pass through its averages."""
    model = Mixed().double()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.AdamW(parameter_groups(model, 0.5), lr=0.1).step()
    for name, parameter in model.named_parameters():
        shrunk = name in ("embedding.weight", "convolution.weight")
        torch.testing.assert_close(parameter, before[name] * (0.95 if shrunk else 1.0))


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no parameter"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 0.1)
