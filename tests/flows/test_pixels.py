"""Flows of whole numbers put together: every piece reached, prices repeatable and in bits."""

import math

import pytest
import torch

from implementations.flows.affine_coupling import coupling_layers
from implementations.flows.bijection import Compose
from implementations.flows.pixels import (
    flow_of_rows,
    glow,
    negative_log_probability,
    price,
    set_from_data,
)

SHAPE = (1, 4, 4)
SIZES = {"scales": 2, "steps": 1, "hidden": 4}
X = torch.randint(17, (30, *SHAPE), generator=torch.Generator().manual_seed(0))


def logistic_probability(level: int, levels: int) -> float:
    """Of a level when logit(0.01 + 0.98 v) is standard normal: a difference of two of scipy's."""
    from scipy.stats import norm

    edges = [0.01 + 0.98 * (level + side) / levels for side in (0, 1)]
    low, high = (math.log(edge / (1 - edge)) for edge in edges)
    return norm.cdf(high) - norm.cdf(low)


def test_an_untrained_flow_has_the_price_of_a_normal_logit():
    """1,000 draws: log of a mean of 1,000 ratios is within 1 percent, 0.002 bits a pixel here."""
    model = flow_of_rows(SHAPE, 17, Compose(coupling_layers(16, 2, 8)))
    x = torch.full((1, *SHAPE), 8)
    exact = -math.log2(logistic_probability(8, 17))
    assert price(model, x, 1000).item() == pytest.approx(exact, abs=2e-3)


def test_the_loss_is_the_price_in_nats():
    model = glow(SHAPE, 17, **SIZES)
    torch.manual_seed(7)
    total, count = negative_log_probability(model, X)
    cost = price(model, X, 1, seed=7)
    assert count == 30
    assert total.item() / (30 * 16 * math.log(2)) == pytest.approx(cost.mean().item(), rel=1e-5)


def test_a_price_is_repeatable_and_leaves_the_generator_alone():
    model = glow(SHAPE, 17, **SIZES)
    torch.manual_seed(3)
    first = price(model, X, 2)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(price(model, X, 2), first)
    assert not torch.equal(price(model, X, 2, seed=1), first)


def test_actnorm_is_set_from_what_the_flow_sees():
    """The noise of the same images then has mean 0 and deviation 1, up to the noise drawn anew."""
    model = glow(SHAPE, 17, **SIZES)
    set_from_data(model, X)
    noise = model.flow.bijection((X + torch.rand(X.shape)) / 17).value
    assert noise.mean().abs() < 0.05 and noise.std().item() == pytest.approx(1, abs=0.05)


def test_learnt_noise_has_parameters_that_the_loss_reaches():
    model = glow(SHAPE, 17, **SIZES, learnt_noise=True)
    total, _ = negative_log_probability(model, X)
    total.backward()
    last = model.noise.network.layers[-1].weight
    assert last.grad.abs().max() > 0


def test_samples_are_images_of_levels():
    for model in (glow(SHAPE, 17, **SIZES), flow_of_rows(SHAPE, 17, coupling_layers(16, 2, 8))):
        x = model.sample(5)
        assert x.shape == (5, *SHAPE) and x.min() >= 0 and x.max() <= 16
