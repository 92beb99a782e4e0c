"""The scaler against torch.amp.GradScaler on runs that overflow, bit for bit, and by hand."""

from functools import partial

import pytest
import torch

from implementations.optimizers import adamw
from implementations.precision.loss_scaling import (
    DYNAMIC,
    STATIC,
    Rule,
    clipped,
    init,
    next_scale,
    scaled,
    step,
    unscaled,
)

RATE, STEPS = 0.05, 80
# A loss multiplied by these at these steps: an infinite gradient, a NaN, an overflow in fp16 only.
INJECTED = {5: torch.inf, 6: torch.nan, 23: 1e6, 24: 1e6, 50: torch.inf}


def descend(parameters, gradients, state):
    """Stochastic gradient descent, which counts its steps."""
    pairs = zip(parameters, gradients, strict=True)
    return [torch.add(p, gradient, alpha=-RATE) for p, gradient in pairs], state + 1


def problem():
    """A layer and its bias in float32, a batch for each step, targets."""
    generator = torch.Generator().manual_seed(3)
    random = partial(torch.randn, generator=generator)
    return [random(7, 5), random(5)], random(STEPS, 16, 7), random(STEPS, 16, 5)


def loss_in_half(parameters, x, target, number):
    """Forward in fp16, so that gradients pass through fp16 on their way to float32 parameters."""
    weight, bias = (p.half() for p in parameters)
    loss = (x.half() @ weight + bias - target.half()).float().square().mean()
    return loss * INJECTED.get(number, 1.0)


def torchs_run(scale, rule, largest_norm):
    """(scale before, skipped, unscaled gradients, parameters after) of each step, by torch."""
    start, xs, targets = problem()
    leaves, trace = [p.clone().requires_grad_() for p in start], []
    optimizer = torch.optim.SGD(leaves, lr=RATE)
    options = {"growth_factor": rule.growth, "backoff_factor": rule.backoff}
    scaler = torch.amp.GradScaler("cpu", scale, growth_interval=rule.growth_interval, **options)
    for number, (x, target) in enumerate(zip(xs, targets, strict=True)):
        optimizer.zero_grad()
        before = [leaf.detach().clone() for leaf in leaves]
        scaler.scale(loss_in_half(leaves, x, target, number)).backward()
        old = scaler.get_scale()
        scaler.unscale_(optimizer)
        gradients = [leaf.grad.clone() for leaf in leaves]
        torch.nn.utils.clip_grad_norm_(leaves, largest_norm)
        scaler.step(optimizer)
        scaler.update()
        after = [leaf.detach().clone() for leaf in leaves]
        trace.append((old, all(map(torch.equal, before, after)), gradients, after))
    return trace


def our_run(scale, rule, largest_norm):
    parameters, xs, targets = problem()
    state, trace = init(0, scale), []
    for number, (x, target) in enumerate(zip(xs, targets, strict=True)):
        leaves = [p.clone().requires_grad_() for p in parameters]
        loss = scaled(loss_in_half(leaves, x, target, number), state)
        gradients, old = torch.autograd.grad(loss, leaves), state
        parameters, state, info = step(
            parameters, gradients, state, descend, rule=rule, largest_norm=largest_norm
        )
        assert state.optimizer == old.optimizer + info.finite
        trace.append((old.scale, not info.finite, info.gradients, parameters))
    return trace


RUNS = {
    "usual": (2.0**16, Rule(growth_interval=6), torch.inf),
    "clipped": (2.0**12, Rule(growth_interval=6), 0.5),
    "factors that float32 rounds": (1000.1, Rule(1.7, 0.3, 4), 0.5),
    "grows at every step": (1.0, Rule(growth_interval=1), torch.inf),
}


def same(got, want):
    return torch.equal(got.nan_to_num(), want.nan_to_num()) and torch.equal(
        got.isnan(), want.isnan()
    )


@pytest.mark.parametrize("name", RUNS)
def test_the_trace_is_gradscalers(name):
    ours, torchs = our_run(*RUNS[name]), torchs_run(*RUNS[name])
    assert [row[0] for row in ours] == [row[0] for row in torchs]
    assert [row[1] for row in ours] == [row[1] for row in torchs]
    for (*_, gradients, parameters), (*_, their_gradients, theirs) in zip(
        ours, torchs, strict=True
    ):
        assert all(map(same, gradients, their_gradients))
        assert all(map(torch.equal, parameters, theirs))
    skipped = {number for number, row in enumerate(ours) if row[1]}
    assert skipped >= {5, 6, 50}
    assert len({row[0] for row in ours}) > 2  # it went up and down
    assert all(p.isfinite().all() for *_, parameters in ours for p in parameters)


def test_the_scale_by_hand():
    """Two finite steps double it; one that is not halves it and begins the count again."""
    rule, scale, count, seen = Rule(growth_interval=2), 8.0, 0, []
    for finite in (True, True, True, False, True, True, False, False):
        scale, count = next_scale(scale, count, finite, rule)
        seen.append((scale, count))
    expected = [(8, 1), (16, 0), (16, 1), (8, 0), (8, 1), (16, 0), (8, 0), (4, 0)]
    assert seen == expected


def test_a_static_scale_stays():
    state = init(0, 128.0)
    for value in (1.0, torch.inf, 1.0):
        _, state, _ = step([torch.ones(1)], [torch.tensor([value])], state, descend, rule=STATIC)
    assert state.scale == 128.0 and state.optimizer == 2


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_skipped_step_changes_nothing_but_the_scale(bad):
    """One bad number in the last gradient; AdamW's averages and count stay as they were."""
    parameters = [torch.randn(3, 2), torch.randn(4)]
    state = init(adamw.init(parameters), 4.0)
    good = [torch.randn_like(p) for p in parameters]
    parameters, state, _ = step(parameters, good, state, adamw.step)
    poisoned = [good[0], good[1].clone()]
    poisoned[1][3] = bad
    after, skipped, info = step(parameters, poisoned, state, adamw.step)
    assert not info.finite and skipped.optimizer is state.optimizer
    assert all(a is b for a, b in zip(after, parameters, strict=True))
    assert (skipped.scale, skipped.finite_steps) == (2.0, 0)


def test_clipping_sees_the_true_length():
    """Gradients of length 5 under a scale of 1024 are shortened only where 5 is too long."""
    gradients = [torch.tensor([3.0]) * 1024, torch.tensor([4.0]) * 1024]
    for largest, want in ((10.0, (3.0, 4.0)), (1.0, (0.6, 0.8))):
        moved, _, info = step(
            [torch.zeros(1)] * 2, gradients, init(0, 1024.0), descend, largest_norm=largest
        )
        assert [-p.item() / RATE for p in moved] == pytest.approx(want, rel=1e-5)
        assert [g.item() for g in info.gradients] == [3.0, 4.0]
    assert [g.item() for g in clipped([torch.zeros(1)], 1.0)] == [0.0]


def test_small_fp16_gradients_survive_their_unscaling():
    """1e-7 is 1.7 of fp16's smallest number; unscaled in fp16 it would lose nearly all digits."""
    true = 1e-7
    stored = torch.tensor([true * 2.0**16]).half()
    (gradient,) = unscaled([stored], 2.0**16)
    assert gradient.dtype is torch.float32
    assert gradient.item() == pytest.approx(true, rel=2.0**-11)
    assert unscaled([torch.ones(2).double()], 4.0)[0].dtype is torch.float64


def test_the_scale_stops_at_the_ends_of_float32():
    assert next_scale(2.0**127, 0, True, Rule(growth_interval=1)) == (2.0**127, 0)
    with pytest.raises(ValueError, match="the loss itself is"):
        next_scale(2.0**-149, 0, False, DYNAMIC)


def test_a_gradient_that_overflows_in_unscaling_is_skipped():
    """A scale below one makes gradients larger again: finite when scaled is not enough."""
    _, state, info = step([torch.ones(1)], [torch.tensor([3e38])], init(0, 0.25), descend)
    assert not info.finite and state.scale == 0.125


def test_a_gradient_of_size_zero_is_finite():
    _, _, info = step([torch.ones(0)], [torch.ones(0)], init(0), descend)
    assert info.finite


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="no gradients"):
        step([], [], init(0), descend)
    for scale in (0.0, -1.0, torch.inf, torch.nan, 1e39, 1e-60):
        with pytest.raises(ValueError, match="positive and finite"):
            init(0, scale)
