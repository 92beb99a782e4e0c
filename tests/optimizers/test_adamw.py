"""AdamW against torch's, 200 steps, and by hand."""

import pytest
import torch

from implementations.optimizers.adamw import AdamWState, init, step

OPTIONS = {"learning_rate": 0.03, "betas": (0.8, 0.95), "epsilon": 1e-3, "weight_decay": 0.2}


def torchs(parameters, gradients, options):
    """The parameters after one step of torch.optim.AdamW for each set of gradients."""
    leaves = [p.clone().requires_grad_() for p in parameters]
    named = {"lr": options["learning_rate"], "betas": options["betas"], "eps": options["epsilon"]}
    optimizer = torch.optim.AdamW(leaves, weight_decay=options["weight_decay"], **named)
    for slopes in gradients:
        for leaf, slope in zip(leaves, slopes, strict=True):
            leaf.grad = slope
        optimizer.step()
    return [leaf.detach() for leaf in leaves]


def test_equals_torch_for_200_steps():
    parameters = [torch.randn(s, dtype=torch.float64) for s in ((5, 7), (3,), (1,))]
    gradients = [[torch.randn_like(p) for p in parameters] for _ in range(200)]
    ours, state = parameters, init(parameters)
    for slopes in gradients:
        ours, state = step(ours, slopes, state, **OPTIONS)
    assert state.steps == 200
    for got, want in zip(ours, torchs(parameters, gradients, OPTIONS), strict=True):
        assert (got - want).abs().max() < 1e-12


def test_the_first_step_by_hand():
    """Corrected, the averages are the gradient and its square: the step is η · sign, plus decay."""
    parameters, gradients = (
        [torch.tensor([2.0, -4.0]).double()],
        [torch.tensor([0.5, 3.0]).double()],
    )
    moved, _ = step(parameters, gradients, init(parameters), learning_rate=0.1, epsilon=0.0)
    assert moved[0].tolist() == pytest.approx([2 * 0.999 - 0.1, -4 * 0.999 - 0.1])


def test_nothing_given_is_changed():
    parameters, gradients = [torch.randn(4)], [torch.randn(4)]
    before, state = parameters[0].clone(), init(parameters)
    step(parameters, gradients, state)
    assert torch.equal(parameters[0], before) and not state.first[0].any() and state.steps == 0


def test_narrow_parameters_have_wide_averages():
    parameters = [torch.randn(4).bfloat16()]
    moved, state = step(parameters, parameters, init(parameters))
    assert moved[0].dtype is torch.bfloat16
    assert state.first[0].dtype is state.second[0].dtype is torch.float32


P = [torch.ones(3), torch.ones(2)]
BAD = {
    "no parameters": ([], [], {}, "at least one"),
    "a gradient missing": (P, P[:1], {}, "2 parameters need as many gradients and averages"),
    "a gradient too many": (P, [*P, P[0]], {}, "got 3 and 2, 2"),
    "gradient of another shape": (P, P[::-1], {}, r"gradient of parameter 0 has the shape \(2,\)"),
    "negative rate": (P, P, {"learning_rate": -0.1}, "learning rate is not negative, got -0.1"),
    "rate not a number": (P, P, {"learning_rate": float("nan")}, "not negative, got nan"),
    "negative epsilon": (P, P, {"epsilon": -1e-8}, "epsilon is not negative, got -1e-08"),
    "negative decay": (P, P, {"weight_decay": -1.0}, "decay is not negative, got -1.0"),
    "beta one": (P, P, {"betas": (0.9, 1.0)}, r"averages need 0 <= beta < 1, got \(0.9, 1.0\)"),
    "beta negative": (P, P, {"betas": (-0.1, 0.9)}, "averages need 0 <= beta < 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_sentence(case):
    parameters, gradients, options, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        step(parameters, gradients, init(parameters), **options)


def test_averages_of_another_shape_are_refused():
    state = AdamWState(0, [torch.zeros(3), torch.zeros(3)], init(P).second)
    with pytest.raises(ValueError, match=r"the first of parameter 1 has the shape \(3,\)"):
        step(P, P, state)
