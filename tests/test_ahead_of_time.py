"""Every kernel compiles for an A100 and an H100 without either, and spills no more than it says."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from implementations.lab.ahead_of_time import Variant, kernel_files, main, variants_of

pytest.importorskip("triton", reason="Triton is not built for this platform")

ROOT = Path(__file__).parents[1]
MOST = 40  # compilations in a run of the tests: one takes about a second


@pytest.fixture(scope="module")
def table() -> list[list[str]]:
    """What the script prints, in a process that has Triton's compiler and not its interpreter."""
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    command = [sys.executable, str(ROOT / "implementations/lab/ahead_of_time.py")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return [line.split(None, 6) for line in run.stdout.splitlines()[1:]]


@pytest.mark.parametrize("path", kernel_files(), ids=str)
def test_compiles_and_keeps_its_numbers_in_registers(path, table):
    own = [row for row in table if row[6].startswith(f"{path}: ")]
    assert own, "nothing of this file was compiled"
    for gpu, registers, spilled, allowed, _, serial, name in own:
        assert int(spilled) <= int(allowed), f"{name} spills {spilled} bytes on {gpu}"
        assert serial == "0", f"{name}: its asynchronous products wait for each other on {gpu}"
        assert 16 <= int(registers) <= 255


def test_few_variants_with_names_of_their_own(table):
    assert len(table) <= MOST
    assert max(Counter((gpu, name) for gpu, *_, name in table).values()) == 1


def test_a_kernel_that_spills_is_seen(tmp_path):
    """512 numbers in each of 32 threads cannot stay in registers."""
    script = tmp_path / "spills.py"
    script.write_text(
        """
import triton
import triton.language as tl
from implementations.lab.ahead_of_time import Variant, cost

@triton.jit
def shares(x, output, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at)
    tl.store(output + at, values / tl.sum(values))

types = {"x": "*fp32", "output": "*fp32"}
print(cost(Variant("small", shares, types, {"BLOCK": 1024}, warps=1), 90).spilled)
print(cost(Variant("large", shares, types, {"BLOCK": 16384}, warps=1), 90).spilled)
"""
    )
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    small, large = map(int, run.stdout.split())
    assert small == 0 < large


def test_products_that_wait_for_each_other_are_seen(tmp_path):
    """The second kernel reads a product's registers before it waits for the product."""
    script = tmp_path / "waits.py"
    script.write_text(
        """
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from implementations.lab.ahead_of_time import Variant, cost


@gluon.jit
def powers(x, LEFT: gl.constexpr):
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    a = gl.allocate_shared_memory(gl.bfloat16, [64, 64], SHARED)
    total = gl.full([64, 64], 0.0, gl.float32, SUMS)
    for _ in range(8):
        flying = warpgroup_mma(a, a, total, is_async=True)
        total = warpgroup_mma_wait(LEFT, deps=(flying,)) * 0.5
    row = gl.arange(0, 64, gl.SliceLayout(1, SUMS))[:, None]
    gl.store(x + row * 64 + gl.arange(0, 64, gl.SliceLayout(0, SUMS))[None, :], total)


for left in (0, 1):
    print(cost(Variant("powers", powers, {"x": "*fp32"}, {"LEFT": left}), 90).serial)
"""
    )
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    right, early = map(int, run.stdout.split())
    assert right == 0 < early


def test_a_kernel_file_without_variants_is_named():
    with pytest.raises(ValueError, match="lacks a function variants"):
        variants_of(Path("implementations/layers/rms_norm.py"))


def test_a_variant_names_every_argument_once():
    from implementations.lab.ahead_of_time import cost
    from implementations.layers.rms_norm_triton import forward_kernel

    for constants in ({}, {"x": 1}):
        types = dict.fromkeys(forward_kernel.arg_names[:-1], "i32")
        with pytest.raises(ValueError, match="no type, or two, for"):
            cost(Variant("wrong", forward_kernel, types, constants), 90)


def test_the_interpreter_compiles_nothing(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="kernels are interpreted"):
        main([])
