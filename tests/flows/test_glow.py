"""ActNorm and the 1x1 convolution: what they do to data, to a Gaussian, and which they refuse."""

import pytest
import torch
from torch import nn

from implementations.flows.bijection import Flow
from implementations.flows.glow import ActNorm, Convolutions, InvertibleConvolution, glow_step


def test_after_actnorm_every_channel_has_mean_0_and_deviation_1():
    layer = ActNorm(3).double()
    x = torch.randn(20, 3, 4, 5, dtype=torch.float64) * torch.tensor([1, 5, 0.1]).view(3, 1, 1) + 7
    y = layer.initialise(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.ones(3).double())
    assert torch.equal(layer(x).value, y)


def test_actnorm_before_it_is_set_is_the_identity():
    x = torch.randn(2, 3)
    assert torch.equal(ActNorm(3)(x).value, x)


def test_actnorm_by_hand_counts_its_pixels():
    """Two channels stretched by e and e², six pixels: log det = 6 · 3."""
    layer = ActNorm(2)
    layer.load_state_dict({"shift": torch.zeros(2), "log_scale": torch.tensor([1.0, 2.0])})
    assert layer(torch.zeros(4, 2, 2, 3)).log_det.tolist() == 4 * [18.0]
    assert layer(torch.zeros(4, 2)).log_det.tolist() == 4 * [3.0]


def test_a_channel_that_does_not_vary_is_named():
    x = torch.randn(5, 3, 2, 2)
    x[:, 1] = 4.0
    with pytest.raises(ValueError, match="channel 1 does not vary"):
        ActNorm(3).initialise(x)


@pytest.mark.parametrize("channels", [1, 2, 7])
def test_the_convolution_is_torchs_with_its_matrix(channels):
    """A matrix with a determinant of either sign comes out of its LU factors as it went in."""
    matrix = torch.randn(channels, channels, dtype=torch.float64)
    layer = InvertibleConvolution(channels, matrix).double()
    x = torch.randn(3, channels, 4, 5, dtype=torch.float64)
    y, log_det = layer(x)
    expected = nn.functional.conv2d(x, matrix[:, :, None, None])
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    stretch = 20 * torch.linalg.slogdet(matrix).logabsdet
    torch.testing.assert_close(log_det, stretch.expand(3), rtol=1e-10, atol=1e-10)
    back = torch.einsum("oc,bc...->bo...", torch.linalg.inv(matrix), y)
    torch.testing.assert_close(
        layer.inverse(y).value, back, rtol=1e-9, atol=1e-9
    )  # inv's own error


def test_the_matrix_of_a_normal_is_torchs_gaussian():
    matrix = torch.randn(3, 3, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal(
        torch.zeros(3).double(), precision_matrix=matrix.mT @ matrix
    )
    x = torch.randn(8, 3, dtype=torch.float64)
    density = Flow(InvertibleConvolution(3, matrix), (3,)).log_prob(x)
    # 1e-8: the other way goes through a Cholesky factor of the squared matrix.
    torch.testing.assert_close(density, normal.log_prob(x), rtol=1e-8, atol=0)


def test_a_new_convolution_is_a_rotation():
    layer = InvertibleConvolution(6).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    y, log_det = layer(x)
    # 1e-5: the rotation was drawn in single precision.
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close(log_det, torch.zeros(4).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "matrix", [[[1.0, 2.0], [2.0, 4.0]], [[0.0, 0.0], [0.0, 1.0]], [[1.0, torch.nan], [0.0, 1.0]]]
)
def test_a_singular_matrix_is_refused(matrix):
    with pytest.raises(ValueError, match="needs an invertible matrix"):
        InvertibleConvolution(2, torch.tensor(matrix))


def test_a_step_keeps_the_first_half_after_mixing():
    step = glow_step(4, 8)
    nn.init.normal_(step.steps[2].conditioner.layers[-1].weight)
    x = torch.randn(2, 4, 3, 3)
    mixed = step.steps[1](step.steps[0](x).value).value
    assert torch.equal(step(x).value[:, :2], mixed[:, :2])
    assert not torch.isclose(step(x).value[:, 2:], mixed[:, 2:]).all()


def test_one_channel_cannot_be_coupled():
    with pytest.raises(ValueError, match="it would keep 0 of 1"):
        glow_step(1, 8)


def test_the_network_gives_each_moved_channel_its_own_parameters():
    network = Convolutions(2, 3, 2, 4)
    network.layers[-1].bias.data = torch.arange(6.0)
    parameters = network(torch.zeros(1, 2, 2, 2))
    assert parameters.shape == (1, 3, 2, 2, 2)
    assert parameters[0, :, 0, 0].tolist() == [[0, 1], [2, 3], [4, 5]]
