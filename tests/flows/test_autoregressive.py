"""MADE's masks let nothing through that they should not, and MAF is a product of conditionals."""

import pytest
import torch
from torch import nn

from implementations.flows.autoregressive import (
    MADE,
    Autoregressive,
    degrees,
    inverse_autoregressive_flow,
    masked_autoregressive_flow,
)
from implementations.flows.bijection import Flow


def random(module):
    module = module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("dim, hidden", [(1, 4), (2, 4), (3, 2), (6, 17)])
def test_an_output_depends_on_exactly_the_inputs_before_it(dim, hidden):
    """The Jacobian of every parameter: zero from the diagonal on, nothing but zero there."""
    made = random(MADE(dim, hidden, 2))
    x = torch.randn(dim, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda x: made(x[None])[0])(x)  # [dim, parameter, dim]
    sees = (jacobian != 0).any(1)
    before = torch.ones(dim, dim).tril(-1).bool()
    assert torch.equal(sees, before)


def test_degrees_by_hand():
    assert degrees(4, 7).tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert degrees(1, 3).tolist() == [0, 0, 0]


class Triangular(nn.Module):
    """Parameters that make z = scales · x + lower x."""

    def __init__(self, log_scale, lower):
        super().__init__()
        self.log_scale, self.lower = log_scale, lower

    def forward(self, x):
        free = 3 * torch.atanh(self.log_scale / 3)
        return torch.stack((free.expand_as(x), x @ self.lower.mT), -1)


def gaussian(dim=4):
    layer = Autoregressive(dim, 3).double()
    log_scale, lower = torch.randn(dim).double(), torch.randn(dim, dim).double().tril(-1)
    layer.made = Triangular(log_scale, lower)
    matrix = lower + log_scale.exp().diag()
    precision = matrix.mT @ matrix
    return layer, torch.distributions.MultivariateNormal(
        torch.zeros(dim).double(), precision_matrix=precision
    )


def test_a_linear_layer_is_torchs_gaussian_by_its_cholesky_factor():
    layer, normal = gaussian()
    x = torch.randn(9, 4, dtype=torch.float64)
    torch.testing.assert_close(
        Flow(layer, (4,)).log_prob(x), normal.log_prob(x), rtol=1e-10, atol=0
    )


def test_the_inverse_is_a_triangular_solve():
    layer, _ = gaussian()
    y = torch.randn(9, 4, dtype=torch.float64)
    lower = layer.made.lower + layer.made.log_scale.exp().diag()
    expected = torch.linalg.solve_triangular(lower, y.mT, upper=False).mT
    torch.testing.assert_close(layer.inverse(y).value, expected, rtol=1e-10, atol=1e-10)


def test_the_jacobian_is_triangular_with_the_scales_on_its_diagonal():
    layer = random(Autoregressive(5, 9))
    x = torch.randn(5, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda x: layer(x[None]).value[0])(x)
    assert not jacobian.triu(1).any() and jacobian.tril(-1).any()
    log_det = layer(x[None]).log_det[0]
    torch.testing.assert_close(jacobian.diagonal().log().sum(), log_det, rtol=1e-10, atol=1e-12)


def test_iaf_is_maf_turned_around():
    maf, iaf = masked_autoregressive_flow(3, 2, 8), inverse_autoregressive_flow(3, 2, 8)
    random(maf)
    iaf.double().turned.load_state_dict(maf.state_dict())
    x = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(iaf(x).value, maf.inverse(x).value)
    torch.testing.assert_close(iaf.inverse(x).log_det, maf(x).log_det)


def test_the_order_turns_between_layers():
    """With two layers every output depends on every input but for the corner of the triangle."""
    flow = random(masked_autoregressive_flow(4, 2, 9))
    x = torch.randn(4, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda x: flow(x[None]).value[0])(x)
    assert (jacobian != 0).all()


def test_a_new_flow_is_a_permutation():
    x = torch.randn(3, 4)
    y, log_det = masked_autoregressive_flow(4, 2, 8)(x)
    assert torch.equal(y, x) and not log_det.any()  # reversed twice


@pytest.mark.parametrize("sizes", [(0, 4, 2), (3, 0, 2), (3, 4, 0)])
def test_bad_input(sizes):
    with pytest.raises(ValueError, match="sizes are positive"):
        MADE(*sizes)
