"""What can be known of the Hopper kernels without a Hopper GPU; test_flash_triton.py runs them.

Gluon has no interpreter, but the kernels before and after its backward are Triton's and have one.
tests/test_ahead_of_time.py compiles all of them.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from implementations.attention import flash_hopper
from implementations.attention.flash import check_flash_inputs
from implementations.attention.flash_hopper import flash_attention_hopper, heads_together, plan
from implementations.attention.flash_hopper_backward import finish_kernel, prepare_kernel
from implementations.attention.flash_hopper_forward import KEYS, ROWS
from implementations.attention.flash_triton import empty_like, tile_of
from implementations.attention.hopper_tiles import COMPILED, launch, tile_at

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = [torch.zeros(1, 2, 8, 64, dtype=torch.bfloat16) for _ in range(3)]
BAD = {
    "float32": ([x.float() for x in PLAIN], {}, "kernels compute in torch.float16, torch.bfloat16"),
    "dim 32": ([x[..., :32] for x in PLAIN], {}, "one dim of"),
    "values of another dim": ([*PLAIN[:2], PLAIN[2][..., :32]], {}, "values of 32"),
    "a window": (PLAIN, {"causal": True, "window": 4}, "know no window"),
    "a mask": (PLAIN, {"mask": torch.ones(8, 8, dtype=torch.bool)}, "takes no mask"),
    "a scale of zero": (PLAIN, {"scale": 0.0}, "positive"),
    "no batch": ([x[:0] for x in PLAIN], {}, "at least one text"),
    "more queries, causal": ([PLAIN[0], *(x[:, :, :7] for x in PLAIN[1:])], {"causal": True}, "<="),
    "a CPU": (PLAIN, {}, "run on a Hopper GPU"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_the_rule(name, unchecked):
    inputs, options, rule = BAD[name]
    with pytest.raises(ValueError, match=rule):
        flash_attention_hopper(*inputs, **options)


def test_what_is_refused_for_its_device_alone_is_good_for_the_readable_form():
    check_flash_inputs(*PLAIN)


@pytest.mark.parametrize("given", [False, True])
def test_prepare_by_the_formulas(given):
    """Δ = rowsum(dO ∘ O) - dL, L to base 2; rows beyond the last get P = 0; dQ starts at zero."""
    output, d_output = (torch.randn(1, 2, 70, 64, device=DEVICE).half() for _ in range(2))
    total, d_total = (torch.randn(1, 2, 70, device=DEVICE) for _ in range(2))
    total[0, 1, 3] = -torch.inf  # a query that saw nothing
    sums = torch.empty(1, 2, 2, 2, 64, device=DEVICE)
    dq_sum = torch.empty(1, 2, 2, 64 * 64, device=DEVICE)
    prepare_kernel[(4,)](
        tile_of(output, 64, 64), tile_of(d_output, 64, 64), total, d_total, sums, dq_sum, 2, 70,
        GIVEN=given, QUERIES=64, DIM=64,
    )  # fmt: skip
    base_2, delta = (sums[:, :, :, i].flatten(2) for i in range(2))
    wanted = (output.double() * d_output.double()).sum(-1) - given * d_total
    torch.testing.assert_close(delta[..., :70].double(), wanted, rtol=1e-5, atol=1e-5)
    right = (total * 1.4426950408889634).masked_fill(total.isinf(), torch.inf)
    torch.testing.assert_close(base_2[..., :70], right)
    assert base_2[..., 70:].eq(torch.inf).all() and delta[..., 70:].eq(0).all()
    assert dq_sum.eq(0).all()


@pytest.mark.parametrize("dim", [64, 128])
def test_finish_undoes_the_order_of_the_registers(dim):
    """Row 16 w + 8 r + t // 4, column 8 c + 2 (t % 4) + i of a warpgroup's result, by its manual,
    is number 2 r + i of block c in thread t of warp w: two such blocks make a thread's four... the
    sum is written here one number at a time."""
    half, heads, queries = dim // 2, 2, 70
    exact = torch.randn(1, heads, 128, dim)
    flat = torch.empty(1, heads, 2, 2, 64 * half)
    for row in range(64):
        warp, inner = divmod(row, 16)
        upper, line = divmod(inner, 8)
        for column in range(half):
            sixteen, rest = divmod(column, 16)
            eight, pair = divmod(rest, 8)
            thread = 4 * line + pair // 2
            four = 2 * eight + pair % 2  # a thread's neighbours: both eights of its row
            at = (((sixteen * 2 + upper) * 4 + warp) * 32 + thread) * 4 + four
            for block in range(2):
                for part in range(2):
                    numbers = exact[:, :, 64 * block + row, half * part + column]
                    flat[:, :, block, part, at] = numbers
    d_query = empty_like(torch.empty(1, heads, queries, dim, device=DEVICE).half())
    finish_kernel[(heads * 2, 2)](
        flat.to(DEVICE), d_query, heads, queries, 0.5, QUERIES=64, DIM=dim
    )
    torch.testing.assert_close(d_query.cpu(), (exact[:, :, :queries] * 0.5).half())


def test_a_descriptor_is_made_once_for_an_address_and_what_lies_there():
    x = torch.zeros(2, 3, 200, 64, dtype=torch.bfloat16)
    tile = tile_at(x, KEYS.value)
    assert tile is tile_at(x.view_as(x), KEYS.value)
    assert tile.base.data_ptr() == x.data_ptr() and tile.strides == [38400, 12800, 64, 1]
    others = x.half(), x[:, :, 1:], x[:, :, :-1], x.transpose(0, 1), x.view(torch.float16)
    assert all(tile is not tile_at(other, KEYS.value) for other in others)
    assert tile is not tile_at(x, ROWS.value)


def test_a_kernel_is_looked_up_once_for_its_constants_and_variant(monkeypatch):
    calls = []

    class Kernel:
        __name__ = "made_up"

        def __getitem__(self, grid):
            def run(*arguments):
                calls.append(("triton", grid, *arguments))
                return {(2, 1, 1): lambda *arguments: calls.append(("kept", *arguments))}

            return run

    for number, constants, variant in [
        (1, (True,), "bf16"), (2, (True,), "bf16"), (3, (False,), "bf16"), (4, (True,), "fp16"),
        (5, (True,), "bf16"),
    ]:  # fmt: skip
        launch(Kernel(), (2, 1, 1), (number,), constants, variant)
    by_triton = [call[2] for call in calls if call[0] == "triton"]
    assert by_triton == [1, 3, 4]
    assert [call for call in calls if call[0] == "kept"] == [("kept", 2, True), ("kept", 5, True)]
    for key in [key for key in COMPILED if key[0] == "made_up"]:
        del COMPILED[key]


@pytest.mark.parametrize(
    "shape, causal, programs, tiles, paired, consumers",
    [
        ((1, 2, 100, 128), True, 2, 2, False, 2),  # fewer tiles than the GPU has multiprocessors
        ((4, 16, 4096, 128), True, 132, 2048, True, 2),
        ((4, 16, 4096, 128), False, 132, 2048, False, 2),
        ((1, 32, 16384, 64), True, 132, 32 * 86, True, 3),
        ((1, 32, 16384, 64), False, 132, 32 * 86, False, 3),
        ((4, 32, 4097, 64), False, 132, 128 * 33, False, 2),
    ],
)
def test_plans(shape, causal, programs, tiles, paired, consumers, monkeypatch):
    monkeypatch.setattr(flash_hopper, "multiprocessors", lambda device: 132)
    made = plan.__wrapped__(shape, shape, causal, "cuda")
    assert made.grid == (programs, 1, 1) and made.sizes[0] == tiles
    assert made.constants[:3] == (causal, paired, consumers)


@pytest.mark.parametrize("heads, keys", [(2, 130), (4, 256)])
def test_a_launch_gives_each_kernel_its_arguments(heads, keys, monkeypatch):
    """Constants last, and those that the inputs ask for; sizes by the grid."""
    launches = []
    monkeypatch.setattr(flash_hopper, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(flash_hopper, "launch", lambda *given: launches.append(given))
    monkeypatch.setattr(flash_hopper, "plan", plan.__wrapped__)
    query = torch.zeros(1, heads, 70, 64).bfloat16()
    key, value = (torch.zeros(1, 2, keys, 64).bfloat16() for _ in range(2))
    output, total = flash_hopper.run_forward(query, key, value, True, 0.125)
    flash_hopper.run_backward(query, key, value, output, total, output, None, True, 0.125)
    given = {}
    for kernel, grid, arguments, constants, variant in launches:
        names = kernel.arg_names
        assert [name.isupper() for name in names] == [False] * len(arguments) + [True] * len(
            constants
        )
        assert variant == (torch.bfloat16, 64, query.device)
        given[kernel.__name__] = grid, dict(zip(names, (*arguments, *constants), strict=True))
    grid, forward = given["forward_kernel"]
    assert grid == (heads, 1, 1) and (forward["queries"], forward["keys"]) == (70, keys)
    grid, backward = given["backward_kernel"]
    assert grid == (2 * -(-keys // 128), 1, 1) and backward["group"] == heads // 2
    assert backward["value"].block_shape == [1, 1, 64, 64]
    flags = {name: backward[name] for name in ("CAUSAL", "TAIL", "GROUPED")}
    assert flags == {"CAUSAL": True, "TAIL": keys == 130, "GROUPED": heads == 4}
    assert given["prepare_kernel"][0] == (2 * heads, 1, 1)
    assert given["finish_kernel"][0] == (2 * heads, 2, 1)


@pytest.mark.parametrize("which", [None, 0, 1, 2])
def test_who_wants_a_gradient_gets_one_and_nobody_else_pays_for_it(which, monkeypatch, unchecked):
    """Without data, and so without a kernel: results as the operators describe them."""
    calls = []

    def spy(name):
        operator = getattr(flash_hopper, name)
        monkeypatch.setattr(flash_hopper, name, lambda *x: calls.append(name) or operator(*x))

    spy("forward")
    spy("forward_alone")
    with FakeTensorMode():
        inputs = [torch.empty(1, 2, 65, 64, device="cuda").bfloat16() for _ in range(3)]
        if which is not None:
            inputs[which].requires_grad_()
        seen = flash_hopper.flash_attention_hopper_with_log_sum_exp(*inputs)
        with torch.no_grad():
            quiet = flash_hopper.flash_attention_hopper_with_log_sum_exp(*inputs)
    assert [x.requires_grad for x in seen] == [which is not None] * 2
    assert not any(x.requires_grad for x in quiet)
    assert calls == ["forward_alone" if which is None else "forward", "forward_alone"]


def test_results_lie_as_the_operator_says_without_data(monkeypatch):
    monkeypatch.setattr(flash_hopper, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(flash_hopper, "launch", lambda *given: None)
    monkeypatch.setattr(flash_hopper, "plan", plan.__wrapped__)
    query, key = (torch.zeros(2, heads, 7, 64).bfloat16() for heads in (6, 3))
    real, fake = (
        run(query, key, key, True, 1.0)
        for run in (flash_hopper.run_forward, flash_hopper.fake_forward)
    )
    for x, y in zip(real, fake, strict=True):
        assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


@pytest.mark.parametrize(
    "planes, rows, at_once, together",
    [(16, 16384, 1, 1), (64, 4096, 4, 4), (6, 1024, 16, 6), (16, 16384, 4, 4), (6, 16384, 4, 3)],
)
def test_heads_that_run_together_divide_all(planes, rows, at_once, together):
    assert heads_together(planes, rows, 128, at_once) == together


def test_for_a_gpu_it_is_one_graph():
    """Fake tensors on a GPU that nobody needs to have: forward and backward keep their shapes."""
    script = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from implementations.attention.flash_hopper import backward, flash_attention_hopper

with FakeTensorMode():
    inputs = [torch.empty(1, 2, 65, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    attend = lambda *x: 2 * flash_attention_hopper(*x, causal=True)
    graph = torch._dynamo.export(attend, aten_graph=False)(*inputs).graph_module
    print(graph.code.count("ml_studies.flash_attention_hopper"))
    total = torch.empty(1, 2, 65, device="cuda")
    gradients = backward(*inputs, inputs[0], total, inputs[0], None, True, 0.125)
    assert [x.shape for x in gradients] == [x.shape for x in inputs]
"""
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "1", run.stderr
