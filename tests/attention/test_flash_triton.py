"""FlashAttention's kernels against the equation, on every shape that they have a branch for.

One contract for those in Triton and those in Gluon for Hopper, which only a Hopper GPU can run.

Without a GPU they run in Triton's interpreter, on small shapes; tests marked `cuda` compile them.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch

from implementations.attention.flash import flash_attention_with_log_sum_exp
from implementations.attention.flash_hopper import DIMS as HOPPER_DIMS
from implementations.attention.flash_hopper import backward as backward_hopper
from implementations.attention.flash_hopper import (
    flash_attention_hopper,
    flash_attention_hopper_with_log_sum_exp,
    forward_alone,
)
from implementations.attention.flash_hopper import forward as forward_hopper
from implementations.attention.flash_triton import (
    DIMS,
    backward,
    flash_attention_triton,
    flash_attention_triton_with_log_sum_exp,
    forward,
)
from implementations.attention.streaming import window_mask
from implementations.attention_basic import attention_naive, attention_weights
from implementations.lab.compare import assert_same_accuracy, assert_same_function, error
from implementations.models.decoder import Decoder, DecoderConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.float16  # the interpreter cannot multiply bfloat16
# In float32 a GPU's exp2 is good to a relative 2^-22 by PTX's manual, and scale · log2(e) is
# rounded once, which shifts scores of 12 by another 2^-21. An output is a ratio of two such sums.
EXP2 = 2.0**-20 if torch.cuda.is_available() else 0.0

# Where the interpreter meets a NaN, NumPy says so.
numpy_warns = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# batch, heads, key heads, queries, keys, dim, causal, window
SMALL = [
    (1, 1, 1, 1, 1, 16, False, None),
    (1, 1, 1, 1, 1, 16, True, 1),
    (2, 3, 3, 1, 70, 16, False, None),  # one query, as when decoding
    (1, 2, 2, 1, 70, 16, True, None),
    (1, 2, 1, 63, 63, 16, False, None),
    (1, 2, 1, 65, 33, 16, False, None),  # more queries than keys
    (1, 4, 1, 33, 65, 32, False, None),
    (1, 1, 1, 64, 64, 16, True, None),  # tiles that end where the rows do
    (1, 2, 2, 65, 65, 16, True, None),
    (1, 4, 2, 31, 70, 16, True, None),  # the last query at the last key
    (1, 8, 1, 33, 40, 16, True, None),
    (1, 1, 1, 33, 33, 80, False, None),  # a dim that is no power of two
    (1, 1, 1, 33, 40, 96, True, 20),
    (1, 1, 1, 70, 70, 16, True, 1),  # a query sees itself alone: the output is the value
    (1, 2, 1, 70, 70, 16, True, 2),
    (1, 1, 1, 70, 70, 16, True, 32),  # as wide as a tile
    (1, 2, 1, 70, 90, 16, True, 33),
    (1, 1, 1, 100, 100, 32, True, 63),
    (1, 1, 1, 40, 100, 16, True, 99),
    (1, 1, 1, 70, 70, 16, True, 70),  # as wide as the text: no window
    (1, 1, 1, 17, 17, 256, True, None),
]
HALVES = [
    (1, 1, 1, 1, 1, 64, True, None),  # one query, one key: gradients of zero
    (1, 2, 2, 130, 130, 64, True, None),
    (1, 2, 1, 129, 257, 64, True, 100),  # a whole tile inside the window
    (1, 1, 1, 200, 130, 64, False, None),
    (1, 4, 1, 70, 70, 128, True, None),
    (1, 1, 1, 65, 140, 128, False, None),
    (1, 1, 1, 70, 70, 256, True, 40),
]
LARGE = [
    (2, heads, key_heads, queries, keys, dim, causal, window)
    for dim in DIMS
    for heads, key_heads, queries, keys, causal, window in [
        (4, 4, 257, 257, False, None),
        (4, 1, 1, 1023, True, None),
        (8, 1, 129, 700, True, None),
        (4, 1, 1000, 1000, True, 300),
    ]
]


class Form(NamedTuple):
    """Kernels under one contract, and the plainest inputs that they take."""

    attention: Callable
    with_log_sum_exp: Callable
    dtype: torch.dtype
    dim: int

    def drawn(self, case):
        return drawn((*case[:5], self.dim, *case[6:]), self.dtype)


TRITON = Form(
    flash_attention_triton, flash_attention_triton_with_log_sum_exp, torch.float32, 16
)  # fmt: skip
HOPPER = Form(
    flash_attention_hopper, flash_attention_hopper_with_log_sum_exp, torch.bfloat16, 64
)  # fmt: skip
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
on_hopper = [
    pytest.mark.cuda,
    pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU"),
]
FORMS = pytest.mark.parametrize(
    "form",
    [pytest.param(TRITON, id="triton"), pytest.param(HOPPER, id="hopper", marks=on_hopper)],
)
# The same grid without windows, for the dims of the Hopper kernels; and more blocks, odd shifts.
HOPPER_CASES = [(*case[:-1], None) for case in [*HALVES, *LARGE] if case[5] in HOPPER_DIMS]
HOPPER_CASES += [
    (1, 2, 2, 128, 128, 128, False, None),  # no tail at all
    (1, 2, 1, 300, 4000, 64, True, None),  # a long past
    (3, 11, 11, 1111, 1111, 128, True, None),  # more tiles than multiprocessors: in pairs
    (4, 32, 8, 1100, 1100, 64, True, None),
    (1, 2, 2, 700, 65, 128, False, None),  # more queries than keys
    (1, 2, 1, 500, 8200, 64, True, None),  # three consumers
    (1, 50, 50, 700, 8200, 64, True, None),  # more tiles than multiprocessors
    (1, 3, 3, 500, 8200, 64, False, None),
]


def drawn(case, dtype, device=DEVICE):
    batch, heads, key_heads, queries, keys, dim, *_ = case
    sizes = (heads, queries), (key_heads, keys), (key_heads, keys)
    return [torch.randn(batch, *size, dim, dtype=dtype, device=device) for size in sizes]


def visible(query, key, causal, window):
    """The options that make the equation see what the kernels see: it takes a window as a mask."""
    if window is None:
        return {"causal": causal}
    return {"mask": window_mask(query.shape[-2], key.shape[-2], window, device=query.device)}


def equation(query, key, value, causal, window, scale=None):
    return attention_naive(query, key, value, scale=scale, **visible(query, key, causal, window))


def both(case, form=TRITON, **options):
    causal, window = case[-2:]
    options |= {"causal": causal, "window": window}
    return partial(form.attention, **options), partial(equation, **options)


def order_of_sums(case, query, key, value, upstream):
    """What another order of float32's sums may change in the output and in each gradient.

    dS = P ∘ (dO Vᵀ - rowsum(dO ∘ O)) is zero where a query sees one key, as the difference of two
    sums of the same products. A sum is wrong by at most dim · 2⁻²³ times its products' sizes: the
    matrix unit cuts off the bits that it drops, Fasi et al. 2021, doi:10.7717/peerj-cs.330.
    """
    dim, group = query.shape[-1], query.shape[1] // key.shape[1]
    weights = attention_weights(query, key, **visible(query, key, *case[-2:]))
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    products = upstream.abs() @ value.abs().mT
    products = products + (upstream * (weights @ value)).abs().sum(-1, keepdim=True)
    d_scores = dim**-0.5 * weights * (dim * 2.0**-23 * products)
    d_key = (d_scores.mT @ query.abs()).unflatten(1, (-1, group)).sum(2)
    return torch.zeros_like(upstream), d_scores @ key.abs(), d_key, torch.zeros_like(d_key)


def assert_as_accurate(case, dtype, form=TRITON):
    """As the equation, in a dtype of 16 bits."""
    floor = partial(order_of_sums, case)
    assert_same_accuracy(*both(case, form), *drawn(case, dtype), floor=floor)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_same_function_as_the_equation(case):
    assert_same_function(*both(case), *drawn(case, torch.float64))


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0])
def test_the_scale_is_applied_once_to_scores_and_gradients(scale):
    case = SMALL[8]
    assert_same_function(*both(case, scale=scale), *drawn(case, torch.float64))


@pytest.mark.parametrize("case", SMALL[4:7] + SMALL[9:13], ids=str)
def test_as_accurate_as_the_equation_in_float32(case):
    assert_same_accuracy(*both(case), *drawn(case, torch.float32), known=EXP2)


@pytest.mark.parametrize("case", HALVES, ids=str)
def test_as_accurate_as_the_equation_in_float16(case):
    assert_as_accurate(case, HALF)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [*HALVES, *LARGE], ids=str)
def test_as_accurate_as_the_equation_when_compiled(case, dtype):
    if dtype == torch.float32:
        assert_same_accuracy(*both(case), *drawn(case, dtype), known=EXP2)
    else:
        assert_as_accurate(case, dtype)


@pytest.mark.cuda
@pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", HOPPER_CASES, ids=str)
def test_as_accurate_as_the_equation_on_hopper(case, dtype):
    assert_as_accurate(case, dtype, HOPPER)


@pytest.mark.cuda
@pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("case", HOPPER_CASES, ids=str)
def test_log_sum_exp_and_its_gradient_on_hopper(case):
    """Against the readable form in float64. Scores of 16-bit inputs are exact but for float32's
    sums; the gradients are rounded to 16 bits, a few times."""
    inputs = [x.requires_grad_() for x in drawn(case, torch.bfloat16)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    causal = case[-2]
    total = flash_attention_hopper_with_log_sum_exp(*inputs, causal=causal)[1]
    wanted = flash_attention_with_log_sum_exp(*wide, causal=causal)[1]
    assert total.dtype == torch.float32
    assert error(total, wanted).largest < 1e-4
    upstream = torch.randn_like(total)
    got = torch.autograd.grad(total, inputs[:2], upstream)
    exact = torch.autograd.grad(wanted, wide[:2], upstream.double())
    for gradient, want in zip(got, exact, strict=True):
        seen = error(gradient, want)
        assert seen.mean <= 2**-8 * want.abs().mean()
        assert seen.largest <= 2**-6 * want.abs().max()


@pytest.mark.cuda
@pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")
def test_launches_on_two_streams_do_not_meet():
    """And a launch repeated gives the same bits: nothing is left over from the one before."""
    inputs = [drawn((4, 8, 8, 1024, 1024, 128, True, None), torch.bfloat16) for _ in range(2)]
    wanted = [flash_attention_hopper(*each, causal=True) for each in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(20):
        got = []
        for stream, each in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                got.append(flash_attention_hopper(*each, causal=True))
        torch.cuda.synchronize()
        assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("case", [SMALL[8], SMALL[11], SMALL[16]], ids=str)
def test_log_sum_exp_and_its_gradient_are_those_of_the_readable_form(case):
    """A loss on both results: the gradient of the log-sum-exp joins Δ."""
    options = {"causal": case[-2], "window": case[-1]}

    def weighed(attention, *inputs):
        output, log_sum_exp = attention(*inputs, **options)
        return torch.cat([output, 3 * log_sum_exp[..., None]], -1)

    fast, readable = flash_attention_triton_with_log_sum_exp, flash_attention_with_log_sum_exp
    inputs = drawn(case, torch.float64)
    assert_same_function(partial(weighed, fast), partial(weighed, readable), *inputs)


def test_the_log_sum_exp_alone_has_a_gradient():
    """d logsumexp / d scores is the softmax."""
    query, key, value = drawn(SMALL[4], torch.float64)
    query.requires_grad_()
    flash_attention_triton_with_log_sum_exp(query, key, value)[1].sum().backward()
    weights = attention_weights(query.detach(), key) * 16**-0.5
    torch.testing.assert_close(query.grad, weights @ key, rtol=1e-10, atol=1e-10)


@pytest.mark.cuda
@pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")
def test_strided_inputs_on_hopper():
    """Heads cut from one projection, and columns, which are copied first."""
    packed = torch.randn(2, 140, 3, 4, 64, dtype=torch.bfloat16, device=DEVICE)
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    wanted = flash_attention_hopper(*(x.contiguous() for x in (query, key, value)))
    assert torch.equal(flash_attention_hopper(query, key, value), wanted)
    columns = query.mT.contiguous().mT
    assert torch.equal(flash_attention_hopper(columns, key, value), wanted)


def test_strided_inputs_equal_contiguous_ones():
    """Heads cut from one projection, rows apart, dims apart, one key for all, an odd address."""
    packed = torch.randn(2, 40, 3, 4, 16, dtype=torch.float64, device=DEVICE)
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    wanted = flash_attention_triton(*(x.contiguous() for x in (query, key, value)))
    assert torch.equal(flash_attention_triton(query, key, value), wanted)
    columns = query.mT.contiguous().mT
    assert torch.equal(flash_attention_triton(columns, key, value), wanted)
    shifted = torch.cat([key.flatten()[:1], key.flatten()])[1:].view(key.shape)
    assert torch.equal(flash_attention_triton(query, shifted, value), wanted)
    one = key[:, :1, :1].expand(2, 4, 40, 16)
    torch.testing.assert_close(  # equal keys: the average of the values
        flash_attention_triton(query, one, value),
        value.mean(-2, keepdim=True).expand_as(value),
        rtol=1e-10,
        atol=1e-10,
    )


def test_gradients_that_arrive_strided_are_read_right():
    query, key, value = (x.requires_grad_() for x in drawn(SMALL[8], torch.float64))
    upstream = torch.randn(1, 2, 16, 65, dtype=torch.float64, device=DEVICE).mT
    output = flash_attention_triton(query, key, value, causal=True)
    got = torch.autograd.grad(output, (query, key, value), upstream, retain_graph=True)
    same = torch.autograd.grad(output, (query, key, value), upstream.contiguous())
    assert all(map(torch.equal, got, same))


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
def test_any_number_of_batch_dimensions(batch):
    query, key, value = (torch.randn(*batch, 2, 9, 16, device=DEVICE) for _ in range(3))
    output, total = flash_attention_triton_with_log_sum_exp(query, key, value)
    assert output.shape == query.shape and total.shape == query.shape[:-1]
    torch.testing.assert_close(output, attention_naive(query, key, value), rtol=1e-5, atol=1e-5)


def test_backward_is_the_same_bits_every_time():
    check_repeats(drawn((1, 4, 2, 70, 70, 16, True, None), torch.float32), times=3)


@pytest.mark.cuda
@pytest.mark.parametrize("dim", [64, 128])
def test_a_thousand_backward_passes_are_the_same_bits(dim):
    check_repeats(drawn((2, 8, 2, 1000, 1000, dim, True, None), torch.bfloat16), times=1000)


def check_repeats(inputs, times):
    leaves = [x.requires_grad_() for x in inputs]
    output = flash_attention_triton(*leaves, causal=True)
    upstream = torch.randn_like(output)
    first = torch.autograd.grad(output, leaves, upstream, retain_graph=True)
    for _ in range(times - 1):
        again = torch.autograd.grad(output, leaves, upstream, retain_graph=True)
        assert all(map(torch.equal, again, first))


@pytest.mark.cuda
def test_more_elements_than_32_bits_can_count():
    """2³¹ and some: the last rows, which a wrapped offset would take from elsewhere."""
    rows = 2**31 // 64 + 1000
    query, upstream = (torch.randn(1, 1, rows, 64, dtype=HALF, device="cuda") for _ in range(2))
    key, value = (torch.randn(1, 1, 64, 64, dtype=HALF, device="cuda") for _ in range(2))
    query.requires_grad_()
    output = flash_attention_triton(query, key, value)
    (gradient,) = torch.autograd.grad(output, query, upstream)
    for part in (slice(0, 300), slice(rows - 300, rows)):
        last = query.detach()[:, :, part].requires_grad_()
        wanted = flash_attention_triton(last, key, value)
        (slope,) = torch.autograd.grad(wanted, last, upstream[:, :, part])
        assert torch.equal(output[:, :, part], wanted) and torch.equal(gradient[:, :, part], slope)


@numpy_warns
@FORMS
def test_a_nan_in_a_query_spoils_its_own_row_alone(form):
    query, key, value = form.drawn(SMALL[8])
    wanted = form.attention(query, key, value, causal=True)
    query[0, 0, 40, 3] = torch.nan
    got, total = form.with_log_sum_exp(query, key, value, causal=True)
    assert got[0, 0, 40].isnan().all() and total[0, 0, 40].isnan()
    got[0, 0, 40] = wanted[0, 0, 40] = 0
    assert torch.equal(got, wanted)


@numpy_warns
@FORMS
def test_a_nan_in_a_key_reaches_every_query_that_sees_it(form):
    query, key, value = form.drawn(SMALL[8])
    key[0, 1, 30, 5] = torch.nan
    got = form.attention(query, key, value, causal=True)
    assert got[0, 1, 30:].isnan().all() and not got[0, 0].isnan().any()
    assert not got[0, 1, :30].isnan().any()


@FORMS
def test_a_hidden_key_does_not_matter_however_large_it_is(form):
    """Its score must not enter the maximum: all that is visible would vanish beside it."""
    query, key, value = form.drawn(SMALL[8])
    wanted = form.attention(query, key, value, causal=True)
    key[:, :, 40] *= 1e4  # in one tile with queries that do not see it
    got = form.attention(query, key, value, causal=True)
    assert torch.equal(got[:, :, :40], wanted[:, :, :40])


@numpy_warns
def test_an_infinite_score_is_nan_and_scores_of_minus_infinity_are_zeros():
    """As in the equation: inf - inf has no value; a query that sees nothing gets zeros."""
    query, key, value = drawn((1, 1, 1, 40, 40, 16, False, None), torch.float32)
    key = key.abs()
    query[0, 0, 3], query[0, 0, 7] = torch.inf, -torch.inf
    got, total = flash_attention_triton_with_log_sum_exp(query, key, value)
    assert got[0, 0, 3].isnan().all()
    assert got[0, 0, 7].eq(0).all() and total[0, 0, 7] == -torch.inf
    assert error(got[0, 0, 8:], attention_naive(query, key, value)[0, 0, 8:]).largest < 1e-5


def test_huge_and_tiny_scores_stay_finite():
    """Scores of ±10⁵ pick one key; scores of 10⁻³⁰ average all."""
    query, key, value = drawn(SMALL[4], torch.float32)
    for size in (1e5, 1e-30):
        got = flash_attention_triton(query * size, key, value)
        wanted = attention_naive(query.double() * size, key.double(), value.double())
        assert error(got, wanted).largest < 2e-2 if size > 1 else 1e-6


def inputs_of(*shapes, dtype=torch.float32):
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


PLAIN = [(1, 2, 8, 16)] * 3
BAD = {
    "two dimensions": (inputs_of(*[(8, 16)] * 3), {}, "heads, positions, dim"),
    "mixed dtypes": ([*inputs_of(*PLAIN[:2]), torch.randn(1, 2, 8, 16).half()], {}, "share one"),
    "integers": (inputs_of(*PLAIN, dtype=torch.int32), {}, "floating-point dtype"),
    "float8": (inputs_of(*PLAIN, dtype=torch.float8_e4m3fn), {}, "kernels compute in"),
    "dim 24": (inputs_of(*[(1, 2, 8, 24)] * 3), {}, "one dim of"),
    "dim 512": (inputs_of(*[(1, 2, 8, 512)] * 3), {}, "one dim of"),
    "dim 1": (inputs_of(*[(1, 2, 8, 1)] * 3), {}, "one dim of"),
    "values of another dim": (inputs_of(*PLAIN[:2], (1, 2, 8, 32)), {}, "values of 32"),
    "keys of another dim": (inputs_of(PLAIN[0], *[(1, 2, 8, 32)] * 2), {}, "same dim"),
    "no queries": (inputs_of((1, 2, 0, 16), *PLAIN[1:]), {}, "at least one"),
    "no keys": (inputs_of(PLAIN[0], *[(1, 2, 0, 16)] * 2), {}, "at least one"),
    "no batch": (inputs_of(*[(0, 2, 8, 16)] * 3), {}, "at least one text"),
    "no heads": (inputs_of(*[(1, 0, 8, 16)] * 3), {}, "at least one"),
    "two texts and three": (inputs_of((2, 2, 8, 16), *[(3, 2, 8, 16)] * 2), {}, "batch sizes"),
    "fewer values than keys": (inputs_of(*PLAIN[:2], (1, 2, 7, 16)), {}, "has a value"),
    "3 heads for 2": (inputs_of((1, 3, 8, 16), *PLAIN[1:]), {}, "shared evenly"),
    "more queries, causal": (
        inputs_of((1, 2, 9, 16), *PLAIN[1:]), {"causal": True}, "queries <= keys",
    ),
    "a window that is not causal": (inputs_of(*PLAIN), {"window": 4}, "causal must be True"),
    "an empty window": (inputs_of(*PLAIN), {"causal": True, "window": 0}, "own token"),
    "a mask": (inputs_of(*PLAIN), {"mask": torch.ones(8, 8, dtype=torch.bool)}, "no mask"),
    "a scale of zero": (inputs_of(*PLAIN), {"scale": 0.0}, "positive"),
    "a negative scale": (inputs_of(*PLAIN), {"scale": -1.0}, "positive"),
    "a scale that is not a number": (inputs_of(*PLAIN), {"scale": float("nan")}, "finite"),
    "a scale without end": (inputs_of(*PLAIN), {"scale": float("inf")}, "finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_the_rule(name, unchecked):
    inputs, options, rule = BAD[name]
    with pytest.raises(ValueError, match=rule):
        flash_attention_triton(*inputs, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is interpreted")
def test_the_interpreter_refuses_the_dtype_that_it_gets_wrong():
    with pytest.raises(ValueError, match="interpreter cannot multiply bfloat16"):
        flash_attention_triton(*inputs_of(*PLAIN, dtype=torch.bfloat16))


@pytest.mark.cuda
def test_a_cpu_tensor_is_refused_where_there_is_a_gpu():
    with pytest.raises(ValueError, match="run on a CUDA GPU"):
        flash_attention_triton(*(x.cpu() for x in inputs_of(*PLAIN)))


@pytest.mark.cuda
@pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_operators_for_hopper_are_registered_as_torch_asks():
    query, key, value = HOPPER.drawn((1, 2, 1, 9, 9, 64, True, None))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    leaf = query.clone().requires_grad_()
    torch.library.opcheck(forward_hopper, (leaf, key, value, True, 0.25), test_utils=tests)
    alone = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward_alone, (query, key, value, True, 0.25), test_utils=alone)
    output, total = forward_hopper(query, key, value, True, 0.25)
    saved = (query, key, value, output, total, torch.randn_like(output), None)
    torch.library.opcheck(backward_hopper, (*saved, True, 0.25), test_utils=tests)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("window", [None, 5])
def test_the_operators_are_registered_as_torch_asks(window):
    query, key, value = drawn((1, 2, 1, 9, 9, 16, True, None), torch.float32)
    options = (True, window, 0.25)
    torch.library.opcheck(forward, (query.requires_grad_(), key, value, *options))
    output, total = forward(query.detach(), key, value, *options)
    saved = (query.detach(), key, value, output, total, torch.randn_like(output), None)
    torch.library.opcheck(backward, (*saved, *options))


def test_compiled_whole_it_gives_the_same(unchecked):
    inputs = [x.requires_grad_() for x in drawn(SMALL[8], torch.float32)]
    step = lambda *x: (flash_attention_triton(*x, causal=True) * x[0]).sum()  # noqa: E731
    got = torch.autograd.grad(torch.compile(step, fullgraph=True)(*inputs), inputs)
    wanted = torch.autograd.grad(step(*inputs), inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_for_a_gpu_it_is_one_graph_too():
    """Interpreted kernels and compiled ones are other objects to torch.compile. Fake tensors on a
    GPU that nobody needs to have pass through the second kind."""
    script = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from implementations.attention.flash_triton import INTERPRETED, flash_attention_triton

assert not INTERPRETED
with FakeTensorMode():
    inputs = [torch.empty(1, 2, 65, 16, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    attend = lambda *x: 2 * flash_attention_triton(*x, causal=True)
    graph = torch._dynamo.export(attend, aten_graph=False)(*inputs).graph_module
    print(graph.code.count("ml_studies.flash_attention"))
"""
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "1", run.stderr


def test_a_decoder_takes_it_as_its_attention():
    shape = DecoderConfig(
        vocabulary=50, width=64, layers=2, heads=4, key_value_heads=2, hidden=64, positions=64
    )
    slow = Decoder(shape).to(DEVICE)
    fast = Decoder(shape, flash_attention_triton).to(DEVICE)
    fast.load_state_dict(slow.state_dict())
    tokens = torch.randint(50, (2, 33), device=DEVICE)
    torch.testing.assert_close(fast(tokens), slow(tokens), rtol=1e-4, atol=1e-5)
