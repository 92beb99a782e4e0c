"""bfloat16 weights under updates that they cannot hold, against float32's own run."""

import pytest
import torch

from implementations.optimizers import adamw
from implementations.precision.formats import BF16
from implementations.precision.narrow_weights import KEEPERS, init, step

TINY = BF16.epsilon / 16  # an eighth of half a spacing at one


def add(parameters, gradients, state):
    """Gradients are the updates themselves."""
    return [p + g for p, g in zip(parameters, gradients, strict=True)], state + 1


def after(name: str, steps: int, update: float, weights: int = 400):
    keeper, parameters = KEEPERS[name], [torch.ones(weights).bfloat16()]
    generator = torch.Generator().manual_seed(1)
    state = init(parameters, keeper, lambda parameters: 0)
    for _ in range(steps):
        gradients = [torch.full((weights,), update)]
        parameters, state = step(parameters, gradients, state, keeper, add, generator)
    assert state.optimizer == steps and parameters[0].dtype is torch.bfloat16
    return parameters[0].float(), state


def test_updates_below_half_a_spacing():
    """160 sixteenths of a spacing are ten: lost, kept, kept, and kept on average."""
    want = 1 + 10 * BF16.epsilon
    assert after("nearest", 160, TINY)[0].eq(1).all()
    for name in ("master", "kahan"):
        assert after(name, 160, TINY)[0].eq(want).all()
    random, _ = after("stochastic", 160, TINY)
    # Each step is a Bernoulli of 1/16 spacings: mean 10, variance 160 · 15 / 256 = 9.4.
    spacings = (random - 1) / BF16.epsilon
    assert abs(spacings.mean() - 10) < 5 * (9.4 / 400) ** 0.5
    assert 4 < spacings.var() < 18


def test_master_weights_are_a_float32_run():
    """AdamW on the master is AdamW in float32, to the bit; the weight is its rounding."""
    wide, keeper = [torch.randn(7, 5), torch.randn(3)], KEEPERS["master"]
    narrow = [p.bfloat16() for p in wide]
    wide = [p.float() for p in narrow]
    state, reference = init(narrow, keeper, adamw.init), adamw.init(wide)
    for _ in range(20):
        gradients = [torch.randn_like(p) for p in wide]
        wide, reference = adamw.step(wide, gradients, reference)
        narrow, state = step(narrow, gradients, state, keeper, adamw.step)
        assert all(map(torch.equal, state.memories, wide))
        assert all(torch.equal(n, w.bfloat16()) for n, w in zip(narrow, wide, strict=True))


def test_kahan_follows_the_float32_run():
    """Weight and memory together have 16 bits of fraction: within a 2^-14 after 50 steps."""
    keeper, wide = KEEPERS["kahan"], [torch.randn(200)]
    narrow = [wide[0].bfloat16()]
    wide = [narrow[0].float()]
    state = init(narrow, keeper, lambda parameters: 0)
    for _ in range(50):
        gradients = [1e-3 * torch.randn(200)]
        wide, _ = add(wide, gradients, 0)
        narrow, state = step(narrow, gradients, state, keeper, add)
    apart = (narrow[0].float() + state.memories[0].float() - wide[0]).abs()
    plain = (wide[0].bfloat16().float() - wide[0]).abs()
    assert apart.max() < 50 * 2.0**-9 * 4e-3 and apart.mean() < plain.mean() / 4


def test_what_was_given_stays_as_it_was():
    for keeper in KEEPERS.values():
        weight = torch.randn(5).bfloat16()
        before, state = weight.clone(), init([weight], keeper, lambda parameters: 0)
        memory = None if state.memories[0] is None else state.memories[0].clone()
        step([weight], [torch.ones(5)], state, keeper, add)
        assert torch.equal(weight, before)
        assert memory is None or torch.equal(memory, state.memories[0])


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"narrow weights are bfloat16, got torch\.float16"):
        init([torch.ones(2).half()], KEEPERS["nearest"], adamw.init)
