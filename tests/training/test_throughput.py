"""The update that throughput is measured with is AdamW's, on the mean loss in bfloat16."""

import pytest
import torch
from torch import nn

from implementations.training.throughput import training_step


@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=["pictures", "tokens"])
def test_steps_are_adamws_by_hand(shape):
    """A linear model: the gradient is (softmax - one-hot) x / count, with scores in bfloat16."""
    rate, weight, seen = 0.1, nn.Parameter(torch.randn(4, 5)), []

    def scores(x):
        seen.append(x @ weight.T)
        return seen[-1]

    step = training_step(scores, [weight], "cpu", learning_rate=rate)
    expected, first, second = weight.detach().double(), 0.0, 0.0
    for count in (1, 2, 3):
        inputs, labels = torch.randn(*shape, 5), torch.randint(4, shape)
        step(inputs, labels)
        x, y = inputs.flatten(0, -2).double(), labels.flatten()
        by_hand = ((x @ expected.T).softmax(1) - torch.eye(4).double()[y]).T @ x / 6
        gradient = weight.grad.double()
        # Scores and the way back are rounded to bfloat16's 8 bits, a few times over.
        assert (gradient - by_hand).abs().max() < 2**-6 * by_hand.abs().max()
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        move = first / (1 - 0.9**count) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
        expected = expected * (1 - 0.01 * rate) - rate * move
        torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=1e-5)
    assert [found.dtype for found in seen] == [torch.bfloat16] * 3


def test_a_compiled_step_is_the_same_step(monkeypatch):
    """What torch.compile is given is the loss; here it is put back unchanged, and seen."""
    given = []
    monkeypatch.setattr(torch, "compile", lambda function: given.append(function) or function)
    weights = []
    for compiled in (False, True):
        weight = nn.Parameter(torch.ones(3, 2))
        step = training_step(lambda x, w=weight: x @ w.T, [weight], "cpu", compiled=compiled)
        step(torch.tensor([[1.0, 2.0]]), torch.tensor([1]))
        weights.append(weight.detach())
    assert len(given) == 1
    assert torch.equal(*weights) and not torch.equal(weights[0], torch.ones(3, 2))
