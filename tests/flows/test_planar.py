"""Planar and radial flows: the paper's determinants by hand, and that they never fold space."""

import math

import pytest
import torch
from scipy.optimize import brentq
from torch import nn

from implementations.flows.planar import Planar, Radial


def planar(direction, push, offset=0.0):
    layer = Planar(len(direction)).double()
    layer.load_state_dict(
        {
            "direction": torch.tensor(direction, dtype=torch.float64),
            "free_push": torch.tensor(push, dtype=torch.float64),
            "offset": torch.tensor(offset, dtype=torch.float64),
        }
    )
    return layer


def test_a_push_is_moved_along_the_direction_alone():
    """w = (1, 0): u = (0, 2) is allowed and stays; of u = (-9, 2) only the first part moves."""
    push, product = planar([1.0, 0.0], [0.0, 2.0]).push()
    torch.testing.assert_close(push, torch.tensor([0.0, 2.0], dtype=torch.float64))
    assert product.item() == pytest.approx(0, abs=1e-12)
    push, product = planar([1.0, 0.0], [-9.0, 2.0]).push()
    assert push[1].item() == 2
    # softplus(-9 + log(e - 1)) = 1.718 e^-9, to first order.
    assert push[0].item() == pytest.approx(-1 + 1e-3 + 1.7155 * math.exp(-9), abs=1e-7)
    assert product.item() == pytest.approx(push[0].item())


def test_planar_by_hand():
    """At x = 0 and b = 0: y = x, and |det| = 1 + w·u."""
    layer = planar([2.0, 0.0], [3.0, 0.0])
    _, product = layer.push()
    y, log_det = layer(torch.zeros(1, 2, dtype=torch.float64))
    assert not y.any()
    assert product.item() == pytest.approx(6 + math.log(math.expm1(0.999)) - 0.999, abs=2e-3)
    assert log_det.item() == pytest.approx(math.log1p(product.item()))


@pytest.mark.parametrize("size", [-50.0, -3.0, 0.0, 3.0, 50.0])
def test_planar_never_folds(size):
    """However hard it is pushed against w, no determinant is negative."""
    layer = planar([1.0, -2.0], [size, -2 * size], 0.3)
    assert layer.push()[1] > -1
    x = 3 * torch.randn(500, 2, dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: layer(row[None]).value[0]))(x)
    assert (torch.linalg.det(jacobian) > 0).all()


def test_the_inverse_is_scipys_root():
    layer = planar([0.7, -1.3], [-4.0, 1.0], 0.4)
    _, product = layer.push()
    targets = torch.linspace(-8, 8, 33, dtype=torch.float64)
    found = layer.solve(targets, product.detach())
    for target, ours in zip(targets.tolist(), found.tolist(), strict=True):

        def left(a, target=target):
            return a + product.item() * math.tanh(a + 0.4) - target

        # Where the slope is 0.02, rounding of 1e-15 in the sum moves the root by 1e-13.
        assert ours == pytest.approx(brentq(left, -20, 20, xtol=1e-14), abs=1e-11)


def test_a_direction_of_zero_is_refused():
    with pytest.raises(ValueError, match="direction w that is not zero"):
        planar([0.0, 0.0], [1.0, 1.0])(torch.zeros(1, 2).double())


@pytest.mark.parametrize("free_alpha", [-30.0, 0.0, 5.0])
@pytest.mark.parametrize("free_beta", [-30.0, 0.0, 30.0])
def test_radial_never_folds(free_alpha, free_beta):
    layer = Radial(3).double()
    with torch.no_grad():
        layer.free_alpha.fill_(free_alpha)
        layer.free_beta.fill_(free_beta)
    alpha, beta = layer.size()
    assert alpha > 0 and beta > -alpha
    x = torch.randn(200, 3, dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: layer(row[None]).value[0]))(x)
    assert (torch.linalg.det(jacobian) > 0).all()
    # Nearly folded, a radius is found with half of its digits.
    torch.testing.assert_close(layer.inverse(layer(x).value).value, x, rtol=1e-6, atol=1e-6)


def test_radial_by_hand():
    """alpha = 1, beta = 2 at distance 3: pushed out by 1 + 2/4, which counts for two directions."""
    layer = Radial(3).double()
    with torch.no_grad():
        layer.centre.zero_()
        layer.free_alpha.fill_(math.log(math.expm1(1 - 1e-3)))
        layer.free_beta.fill_(math.log(math.expm1(2 + (1 - 1e-3))))
    y, log_det = layer(torch.tensor([[0.0, 3.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(y, torch.tensor([[0.0, 4.5, 0.0]], dtype=torch.float64))
    assert log_det.item() == pytest.approx(2 * math.log(1.5) + math.log(1 + 2 / 16))


def test_the_centre_stays_and_has_a_gradient():
    layer = Radial(2).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = layer.centre.detach()[None].clone().requires_grad_()
    y, log_det = layer(x)
    torch.testing.assert_close(y, x)
    (y.sum() + log_det.sum()).backward()
    assert x.grad.isfinite().all()
