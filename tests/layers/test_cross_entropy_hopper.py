"""The kernel that reads a row once: what it takes, what fits, and on a Hopper GPU all it computes.

Gluon has no interpreter; tests/test_ahead_of_time.py compiles the kernel.
"""

from functools import partial

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton", reason="Triton is not built for this platform")

from implementations.lab.compare import assert_same_accuracy
from implementations.layers import cross_entropy_hopper as hopper
from implementations.layers import cross_entropy_triton as triton_form
from implementations.layers.cross_entropy import cross_entropy_naive
from implementations.layers.cross_entropy_hopper import (
    CHUNK,
    REGISTERS,
    WARPS,
    launch_rows,
    plan,
    reads_once,
)
from implementations.layers.cross_entropy_triton import cross_entropy_triton

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
on_hopper = pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")
EXP2 = 2.0**-21  # of a share and of the sum of all, 2^-22 each, by PTX's manual
# One chunk on the chip and one number more than it; the last that two programs share; a full chip.
SHAPES = [(3, CHUNK + 8), (400, 8200), (131, 12288), (300, 50_304), (5, 65_536), (140, 131_072)]


@pytest.mark.parametrize("vocabulary", range(CHUNK + 8, 131_073, 5000))
def test_a_row_fits_and_its_ring_is_full(vocabulary):
    programs, ring, tail = plan(vocabulary)
    assert ring * CHUNK < vocabulary <= (ring + tail) * CHUNK
    assert tail & (tail - 1) == 0
    shared, of_a_multiprocessor = 2 * ring * CHUNK, 228 * 1024
    assert programs * (shared + 1024 + 128) <= of_a_multiprocessor  # 1024 are the system's
    packed = 4 * tail  # eight numbers of 16 bits are four registers
    assert packed <= REGISTERS // (32 * WARPS * programs) // 4


def test_what_is_too_short_or_too_long_has_no_plan():
    assert plan(CHUNK) is None
    assert plan(131_073) is None


def test_the_kernel_for_rows_that_a_copy_can_fetch(monkeypatch):
    monkeypatch.setattr(hopper, "on_hopper", lambda x: True)
    logits = torch.zeros(4, 50_304, dtype=torch.bfloat16)
    assert reads_once(logits, logits)
    assert reads_once(logits[::2], logits[::2])
    refused = {
        "wide numbers": logits.float(),
        "an odd vocabulary": logits[:, :-1].contiguous(),
        "rows between multiples of 16 bytes": torch.zeros(4, 50_308).bfloat16()[:, :50_304],
        "a first number between them": torch.zeros(4, 50_312).bfloat16()[:, 2:50_306],
        "rows too long": torch.zeros(1, 140_000).bfloat16(),
        "rows too short": logits[:, :64].contiguous(),
    }
    for name, x in refused.items():
        assert not reads_once(x, x), name
        assert not reads_once(logits, x), name


def test_another_gpu_has_the_other_kernel():
    logits = torch.zeros(4, 50_304, dtype=torch.bfloat16)
    assert not reads_once(logits, logits)


def test_the_operators_choose_it_where_it_can(monkeypatch):
    taken = []
    monkeypatch.setattr(triton_form, "reads_once", lambda logits, gradient: True)
    monkeypatch.setattr(triton_form, "launch_on_hopper", lambda *given: taken.append(given))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = torch.zeros(4, 64, device=device)
    targets = torch.zeros(4, dtype=torch.int64, device=device)
    triton_form.cross_entropy_in_place(logits, targets, z_loss=0.5)
    assert taken[0][0].data_ptr() == taken[0][4].data_ptr() == logits.data_ptr()
    assert taken[0][-2:] == (-100, 0.5)
    triton_form.cross_entropy_op(logits, targets, -100, 0.0)  # reads once in any case
    assert len(taken) == 1


def inputs(shape, dtype=torch.bfloat16):
    """Every third row is ignored: the first of some programs, and rows between others."""
    logits = (3 * torch.randn(shape, device="cuda")).to(dtype)
    targets = torch.randint(shape[1], shape[:1], device="cuda")
    targets[1::3] = -100
    return logits, targets


@pytest.mark.cuda
@on_hopper
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_accuracy(shape, dtype, z_loss):
    logits, targets = inputs(shape, dtype)
    assert reads_once(logits, logits)
    fast = partial(cross_entropy_triton, targets=targets, z_loss=z_loss)
    naive = partial(cross_entropy_naive, targets=targets, z_loss=z_loss)
    # Losses are one number, where rounding may help naive by luck: twice the tolerance there.
    assert_same_accuracy(fast, naive, logits, slack=4.0, known=EXP2)


@pytest.mark.cuda
@on_hopper
@pytest.mark.parametrize("types", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_number_of_every_row(shape, types):
    """Rows of their own upstream gradient, beside what they are written over, and in place."""
    logits, targets = inputs(shape)
    upstream = torch.randn(shape[0], device="cuda")
    losses, again = (torch.full((shape[0],), 7.0, device="cuda") for _ in range(2))
    gradient = torch.full_like(logits, 9.0)
    launch_rows(logits, targets.to(types), upstream, losses, gradient, -100, 0.3)
    exact = logits.double().requires_grad_()
    normalizer = exact.logsumexp(-1)
    want = functional.cross_entropy(exact, targets, reduction="none")
    want = want + 0.3 * torch.where(targets == -100, 0.0, normalizer**2)
    (want * upstream).sum().backward()
    torch.testing.assert_close(losses.double(), want.detach(), rtol=2e-6, atol=2e-6)
    # Rounded once to eight bits, from powers with 2^-22 of error; smaller than 1e-6 counts as zero.
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=2.0**-8, atol=1e-6)
    launch_rows(logits, targets.to(types), upstream, again, logits, -100, 0.3)
    assert torch.equal(logits, gradient)
    assert torch.equal(again, losses)


@pytest.mark.cuda
@on_hopper
def test_infinities_nan_and_targets_outside():
    """-inf has no share; NaN, inf and targets outside make a loss NaN, but not an ignored row's."""
    logits, targets = inputs((400, 8200))
    targets[:] = 1
    logits[0, ::2] = -torch.inf
    logits[1], logits[2, 5], logits[3, 8199] = -torch.inf, torch.inf, torch.nan
    targets[4], targets[5], targets[6] = 8200, -1, 2**40
    logits[7], targets[7] = torch.nan, -100
    logits[139], targets[271] = torch.nan, -100  # a program's next row, and the one after
    losses = torch.empty(400, device="cuda")
    share = torch.tensor(1.0, device="cuda")
    launch_rows(logits, targets, share, losses, logits, -100, 0.0)
    bad = [1, 2, 3, 4, 5, 6, 139]
    assert not losses[bad].isfinite().any()
    rest = [i for i in range(400) if i not in bad]
    assert losses[rest].isfinite().all()
    assert logits[rest].isfinite().all()
    assert losses[[7, 271]].tolist() == [0.0, 0.0]
    assert not logits[[7, 271]].any()
    assert not logits[0, ::2].any()


@pytest.mark.cuda
@on_hopper
def test_the_same_bits_again_and_in_another_order():
    """A row's numbers depend on no other row, nor on the program that took it."""
    logits, targets = inputs((300, 50_304))
    order = torch.randperm(300, device="cuda")
    share, results = torch.tensor(0.1, device="cuda"), []
    for pick in (slice(None), slice(None), order):
        losses, gradient = torch.empty(300, device="cuda"), torch.empty_like(logits)
        launch_rows(logits[pick], targets[pick], share, losses, gradient, -100, 0.0)
        results.append((losses, gradient))
    (losses, gradient), (losses_again, gradient_again), (losses_mixed, gradient_mixed) = results
    assert torch.equal(losses_again, losses)
    assert torch.equal(gradient_again, gradient)
    assert torch.equal(losses_mixed, losses[order])
    assert torch.equal(gradient_mixed, gradient[order])
