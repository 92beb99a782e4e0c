"""A short training finds the least squares solution, and stops at what is not finite."""

import pytest
import torch
from torch import nn

from implementations.training.fit import fit
from implementations.training.rows import RandomRows
from implementations.training.run import Diverged


def squares(model, batch):
    x, y = batch
    return (model(x) - y).square().sum(), len(x)


def line(rows=64):
    torch.manual_seed(1)
    x = torch.randn(rows, 3, dtype=torch.float64)
    return x, x @ torch.tensor([[1.0], [-2.0], [3.0]], dtype=torch.float64) + 4


def test_a_line_is_found_and_every_step_is_watched():
    x, y = line()
    model, seen = nn.Linear(3, 1).double(), []
    rows = RandomRows(x, y, batch=32)
    losses = fit(model, rows, squares, steps=400, learning_rate=0.1, watch=seen.append)
    assert seen == list(range(401)) and len(losses) == 400
    assert not model.training
    # The data has no noise, so that the answer is exact; Adam's last steps are 1e-3 long.
    torch.testing.assert_close(
        model.weight[0], torch.tensor([1.0, -2, 3]).double(), atol=1e-2, rtol=0
    )
    torch.testing.assert_close(model.bias, torch.tensor([4.0]).double(), atol=1e-2, rtol=0)


def test_the_first_loss_is_that_of_the_weights_given():
    x, y = line()
    model, rows = nn.Linear(3, 1).double(), RandomRows(x, y, batch=32)
    total, count = squares(model, rows(0))
    assert fit(model, rows, squares, steps=1, learning_rate=0.1) == [total.item() / count]


def test_nan_stops_before_the_weights():
    x, y = line()
    model = nn.Linear(3, 1).double()
    before = model.weight.clone()
    with pytest.raises(Diverged, match="loss is nan"):
        fit(model, RandomRows(x * torch.nan, y, batch=4), squares, steps=2, learning_rate=0.1)
    assert torch.equal(model.weight, before)


def test_bad_settings():
    with pytest.raises(ValueError, match="steps is at least 1"):
        fit(nn.Linear(1, 1), RandomRows(torch.ones(1), batch=1), squares, steps=0, learning_rate=1)
