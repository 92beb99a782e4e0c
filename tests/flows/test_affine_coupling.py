"""Affine coupling against a Gaussian that is known, and what must not move does not."""

import pytest
import torch
from torch import nn

from implementations.flows.affine_coupling import (
    AFFINE,
    Coupling,
    Perceptron,
    affine,
    alternating,
    coupling_layers,
)
from implementations.flows.bijection import Flow


class Linear(nn.Module):
    """log_scale and shift as straight lines of the kept columns."""

    def __init__(self, scale, shift):
        super().__init__()
        self.scale, self.shift = torch.tensor(scale), torch.tensor(shift)

    def forward(self, kept):
        shift = kept @ self.shift.T.to(kept)
        free = 3 * torch.atanh(self.scale / 3).to(kept).expand_as(shift)
        return torch.stack((free, shift), -1)


def test_a_linear_coupling_is_torchs_gaussian():
    """z = A x with A unit triangular times scales, so x is normal with precision A'A."""
    kept = torch.tensor([True, False, False])
    coupling = Coupling(kept, Linear([0.4, -0.7], [[2.0], [-1.0]]))
    matrix = torch.tensor([[1.0, 0, 0], [2.0, 0, 0], [-1.0, 0, 0]], dtype=torch.float64)
    matrix[1, 1], matrix[2, 2] = torch.tensor([0.4, -0.7]).double().exp()
    other = torch.distributions.MultivariateNormal(
        torch.zeros(3).double(), precision_matrix=matrix.mT @ matrix
    )
    x = torch.randn(7, 3, dtype=torch.float64)
    # 1e-6: the scales above were rounded to single precision on their way through atanh.
    torch.testing.assert_close(
        Flow(coupling, (3,)).log_prob(x), other.log_prob(x), rtol=1e-6, atol=0
    )


def test_affine_by_hand():
    """Free scale 0 and shift 5 move 2 to 7; large free scales stop at e³."""
    y, log_slope = affine(torch.tensor([2.0]), torch.tensor([[0.0, 5.0]]))
    assert y.item() == 7 and log_slope.item() == 0
    y, log_slope = affine(torch.tensor([2.0]), torch.tensor([[1e9, 0.0]]))
    assert log_slope.item() == pytest.approx(3) and y.item() == pytest.approx(2 * 20.0855, rel=1e-5)


def test_masks_by_hand():
    assert alternating(5, 0).tolist() == [True, False, True, False, True]
    assert alternating(5, 3).tolist() == [False, True, False, True, False]


def test_a_layer_moves_the_columns_that_it_does_not_keep_and_no_other():
    torch.manual_seed(3)
    layer = coupling_layers(5, 1, 8).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(4, 5, dtype=torch.float64)
    moved = layer(x).value != x
    assert moved.tolist() == 4 * [[False, True, False, True, False]]


@pytest.mark.parametrize("dim", [2, 3, 6])
def test_two_layers_move_every_column_and_three_mix_all(dim):
    """After three layers every output depends on every input: no zero in the Jacobian."""
    layers = coupling_layers(dim, 3, 8).double()
    for parameter in layers.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(dim, dtype=torch.float64)
    two = type(layers)(*layers.steps[:2])
    assert (two(x[None]).value[0] != x).all()
    jacobian = torch.func.jacrev(lambda x: layers(x[None]).value[0])(x)
    assert (jacobian != 0).all()


def test_a_new_flow_is_the_identity():
    x = torch.randn(3, 4)
    y, log_det = coupling_layers(4, 3, 8)(x)
    assert torch.equal(y, x) and not log_det.any()


@pytest.mark.parametrize("kept", [[True], [False], [True, True], [False, False]])
def test_one_column_cannot_be_coupled(kept):
    with pytest.raises(ValueError, match=f"would keep {sum(kept)} of {len(kept)}"):
        Coupling(torch.tensor(kept), nn.Identity())
    with pytest.raises(ValueError, match="it would keep 1 of 1"):
        coupling_layers(1, 2, 8)


def test_another_width_is_refused():
    layer = Coupling(alternating(4, 0), Perceptron(2, 2, AFFINE.parameters, 8))
    with pytest.raises(ValueError, match="has 4 columns, got 5"):
        layer(torch.zeros(1, 5))
