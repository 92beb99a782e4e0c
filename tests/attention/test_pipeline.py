"""The pipeline's steps: as cycles that can be added up by hand, and as kernels on a Hopper GPU.

tests/test_ahead_of_time.py compiles one of the kernels; the test marked `full` compiles the others.
"""

import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from implementations.attention.pipeline import (
    COPY,
    COPY_LATENCY,
    PROGRAM_START,
    STEPS,
    Costs,
    Line,
    Moment,
    Multiprocessor,
    copied_bytes,
    kernel_cycles,
    lost_in_a_block,
    simulate,
    useful_operations,
)
from implementations.attention_basic import attention_naive
from implementations.lab.compare import assert_same_accuracy

gluon = pytest.importorskip(
    "implementations.attention.pipeline_hopper", reason="Triton is not built for this platform"
)

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
on_hopper = [
    pytest.mark.cuda,
    pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU"),
]


def test_cycles_of_a_block_by_hand():
    """4 · 128³ operations at 4,096 a cycle; 128² exponentials at 16; maxima at 64; 128 lanes."""
    assert Costs.of(128) == (1024, 256, 1024, 128)
    assert Costs.of(64) == (512, 128, 512, 64)
    assert COPY == 512


def test_steps_without_overlap_are_sums():
    everything = 2 * 1024 + 256 + 1024 + 128
    assert Line.of("copies ahead").block == everything
    assert Line.of("in turn").block == everything + 2 * (COPY + COPY_LATENCY)


def test_in_step_two_consumers_are_one():
    """And in flight, P V hides below the softmax: scores, softmax, and shrinking remain."""
    assert Line.of("two consumers", in_step=True).block == Line.of("copies ahead").block
    assert Line.of("products in flight", in_step=True).block == 1024 + 256 + 1024 + 128


def test_a_delay_is_hidden_only_by_the_other_warpgroup():
    """A warpgroup's own 1,728 cycles leave 320 of 2,048 free; beyond those nothing hides it."""
    assert Line.of("copies ahead", delay=100).block == 3456 + 100
    assert Line.of("products in flight", in_step=True, delay=100).block == 2432 + 100
    assert Line.of("two consumers", delay=320).block == 2048
    assert Line.of("two consumers", delay=420).block >= 2048 + 100


@pytest.mark.parametrize("step", list(STEPS)[2:])
def test_taking_turns_the_products_never_rest(step):
    assert Line.of(step).block == 2048


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("in_step", [False, True])
def test_all_work_is_done_once_and_no_unit_does_two_things(step, in_step):
    tiles = [3, 1, 2]
    end, spans = simulate(step, tiles, in_step)
    blocks = sum(tiles)
    wanted = {
        "products": 2 * 1024 * blocks,
        "exponentials": 1024 * blocks,
        "copies": COPY * 2 * blocks,
    }
    for unit, cycles in wanted.items():
        own = sorted((s for s in spans if s.unit == unit), key=lambda span: span.start)
        assert all(a.stop <= b.start for a, b in pairwise(own))
        busy = sum(span.stop - span.start for span in own)
        if unit == "copies":  # the tiles' queries and outputs besides
            assert busy > cycles and own[-1].stop + COPY_LATENCY == end
        else:
            assert busy == pytest.approx(cycles)


def test_a_slot_is_filled_again_only_when_all_have_read_it():
    """Beside blocks that take long, the third copy of keys starts with the end of a Q Kᵀ."""
    _, spans = simulate("copies ahead", [8])
    products = [span.stop for span in spans if span.unit == "products"]
    copies = [span.start for span in spans if span.who == "producer"]
    assert copies[5] == products[0]  # q, k, v, k, v, and then k
    assert copies[6] == products[1]


def test_actors_that_wait_for_one_another_are_named():
    def waits():
        yield Moment()

    with pytest.raises(ValueError, match="nobody can go on: first, second"):
        Multiprocessor(1).run({"first": waits(), "second": waits()})


def test_whole_launches_by_hand():
    """Two multiprocessors, one head of three tiles: 3 blocks on one, 2 + 1 on the other."""
    line = Line.of("copies ahead")
    start = PROGRAM_START + line.first
    cycles = kernel_cycles("copies ahead", 1, 384, causal=True, programs=2)
    assert cycles == max(start + 3 * line.block, 2 * start + 3 * line.block)
    line = Line.of("persistent")
    start = PROGRAM_START + line.first
    # Four tiles: every second one is 4 and 2 blocks, or 3 and 1; in pairs all have 4 + 1 or 3 + 2.
    cycles = kernel_cycles("persistent", 1, 512, causal=True, programs=2)
    assert cycles == start + line.later + 6 * line.block
    cycles = kernel_cycles("in pairs", 1, 512, causal=True, programs=2)
    assert cycles == start + line.later + 5 * line.block


def test_useful_operations_of_two_products():
    assert useful_operations(3, 256, causal=False) == 3 * 2 * (2 * 256 * 256 * 128)
    assert useful_operations(3, 256, causal=True) == 3 * 2 * (256 * 256 * 128)


def test_bytes_of_two_tiles_by_hand():
    """Queries once; the first tile sees one block of keys and values when causal, else both two."""
    block = 128 * 128 * 2
    assert copied_bytes(1, 256, causal=True) == (2 + 2 * 3) * block
    assert copied_bytes(5, 256, causal=False) == 5 * (2 + 2 * 4) * block


def test_the_delay_that_explains_a_launch_is_found():
    for setting in ((16, 4096, True, 132), (3, 1024, False, 5)):
        cycles = kernel_cycles("copies ahead", *setting, delay=250.0)
        assert lost_in_a_block(cycles, *setting) == pytest.approx(250.0)


def test_every_step_but_the_last_is_a_kernel():
    assert [*gluon.KERNELS, "in pairs"] == list(STEPS)
    consumers = [max(1, schedule.consumers) for schedule in gluon.KERNELS.values()]
    assert consumers == [STEPS[step][0] for step in gluon.KERNELS]


PLAIN = torch.zeros(1, 2, 128, 128, dtype=torch.bfloat16)
BAD = {
    "float32": ([PLAIN.float()] * 3, "bfloat16"),
    "dim 64": ([PLAIN[..., :64]] * 3, "dim 128"),
    "an odd length": ([PLAIN[:, :, :100]] * 3, "multiples of 128"),
    "no length": ([PLAIN[:, :, :0]] * 3, "multiples of 128"),
    "fewer queries": ([PLAIN, *[PLAIN.repeat(1, 1, 2, 1)] * 2], "one shape"),
    "a CPU": ([PLAIN] * 3, "run on a Hopper GPU"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_the_rule(name):
    inputs, rule = BAD[name]
    with pytest.raises(ValueError, match=rule):
        gluon.attention_step(gluon.KERNELS["in turn"], *inputs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("step", [pytest.param(s, marks=on_hopper) for s in gluon.KERNELS])
def test_as_accurate_as_the_equation(step, causal):
    """Fewer tiles than multiprocessors, and more; one block, and more than there are slots."""

    def fast(query, key, value):
        return gluon.attention_step(gluon.KERNELS[step], query, key, value, causal=causal)

    def naive(query, key, value):
        return attention_naive(query, key, value, causal=causal)

    for batch, heads, length in ((1, 1, 128), (2, 3, 640), (2, 19, 1024)):
        inputs = [
            torch.randn(batch, heads, length, 128, device="cuda").bfloat16() for _ in range(3)
        ]
        inputs[0] *= 4
        with torch.no_grad():
            assert_same_accuracy(fast, naive, *inputs)
            assert torch.equal(fast(*inputs), fast(*inputs))


@pytest.mark.full
def test_all_steps_compile_and_keep_their_numbers_in_registers():
    script = """
from implementations.attention.pipeline_hopper import COPIES, COPIES_IN_TURN, KERNELS, variant
from implementations.lab.ahead_of_time import cost

in_turn = cost(variant("in turn", False), 90)
assert in_turn.registers > 128, "two programs fit on a multiprocessor, and hide each other"
KERNELS |= {"copies": COPIES, "copies in turn": COPIES_IN_TURN}
for step in KERNELS:
    for causal in (False, True):
        seen = cost(variant(step, causal), 90)
        assert seen.spilled == seen.serial == 0, (step, seen)
"""
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
