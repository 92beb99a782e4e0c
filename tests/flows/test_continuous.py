"""Continuous flows against closed forms and scipy's solver; the trace against its estimate."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

from implementations.flows.continuous import Continuous, Velocity, random_signs, runge_kutta


def matrix_field(dim=3):
    matrix = 0.5 * torch.randn(dim, dim, dtype=torch.float64)
    return matrix, lambda time, x: x @ matrix.mT


def network_field(dim=2):
    field = Velocity(dim, 8).double()
    for parameter in field.parameters():
        nn.init.normal_(parameter, std=0.5)
    return field


def test_a_linear_field_is_the_exponential_of_its_matrix():
    """y = exp(A) x and log |det| = tr A; 100 steps of order 4 leave 1e-9."""
    matrix, field = matrix_field()
    x = torch.randn(5, 3, dtype=torch.float64)
    y, log_det = Continuous(field, steps=100)(x)
    torch.testing.assert_close(y, x @ torch.matrix_exp(matrix).mT, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(log_det, matrix.trace().expand(5), rtol=1e-12, atol=1e-12)


def test_the_solver_is_of_order_four():
    """x' = x cos t, x = exp(sin t): halving the steps divides the error by 16, up to 10 percent."""
    errors = []
    for steps in (80, 160, 320):
        (x,) = runge_kutta(
            lambda time, state: (state[0] * math.cos(time),),
            (torch.ones(1, dtype=torch.float64),),
            0.0,
            3.0,
            steps,
        )
        errors.append(abs(x.item() - math.exp(math.sin(3.0))))
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(16, rel=0.1)


def test_a_step_of_growth_is_the_exponential_series_up_to_its_fourth_term():
    """x' = x over one step of length 1: 1 + 1 + 1/2 + 1/6 + 1/24, by hand."""
    one = torch.ones(1, dtype=torch.float64)
    (x,) = runge_kutta(lambda time, state: state, (one,), 0.0, 1.0, 1)
    assert x.item() == pytest.approx(65 / 24, rel=1e-14)


def scipy_solution(field, x, divergence):
    """End point and integral of the divergence, by an eighth-order method at 1e-12."""

    def change(time, state):
        row = torch.from_numpy(state[:-1].copy())[None]
        with torch.no_grad():
            velocity = field(time, row)[0]
        return np.append(velocity.numpy(), divergence(time, row))

    done = solve_ivp(change, (0, 1), np.append(x.numpy(), 0.0), "DOP853", rtol=1e-12, atol=1e-12)
    return done.y[:-1, -1], done.y[-1, -1]


def jacobian(field, time, row):
    return torch.func.jacrev(lambda row: field(time, row[None])[0])(row[0]).detach()


def test_it_is_scipys_solution():
    field, x = network_field(), torch.randn(1, 2, dtype=torch.float64)
    y, log_det = Continuous(field, steps=100)(x)
    end, integral = scipy_solution(
        field, x[0], lambda t, row: jacobian(field, t, row).trace().item()
    )
    # 1e-9: the error of 100 steps on this field; scipy's own is 1e-12.
    np.testing.assert_allclose(y[0].detach().numpy(), end, rtol=0, atol=1e-9)
    assert log_det.item() == pytest.approx(integral, abs=1e-9)


def test_one_probe_serves_a_whole_solve(monkeypatch):
    """What is integrated is probe·J probe for one fixed probe: scipy's integral of the same."""
    field, x = network_field(), torch.randn(1, 2, dtype=torch.float64)
    torch.manual_seed(4)
    probe = random_signs(x, 1)[0][0]
    torch.manual_seed(4)
    log_det = Continuous(field, steps=100, probes=1)(x).log_det
    _, integral = scipy_solution(
        field, x[0], lambda t, row: (probe @ jacobian(field, t, row) @ probe).item()
    )
    assert log_det.item() == pytest.approx(integral, abs=1e-9)


def test_probes_estimate_the_trace_without_bias():
    """20,000 rows, each with its own probe; 4.5 standard errors, a false alarm in 150,000."""
    field, x = network_field(3), torch.randn(1, 3, dtype=torch.float64)
    exact = Continuous(field, steps=5)(x).log_det.item()
    seen = Continuous(field, steps=5, probes=2)(x.expand(20_000, 3)).log_det
    assert seen.std() > 0.01
    assert abs(seen.mean().item() - exact) < 4.5 * seen.std().item() / 20_000**0.5


def test_probes_are_signs_and_each_row_has_its_own():
    signs = random_signs(torch.zeros(500, 4), 3)
    assert len(signs) == 3
    assert {abs(value) for sign in signs for value in sign.unique().tolist()} == {1.0}
    assert not torch.equal(signs[0], signs[1])
    assert len(signs[0].unique(dim=0)) == 16  # all of them among 500 rows


def test_more_probes_vary_less():
    """The variance of a mean of 16 is a 16th; both are seen to 10 percent (4,000 rows)."""
    field, x = network_field(3), torch.randn(1, 3, dtype=torch.float64).expand(4000, 3)
    one, many = (Continuous(field, steps=2, probes=k)(x).log_det.var().item() for k in (1, 16))
    assert one / many == pytest.approx(16, rel=0.25)


def test_backwards_is_the_same_field_from_one_to_zero():
    matrix, field = matrix_field()
    y = torch.randn(4, 3, dtype=torch.float64)
    x, log_det = Continuous(field, steps=100).inverse(y)
    torch.testing.assert_close(x, y @ torch.matrix_exp(-matrix).mT, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(log_det, -matrix.trace().expand(4), rtol=1e-12, atol=1e-12)


def test_it_works_without_gradients_and_with_them():
    field, x = network_field(), torch.randn(3, 2, dtype=torch.float64)
    flow = Continuous(field, steps=4)
    with torch.no_grad():
        still = flow(x)
    assert not still.log_det.requires_grad
    moving = flow(x)
    torch.testing.assert_close(moving.log_det.detach(), still.log_det)
    moving.log_det.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in field.parameters())


@pytest.mark.parametrize("chosen", [{"steps": 0}, {"steps": 1, "probes": 0}])
def test_bad_input(chosen):
    with pytest.raises(ValueError, match="at least 1"):
        Continuous(Velocity(2, 4), **chosen)
