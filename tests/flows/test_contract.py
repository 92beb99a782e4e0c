"""One contract for every flow: it can be undone, and its log-determinant is that of its Jacobian.

Everything is float64 and every parameter is drawn at random, because a new flow is the identity.
"""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from implementations.flows.affine_coupling import coupling_layers
from implementations.flows.autoregressive import (
    Autoregressive,
    inverse_autoregressive_flow,
    masked_autoregressive_flow,
)
from implementations.flows.bijection import Compose, Flatten, Flow, Inverse, Permute
from implementations.flows.continuous import Continuous, Velocity
from implementations.flows.dequantization import Logit
from implementations.flows.glow import ActNorm, InvertibleConvolution, glow_step
from implementations.flows.multi_scale import MultiScale, Squeeze
from implementations.flows.planar import Planar, Radial
from implementations.flows.spline_coupling import spline

TIGHT = 1e-10  # the issue's; rounding alone is some 1e-14
# 64 steps of Runge and Kutta's leave 1e-11 on these fields; halving the steps divides it by 16.
STEPS = 64

ANY = {  # for one column and more
    "actnorm": ActNorm,
    "1x1 convolution": InvertibleConvolution,
    "planar": Planar,
    "two planar": lambda dim: Compose(Planar(dim), Planar(dim)),
    "radial": Radial,
    "MAF": lambda dim: masked_autoregressive_flow(dim, 2, 8),
    "IAF": lambda dim: inverse_autoregressive_flow(dim, 2, 8),
    "spline MAF": lambda dim: Autoregressive(dim, 8, spline(5)),
    "continuous": lambda dim: Continuous(Velocity(dim, 8), steps=STEPS),
    "turned twice": lambda dim: Inverse(Inverse(ActNorm(dim))),
}
COUPLED = {  # for two columns and more
    "affine coupling": lambda dim: coupling_layers(dim, 3, 8),
    "spline coupling": lambda dim: coupling_layers(dim, 3, 8, spline(5)),
    "permutation": lambda dim: Compose(Permute(torch.arange(dim).roll(1)), Planar(dim)),
}
VECTORS = ANY | COUPLED
IMAGES = {
    "glow step": (lambda: glow_step(3, 4), (3, 2, 3)),
    "odd channels": (lambda: glow_step(5, 4), (5, 1, 1)),
    "squeeze": (lambda: Compose(Squeeze(), ActNorm(4)), (1, 4, 2)),
    "one scale": (lambda: MultiScale((1, 2, 4), scales=1, steps=2, hidden=4), (1, 2, 4)),
    "three scales": (lambda: MultiScale((1, 8, 8), scales=3, steps=1, hidden=4), (1, 8, 8)),
    "logit": (lambda: Logit(0.05), (2, 2, 2)),
    "rows": (lambda: Compose(Flatten((2, 1, 2)), Planar(4)), (2, 1, 2)),
}


def shaken(flow: nn.Module, size: float = 0.3) -> nn.Module:
    """The flow in float64 with random parameters."""
    flow = flow.double()
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=size)
    return flow


CASES = [(name, dim) for name in VECTORS for dim in ((2, 5) if name in COUPLED else (1, 2, 5))]
CASES += [(name, None) for name in IMAGES]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1] or 'image'}")
def case(request):
    """A flow and five examples for it."""
    name, dim = request.param
    if dim is None:
        make, shape = IMAGES[name]
        x = torch.rand(5, *shape, dtype=torch.float64)
        return shaken(make()), x if name == "logit" else 4 * x - 2
    return shaken(VECTORS[name](dim)), 2 * torch.randn(5, dim, dtype=torch.float64)


def test_the_inverse_undoes_it_in_value_and_in_log_det(case):
    flow, x = case
    y, log_det = flow(x)
    back, log_det_back = flow.inverse(y)
    torch.testing.assert_close(back, x, rtol=TIGHT, atol=TIGHT)
    torch.testing.assert_close(log_det_back, -log_det, rtol=TIGHT, atol=TIGHT)


def test_log_det_is_that_of_the_dense_jacobian(case):
    """torch.func.jacrev of each example by itself, and LU: nothing of ours."""
    flow, x = case
    _, log_det = flow(x)
    assert log_det.shape == (len(x),)
    for row, ours in zip(x, log_det, strict=True):
        jacobian = torch.func.jacrev(lambda row: flow(row[None]).value.flatten())(row)
        exact = torch.linalg.slogdet(jacobian.reshape(row.numel(), row.numel())).logabsdet
        torch.testing.assert_close(ours, exact, rtol=TIGHT, atol=TIGHT)


def test_an_example_does_not_notice_its_batch(case):
    """A batch of one is as in five; 1e-12 because longer products add in another order."""
    flow, x = case
    y, log_det = flow(x)
    for i in range(2):
        alone = flow(x[i : i + 1])
        torch.testing.assert_close(alone.value[0], y[i], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(alone.log_det[0], log_det[i], rtol=1e-12, atol=1e-12)
    assert flow(x[:0]).log_det.shape == (0,)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_gradients_are_those_of_finite_differences(case, direction):
    """By the examples and by every parameter, of the value and of the log-determinant."""
    flow, x = case
    if isinstance(flow, Continuous):
        flow.steps = 3  # gradients are of the numbers computed, whatever their number of steps
    if x[0].numel() > 20:
        flow.stages[0].requires_grad_(False)  # two scales are enough of finite differences
    if direction == "inverse":
        x, flow = flow(x).value.detach(), Inverse(flow)
    leaves = {name: p for name, p in flow.named_parameters() if p.requires_grad}

    def function(x, *values):
        return tuple(functional_call(flow, dict(zip(leaves, values, strict=True)), (x,)))

    start = x[:2].clone().requires_grad_()
    # fast_mode compares one random direction of all of them at once; eps and atol are torch's own.
    assert torch.autograd.gradcheck(function, (start, *leaves.values()), fast_mode=True)


@pytest.mark.parametrize("name", ANY)
def test_a_density_on_the_line_integrates_to_one(name):
    """200,000 cells to +-200, where a spline's kinks cost 1e-7; mass beyond is less than 1e-30."""
    flow = Flow(shaken(ANY[name](1)), (1,))
    if name == "continuous":
        flow.bijection.steps = 12  # the integral is then off by the solver's 1e-6
    cells = 200_000
    x = 400 * ((torch.arange(cells, dtype=torch.float64) + 0.5) / cells - 0.5)
    with torch.no_grad():
        integral = flow.log_prob(x[:, None]).exp().sum() * 400 / cells
    assert abs(integral.item() - 1) < 1e-5


@pytest.mark.parametrize("name", VECTORS)
def test_a_density_in_the_plane_integrates_to_one(name):
    """400 x 400 cells to +-20: smooth densities are off by 1e-8, kinked splines by 1e-4 (h²)."""
    flow = Flow(shaken(VECTORS[name](2)), (2,))
    if name == "continuous":
        flow.bijection.steps = 8
    axis = 40 * ((torch.arange(400, dtype=torch.float64) + 0.5) / 400 - 0.5)
    with torch.no_grad():
        density = flow.log_prob(torch.cartesian_prod(axis, axis)).exp()
    assert abs(density.sum().item() * 0.1**2 - 1) < 1e-3


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_far_tails_are_finite_and_come_back(name, size):
    """Relative to the size: a float64 at 1e6 has no digit below 1e-10."""
    flow = shaken(VECTORS[name](4))
    x = size * torch.randn(6, 4, dtype=torch.float64)
    y, log_det = flow(x)
    assert log_det.isfinite().all() and Flow(flow, (4,)).log_prob(x).isfinite().all()
    torch.testing.assert_close(flow.inverse(y).value, x, rtol=0, atol=TIGHT * size)


def test_single_precision_stays_single(case):
    flow, x = case
    flow = flow.float()
    y, log_det = flow(x.float())
    back = flow.inverse(y)
    assert {t.dtype for t in (y, log_det, *back)} == {torch.float32}


@pytest.mark.parametrize("name", VECTORS)
def test_samples_are_those_of_the_density(name):
    """Mean of a bounded function over 4,000 samples against its integral under the density.

    Five standard errors: a false alarm in 2 million, for each of the flows.
    """
    flow = Flow(shaken(VECTORS[name](2)), (2,))
    if name == "continuous":
        flow.bijection.steps = 8
    axis = 40 * ((torch.arange(400, dtype=torch.float64) + 0.5) / 400 - 0.5)
    points = torch.cartesian_prod(axis, axis)

    def wave(x):
        return torch.sin(x[:, 0] + 1) * torch.cos(2 * x[:, 1])

    with torch.no_grad():
        expected = (flow.log_prob(points).exp() * wave(points)).sum().item() * 0.1**2
    seen = wave(flow.sample(4000, generator=torch.Generator().manual_seed(1)))
    assert abs(seen.mean().item() - expected) < 5 * seen.std().item() / 4000**0.5
