"""The kernel steps as the equation and as torch, for tensors of every size in one launch."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not built for this platform")

from implementations.lab.compare import error
from implementations.optimizers.adamw import AdamWState, init, step
from implementations.optimizers.adamw_triton import BLOCK, adamw_op, block_tables, step_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NARROW = [torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
SIZES = [(1,), (63,), (BLOCK,), (BLOCK + 1,), (3, 1366), (), (0,)]
OPTIONS = {"learning_rate": 0.03, "betas": (0.8, 0.95), "epsilon": 1e-3, "weight_decay": 0.2}


def tensors(dtype: torch.dtype, sizes=SIZES) -> list[torch.Tensor]:
    return [torch.randn(s, dtype=torch.float64, device=DEVICE).to(dtype) for s in sizes]


def both(dtype: torch.dtype, steps: int, gradient_dtype=None, sizes=SIZES):
    """Parameters and states after some steps, of the kernel and of the equation in float64."""
    start = tensors(dtype, sizes)
    ours, state = [p.clone() for p in start], init(start)
    exact = [p.double() for p in start]
    exact_state = init(exact)
    for _ in range(steps):
        slopes = tensors(gradient_dtype or dtype, sizes)
        state = step_(ours, slopes, state, **OPTIONS)
        exact, exact_state = step(exact, [s.double() for s in slopes], exact_state, **OPTIONS)
    return ours, state, exact, exact_state


def test_same_function():
    ours, state, exact, exact_state = both(torch.float64, 5)
    assert state.steps == exact_state.steps == 5
    for got, want in zip(
        ours + state.first + state.second,
        exact + exact_state.first + exact_state.second,
        strict=True,
    ):
        assert error(got, want).largest < 1e-12


def test_200_steps_in_float32_stay_with_torchs():
    """Each step may round a weight once; and torch, on the same gradients, is as far away."""
    start = tensors(torch.float32, [(700,)])
    ours, state = [start[0].clone()], init(start)
    exact, exact_state = [start[0].double()], init([start[0].double()])
    leaf = start[0].clone().requires_grad_()
    names = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2}
    optimizer = torch.optim.AdamW([leaf], **names)
    for _ in range(200):
        slopes = tensors(torch.float32, [(700,)])
        leaf.grad = slopes[0]
        optimizer.step()
        state = step_(ours, slopes, state, **OPTIONS)
        exact, exact_state = step(exact, [slopes[0].double()], exact_state, **OPTIONS)
    own, theirs = error(ours[0], exact[0]), error(leaf, exact[0])
    assert own.mean <= 2 * theirs.mean and own.largest <= 2 * theirs.largest
    assert own.largest < 200 * torch.finfo(torch.float32).eps / 2 * start[0].abs().max()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_narrow_parameters(dtype):
    """Rounded once a step: at most half a unit in the last place away for each."""
    ours, _, exact, _ = both(dtype, 1)
    for got, want in zip(ours, exact, strict=True):
        if want.numel():
            unit = torch.finfo(dtype).eps / 2
            assert error(got, want).largest <= unit * want.abs().max() * 1.001


def test_wide_parameters_with_narrow_gradients():
    ours, _, exact, _ = both(torch.float32, 2, torch.float16)
    for got, want in zip(ours, exact, strict=True):
        assert error(got, want).largest < 1e-6


def test_tensors_at_odd_addresses():
    """A view that starts 4 bytes into 16: no wide loads, the same numbers."""
    whole = torch.randn(5000, device=DEVICE)
    parameters, slopes = [whole[1:4000]], [torch.randn(3999, device=DEVICE)]
    exact, _ = step(parameters, slopes, init(parameters), **OPTIONS)
    step_(parameters, slopes, init(parameters), **OPTIONS)
    torch.testing.assert_close(parameters, exact)


def test_neighbours_in_memory_are_left_alone():
    whole = torch.ones(300, device=DEVICE)
    step_([whole[100:200]], [torch.ones(100, device=DEVICE)], init([whole[100:200]]))
    assert (whole[:100] == 1).all() and (whole[200:] == 1).all() and (whole[100:200] < 1).all()


def test_blocks_cover_every_tensor():
    owners, starts, sizes = block_tables((3, BLOCK, BLOCK + 1, 0, 2 * BLOCK), torch.device("cpu"))
    assert owners.tolist() == [0, 1, 2, 2, 4, 4]
    assert starts.tolist() == [0, 0, 0, BLOCK, 0, BLOCK]
    assert sizes.tolist() == [3, BLOCK, BLOCK + 1, 0, 2 * BLOCK]


def test_parameters_that_learn_are_updated():
    parameter = torch.nn.Parameter(torch.ones(5, device=DEVICE))
    (parameter**2).sum().backward()
    step_([parameter], [parameter.grad], init([parameter]), learning_rate=0.1)
    assert torch.allclose(parameter, torch.full_like(parameter, 0.899))


def test_torch_library():
    p, g = ([t for t in tensors(torch.float32) if t.numel()] for _ in range(2))
    settings = [0.9, 0.99, 0.1, 0.01, 1.0, 0.1, 1.0, 1e-8]
    zeros = [torch.zeros_like(t) for t in p], [torch.zeros_like(t) for t in p]
    torch.library.opcheck(adamw_op, (p, g, *zeros, settings))


P = [torch.ones(3), torch.ones(2)]
HALF = [p.half() for p in P]
BAD = {
    "no parameters": ([], [], {}, "at least one"),
    "a gradient missing": (P, P[:1], {}, "2 parameters need as many gradients and averages"),
    "gradient of another shape": (P, P[::-1], {}, r"gradient of parameter 0 has the shape \(2,\)"),
    "negative rate": (P, P, {"learning_rate": -0.1}, "learning rate is not negative"),
    "negative epsilon": (P, P, {"epsilon": -1e-8}, "epsilon is not negative, got -1e-08"),
    "negative decay": (P, P, {"weight_decay": -1.0}, "decay is not negative, got -1.0"),
    "beta one": (P, P, {"betas": (0.9, 1.0)}, "averages need 0 <= beta < 1"),
    "parameters of two dtypes": ([P[0], HALF[1]], P, {}, "parameters are floats of one dtype"),
    "gradients of two dtypes": (P, [P[0], HALF[1]], {}, "gradients are floats of one dtype"),
    "integers": ([p.int() for p in P], P, {}, r"one dtype, got \['torch.int32'\]"),
    "gradients of integers": (P, [p.int() for p in P], {}, "gradients are floats of one dtype"),
    "gradients elsewhere": (P, [p.to("meta") for p in P], {}, "gradients stand on one device"),
    "one gradient elsewhere": (P, [P[0], P[1].to("meta")], {}, "gradients stand on one device"),
    "gaps": ([torch.ones(6)[::2], P[1]], P, {}, "parameters are dense"),
    "a transposed gradient": ([torch.ones(2, 3)], [torch.ones(3, 2).T], {}, "gradients are dense"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_sentence(case):
    parameters, gradients, options, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        step_(parameters, gradients, init(parameters), **options)


def test_narrow_averages_are_refused():
    state = AdamWState(0, HALF, HALF)
    with pytest.raises(ValueError, match=r"averages are torch.float32, got torch.float16"):
        step_(P, P, state)
