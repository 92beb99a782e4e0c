"""The judges are judged: what they must let pass, and what they must catch."""

import math

import pytest
import torch

from implementations.lab.compare import (
    Error,
    allowed,
    assert_same_accuracy,
    assert_same_function,
    error,
    outputs_and_gradients,
)

INFINITY, NAN = math.inf, math.nan


def float64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_error_of_a_hand_worked_example():
    """|1 - 1|, |2 - 4|, |-3 - 3|, |0 - 0|: the largest is 6 and their mean is 8 / 4."""
    seen = error(torch.tensor([[1.0, 2.0], [-3.0, 0.0]]), torch.tensor([[1.0, 4.0], [3.0, 0.0]]))
    assert seen == Error(largest=6.0, mean=2.0)


def test_error_is_measured_in_float64():
    """1 + 2^-40 is 1 in float32; narrowed first, every error against it would be zero."""
    exact = torch.tensor([1 + 2.0**-40], dtype=torch.float64)
    assert error(torch.ones(1), exact).largest == 2.0**-40


def test_allowed_of_a_hand_worked_example():
    """bfloat16 keeps 8 bits, so its unit of rounding is 1 / 256. naive errs by 0, 1, 0, 0, and the
    exact values are of size 1, 2, 3, 2: at most 2 · 1 + 3 / 256, on average 2 / 4 + 2 / 256 / 2."""
    naive = torch.tensor([1.0, -1.0, 3.0, 2.0], dtype=torch.bfloat16)
    exact = torch.tensor([1.0, -2.0, 3.0, 2.0], dtype=torch.float64)
    assert allowed(naive, exact) == Error(2 + 3 / 256, 0.5 + 1 / 256)
    assert allowed(naive, exact, slack=0.0) == Error(3 / 256, 1 / 256)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_one_correct_rounding_stays_within_the_rounding_that_is_allowed(dtype):
    """Slack 0 leaves only the rounding. Between 1 and 2 it is eps/2 at most and eps/4 on average;
    the limits are that times the largest value and the mean one, so 2 and 1.5 times as wide."""
    exact = torch.rand(10_000, dtype=torch.float64) + 1
    seen, limit = error(exact.to(dtype), exact), allowed(exact.to(dtype), exact, slack=0.0)
    assert seen.largest <= limit.largest < 2.1 * seen.largest
    assert seen.mean <= limit.mean < 1.6 * seen.mean


@pytest.mark.parametrize(
    ("approximate", "exact"), [([NAN, 1.0], [1.0, 1.0]), ([1.0], [NAN]), ([NAN], [NAN])]
)
def test_nan_never_passes(approximate, exact):
    approximate, exact = torch.tensor(approximate), torch.tensor(exact)
    seen = error(approximate, exact)
    assert not seen.largest <= INFINITY and not seen.mean <= INFINITY
    approximate, exact = approximate.double(), exact.double()
    with pytest.raises(AssertionError, match="output"):
        assert_same_function(lambda x: x * 0 + approximate, lambda x: x * 0 + exact, exact * 0 + 1)


def test_nan_in_one_element_of_a_gradient_is_caught():
    """sqrt(x²) is |x|, but its gradient at zero is 0 / 0."""
    x = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    with pytest.raises(AssertionError, match="gradient of input 0"):
        assert_same_function(lambda x: (x**2).sqrt(), torch.abs, x)


def test_equal_infinities_agree_and_excuse_nothing_else():
    """The log density outside its support is -inf in both forms; the rest must still be right."""
    support = torch.tensor([-INFINITY, 0.0, 0.0], dtype=torch.float64)
    assert error(support, support) == Error(0.0, 0.0)
    x = float64(3)
    assert_same_function(lambda x: x + support, lambda x: support + x, x)
    with pytest.raises(AssertionError, match="output"):
        assert_same_function(lambda x: x + support + 1e-6, lambda x: x + support, x)
    with pytest.raises(AssertionError, match="output"):
        assert_same_function(lambda x: x, lambda x: x + support, x)
    with pytest.raises(AssertionError, match="output"):
        assert_same_function(lambda x: x + support, lambda x: x - support, x)


def test_where_naive_overflows_nothing_is_called_accurate():
    """300² is more than float16 can hold, so naive's own error there is infinite."""
    x = torch.tensor([300.0, 1.0], dtype=torch.float16)
    with pytest.raises(AssertionError, match="output: largest"):
        assert_same_accuracy(lambda x: x * 7, lambda x: x * x, x)


def test_shapes_must_be_equal_not_only_broadcastable():
    with pytest.raises(ValueError, match=r"\(3, 1\) and \(1, 3\)"):
        error(torch.ones(3, 1), torch.ones(1, 3))
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)shape"):
        assert_same_function(lambda x: x[:, None], lambda x: x, float64(3))


class WrongGradient(torch.autograd.Function):
    """x² with the gradient of x² / 2."""

    @staticmethod
    def forward(context, x):
        context.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(context, upstream):
        (x,) = context.saved_tensors
        return upstream * x


class CarelessSoftmax(torch.autograd.Function):
    """softmax whose backward forgets to subtract each row's mean gradient."""

    @staticmethod
    def forward(context, x):
        weights = x.softmax(-1)
        context.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(context, upstream):
        (weights,) = context.saved_tensors
        return weights * (upstream - 1)


def test_same_function_passes_two_forms_of_one_function():
    """Two inputs, one of them narrower; order of summation is all that differs."""
    assert_same_function(
        lambda x, y: torch.einsum("ij,j->i", x, y),
        lambda x, y: (x * y).sum(-1),
        float64(7, 63),
        float64(63),
    )


def test_same_function_catches_one_part_in_a_hundred_million():
    x = float64(5, 7)
    assert_same_function(lambda x: x.sin() * (1 + 1e-12), torch.sin, x)
    with pytest.raises(AssertionError, match="output"):
        assert_same_function(lambda x: x.sin() * (1 + 1e-8), torch.sin, x)


def test_same_function_is_relative_to_large_values_and_absolute_for_small_ones():
    x = float64(5, 7).abs() + 1
    assert_same_function(lambda x: x * 1e6 + 1e-5, lambda x: x * 1e6, x)
    with pytest.raises(AssertionError, match="output"):
        assert_same_function(lambda x: x * 1e-6 + 1e-5, lambda x: x * 1e-6, x)


def test_same_function_catches_a_wrong_gradient_behind_a_right_output():
    with pytest.raises(AssertionError, match="gradient of input 0"):
        assert_same_function(WrongGradient.apply, torch.square, float64(4))


def test_same_function_says_which_input_has_the_wrong_gradient():
    with pytest.raises(AssertionError, match="gradient of input 1"):
        assert_same_function(
            lambda x, y: x + WrongGradient.apply(y), lambda x, y: x + y * y, float64(4), float64(4)
        )


def test_same_function_catches_what_an_upstream_of_ones_would_hide():
    """Rows of a softmax sum to one, so under an upstream of ones its gradient is zero; the careless
    one is too."""
    x = float64(3, 5)
    ones = torch.ones_like(x)
    _, hidden = outputs_and_gradients(CarelessSoftmax.apply, [x], ones)
    assert hidden.abs().max() == 0
    with pytest.raises(AssertionError, match="gradient of input 0"):
        assert_same_function(CarelessSoftmax.apply, lambda x: x.softmax(-1), x)


def test_same_function_catches_a_form_that_lost_its_gradient():
    with pytest.raises(AssertionError, match="gradient of input 0"):
        assert_same_function(lambda x: x.detach().sin(), torch.sin, float64(4))


def test_same_function_is_asked_in_float64():
    """float32 agrees with itself to 1e-7 at best: there the question has no answer."""
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match=str(dtype)):
            assert_same_function(torch.sin, torch.sin, float64(3), torch.ones(3, dtype=dtype))


def test_gradients_are_those_of_the_closed_form():
    """d(x y)/dx · u = y u; an input that is not used has gradient zero; integers have none."""
    x, y, unused, upstream = (float64(3) for _ in range(4))
    order = torch.tensor([2, 0, 1])
    output, to_x, to_y, to_unused = outputs_and_gradients(
        lambda x, order, y, unused: (x * y)[order], [x, order, y, unused], upstream
    )
    back = upstream[order.argsort()]
    torch.testing.assert_close(output, (x * y)[order], rtol=0, atol=0)
    torch.testing.assert_close(to_x, back * y, rtol=0, atol=0)
    torch.testing.assert_close(to_y, back * x, rtol=0, atol=0)
    assert to_unused.tolist() == [0.0, 0.0, 0.0]
    assert x.grad is None and not x.requires_grad  # the caller's tensors are left alone


def test_integers_go_in_as_they_are():
    """Token numbers into a table with parameters of its own: only the outputs are compared."""
    table = torch.nn.Embedding(5, 3, dtype=torch.float64)
    tokens = torch.tensor([[0, 4, 2]])
    assert_same_function(table, lambda tokens: table.weight[tokens], tokens)
    with pytest.raises(AssertionError, match="output"):
        assert_same_function(table, lambda tokens: table.weight[tokens - 1], tokens)
    narrow = torch.randn(5, 3).bfloat16()
    assert_same_accuracy(lambda x, t: x[t] * 3, lambda x, t: 3 * x[t], narrow, tokens)


def test_empty_tensors_agree():
    assert error(torch.empty(0, 3), torch.empty(0, 3)) == Error(0.0, 0.0)
    assert allowed(torch.empty(0, 3), torch.empty(0, 3)) == Error(0.0, 0.0)
    assert_same_function(torch.sin, torch.sin, float64(0, 3))
    assert_same_accuracy(torch.sin, torch.sin, torch.empty(0, 3, dtype=torch.bfloat16))


def sum_widely(x):
    """In float64, rounded once: no sum in the dtype of x is better."""
    return x.double().sum(-1).to(x.dtype)


def sum_narrowly(x):
    """Rounded to the dtype of x after every addition."""
    total = torch.zeros_like(x[..., 0])
    for column in x.unbind(-1):
        total = total + column
    return total


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_same_accuracy_passes_a_correctly_rounded_form(dtype):
    """Nothing of this dtype is nearer to the exact answer, so it passes for every input."""
    for shape in [(1, 1), (3, 63), (257, 128)]:
        assert_same_accuracy(sum_widely, lambda x: x.sum(-1), torch.randn(shape).to(dtype))


def test_same_accuracy_catches_a_narrow_accumulator():
    x = torch.rand(257, 256).bfloat16()
    with pytest.raises(AssertionError, match="output"):
        assert_same_accuracy(sum_narrowly, lambda x: x.sum(-1), x)


def test_same_accuracy_finds_by_the_mean_what_the_largest_error_hides():
    """One row that naive gets badly wrong raises the largest allowed error above that of a form
    three times as wrong everywhere else."""
    factor = torch.full((1000,), 1 + 2.0**-6)
    naive = factor.clone()
    naive[0] = 1.5
    x = torch.ones(1000).bfloat16()

    def against_one(factor):
        return lambda x: x if x.dtype == torch.float64 else (x * factor).to(x.dtype)

    worse = 1 + (factor - 1) * 3
    seen = error(against_one(worse)(x), x.double())
    limit = allowed(against_one(naive)(x), x.double())
    assert seen.largest < limit.largest and seen.mean > limit.mean
    with pytest.raises(AssertionError, match="output: mean"):
        assert_same_accuracy(against_one(worse), against_one(naive), x)


def test_same_accuracy_finds_by_the_largest_error_what_the_mean_hides():
    """One wrong value in ten thousand moves the mean by 1e-5 of it."""
    x = torch.rand(10_000).bfloat16() + 1
    spike = torch.zeros(10_000, dtype=torch.bfloat16)
    spike[77] = 0.125
    with pytest.raises(AssertionError, match="output: largest"):
        assert_same_accuracy(lambda x: x * 1.7 + spike.to(x.dtype), lambda x: x * 1.7, x)


def test_same_accuracy_catches_an_inaccurate_gradient():
    """The output is naive's; the gradient is wrong by 2^-5, eight roundings of bfloat16."""

    class Coarse(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x * 2

        @staticmethod
        def backward(context, upstream):
            return (upstream * 2 * (1 + 2.0**-5)).to(upstream.dtype)

    with pytest.raises(AssertionError, match="gradient of input 0"):
        assert_same_accuracy(Coarse.apply, lambda x: x * 2, torch.randn(100).bfloat16())


def test_same_accuracy_catches_an_output_of_another_dtype():
    """float32 out of bfloat16 is more accurate, and not what naive promises."""
    with pytest.raises(AssertionError, match="float32"):
        assert_same_accuracy(lambda x: x.float() * 2, lambda x: x * 2, torch.randn(5).bfloat16())


def test_a_known_error_is_allowed_on_top_and_no_more():
    """Every number off by a thousandth of itself: allowed if a thousandth is known, not half."""
    x = torch.rand(1000) + 1
    wrong = lambda x: 2 * x * (1 + 1e-3)  # noqa: E731
    assert_same_accuracy(wrong, lambda x: 2 * x, x, known=1.01e-3)
    with pytest.raises(AssertionError, match="error"):
        assert_same_accuracy(wrong, lambda x: 2 * x, x, known=0.5e-3)


def test_a_floor_is_the_least_limit_and_adds_nothing_to_a_larger_one():
    """Naive's x - x is zero by luck. A floor below the rounding that is allowed allows no more."""
    x = torch.rand(1000) + 1
    off = lambda x: x - x + 1e-6  # noqa: E731
    floor = lambda size: lambda x, upstream: (torch.full_like(x, size), torch.zeros_like(x))  # noqa: E731
    assert_same_accuracy(off, lambda x: x - x, x, floor=floor(1.01e-6))
    with pytest.raises(AssertionError, match="output"):
        assert_same_accuracy(off, lambda x: x - x, x, floor=floor(0.99e-6))
    with pytest.raises(AssertionError, match="output"):
        assert_same_accuracy(lambda x: x + 2e-7, lambda x: x + 0, x, floor=floor(1e-8))
