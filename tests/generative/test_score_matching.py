"""Four losses with one minimiser: their gradients agree, exactly, under a quadrature on a line."""

import numpy as np
import pytest
import torch
from torch import nn

from implementations.generative.gaussian_mixture import Mixture
from implementations.generative.score_matching import (
    denoising_loss,
    explicit_loss,
    implicit_loss,
    sliced_loss,
)

ALPHA, SIGMA = 0.8, 0.6


@pytest.fixture
def mixture():
    parts = ([0.3, 0.7], [[-0.5], [0.4]], [[[0.3]], [[0.5]]])
    return Mixture(*(torch.tensor(part, dtype=torch.float64) for part in parts))


@pytest.fixture
def quadrature(mixture):
    """Data, noise and weights: Gauss and Hermite's points for each component and for the noise."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(50))
    weights = weights / weights.sum()
    data = mixture.means[:, 0, None] + mixture.covariances[:, 0].sqrt() * nodes  # [k, node]
    chance = mixture.weights[:, None] * weights
    shape = (*data.shape, len(nodes))
    pairs = [data[..., None].expand(shape), nodes.expand(shape)]
    mass = chance[..., None] * weights
    return *(part.reshape(-1, 1) for part in pairs), mass.reshape(-1)


class Model(nn.Module):
    """A small score with smooth features of x."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([0.3, -0.8, 0.1, 0.2], dtype=torch.float64))

    def forward(self, x):
        features = torch.stack((torch.ones_like(x), x, torch.sin(x), torch.cos(2 * x)), -1)
        return features @ self.weights


def gradient(losses, mass, model):
    return torch.autograd.grad((losses * mass).sum(), model.weights)[0]


def test_all_losses_have_the_same_gradient(mixture, quadrature):
    data, noise, mass = quadrature
    model, x = Model(), ALPHA * data + SIGMA * noise
    truth = mixture.noised(ALPHA, SIGMA).score(x)
    wanted = gradient(explicit_loss(model, x, truth), mass, model)
    found = {
        "implicit": implicit_loss(model, x),
        "sliced": sliced_loss(model, x, probes=3),  # on a line a sign squared is one: exact
        "denoising": denoising_loss(model, data, noise, ALPHA, SIGMA),
    }
    for losses in found.values():
        torch.testing.assert_close(gradient(losses, mass, model), wanted, rtol=1e-8, atol=1e-8)


def test_denoising_is_explicit_and_a_constant(mixture, quadrature):
    """The constant is half of E|noise/sigma|² - E|grad log p|², the same for every model."""
    data, noise, mass = quadrature
    x = ALPHA * data + SIGMA * noise
    truth = mixture.noised(ALPHA, SIGMA).score(x)
    constant = (((noise / SIGMA) ** 2 - truth**2).sum(1) * mass).sum() / 2
    for model in (Model(), torch.zeros_like, torch.sin):
        denoising = (denoising_loss(model, data, noise, ALPHA, SIGMA) * mass).sum()
        explicit = (explicit_loss(model, x, truth) * mass).sum()
        torch.testing.assert_close(denoising - explicit, constant, rtol=1e-8, atol=0)


def test_slices_are_the_trace_on_average():
    """In three dimensions; 5 standard errors of 2,000 draws."""
    x, matrix = torch.randn(1, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    exact = implicit_loss(lambda y: torch.sin(y @ matrix), x)
    many = sliced_loss(lambda y: torch.sin(y @ matrix), x.expand(2000, 3))
    assert (many.mean() - exact).abs() < 5 * many.std() / 2000**0.5


def test_implicit_loss_by_hand():
    """s(x) = A x: half of |A x|² and the trace of A."""
    x, matrix = torch.randn(4, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    wanted = (x @ matrix.mT).square().sum(1) / 2 + matrix.trace()
    torch.testing.assert_close(implicit_loss(lambda y: y @ matrix.mT, x), wanted)
