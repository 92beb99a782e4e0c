"""Accumulated micro-batches against one large batch with torch's own mean cross-entropy."""

import math

import pytest
import torch
from torch import nn

from implementations.training.accumulation import IGNORED, accumulate, next_token_loss

VOCABULARY = 17


@pytest.fixture
def model():
    return nn.Sequential(nn.Embedding(VOCABULARY, 6), nn.Linear(6, VOCABULARY)).double()


@pytest.fixture
def tokens():
    """Seven rows, from full to a single target, and one that asks for nothing at all."""
    tokens = torch.randint(VOCABULARY, (7, 12))
    for row, length in enumerate([12, 3, 7, 2, 1, 12, 5]):
        tokens[row, length:] = IGNORED
    return tokens


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_uneven_parts_equal_the_large_batch(model, tokens, parts):
    """Gradient, loss and count; float64, 1e-12. Mean of means is off by over 1 % here."""
    logits = model(tokens[:, :-1].clamp(min=0))
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    expected.backward()
    exact = gradients(model)
    model.zero_grad()
    mean, count = accumulate(next_token_loss, model, tokens, parts)
    torch.testing.assert_close(mean, expected.detach(), rtol=1e-12, atol=0)
    assert count == (tokens[:, 1:] != IGNORED).sum() == 35
    for ours, theirs in zip(gradients(model), exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_each_token_is_asked_for_the_next_one():
    """A model that says 'the token plus one', for certain, is never surprised by 0 1 2 3."""

    def successor(tokens):
        return 1e4 * nn.functional.one_hot((tokens + 1) % 5, 5).double()

    total, count = next_token_loss(successor, torch.tensor([[0, 1, 2, 3], [3, 4, 0, 1]]))
    assert (total.item(), count.item()) == (0.0, 6)
    total, _ = next_token_loss(successor, torch.tensor([[0, 1, 2, 2]]))
    assert total.item() == 1e4


def test_a_model_that_knows_nothing_is_surprised_by_log_vocabulary():
    tokens = torch.randint(5, (3, 9))
    total, count = next_token_loss(lambda x: torch.zeros(*x.shape, 5).double(), tokens)
    assert total.item() == pytest.approx(24 * math.log(5), rel=1e-12)
    assert count == 24


def test_bfloat16_logits_are_widened():
    logits = torch.randn(2, 8, 5).bfloat16()
    total, _ = next_token_loss(lambda _: logits, torch.zeros(2, 9, dtype=torch.long))
    expected = -logits.double().log_softmax(-1)[..., 0].sum()
    # float32's rounding of 16 terms; in bfloat16 the error would be near 1e-2.
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_tuple_is_cut_alike_and_a_count_may_be_an_int():
    """A regression on pairs: the gradient of the mean squared error, in three parts."""
    layer, x, y = nn.Linear(3, 1).double(), torch.randn(7, 3).double(), torch.randn(7, 1).double()
    nn.functional.mse_loss(layer(x), y).backward()
    exact = gradients(layer)
    layer.zero_grad()

    def squares(model, pair):
        return (model(pair[0]) - pair[1]).square().sum(), len(pair[0])

    accumulate(squares, layer, (x, y), 3)
    for ours, theirs in zip(gradients(layer), exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_parameters_without_a_part_in_the_loss_are_let_be(model, tokens):
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    accumulate(next_token_loss, model, tokens)
    assert model.unused.grad is None


@pytest.mark.parametrize("parts", [0, 8])
def test_more_parts_than_rows_are_refused(model, tokens, parts):
    with pytest.raises(ValueError, match=f"7 rows cannot be cut into {parts}"):
        accumulate(next_token_loss, model, tokens, parts)
