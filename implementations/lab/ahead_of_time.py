"""Every GPU kernel compiled where there is no GPU: does it compile, and what does it cost a thread?

    registers   of one thread; a multiprocessor has 65,536 for all of its threads
    spilled     bytes of a thread's numbers that found no register and went to memory
    wgmma       Hopper's asynchronous matrix instructions in the program
    serial      remarks of the assembler that these must wait for each other (C7510 and its kin)

The interpreter, which runs the kernels in the tests, knows nothing of all this. A kernel file
(its name ends as ENDINGS say, and a kernel is in it) offers itself through a function `variants()`
that yields `Variant`s. The interpreter must be off: Triton reads TRITON_INTERPRET when a kernel is
decorated, so a process does one or the other.

Run     uv run python implementations/lab/ahead_of_time.py
        uv run python implementations/lab/ahead_of_time.py implementations/layers/rms_norm_triton.py
"""

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from implementations.lab.command_line import clear_errors

ROOT = Path(__file__).parents[2]
ENDINGS = ("_triton.py", "_hopper.py", "_hopper_forward.py", "_hopper_backward.py")
SIGNS = r"^@(triton|gluon)\.jit|^def variants\("  # decoder_triton.py has neither, only calls


class Variant(NamedTuple):
    """One kernel at one setting, ready to be compiled.

    Args:
        name: what is special about it: "forward, 4096 wide".
        kernel: the decorated function.
        types: of the arguments that come at run time, in order of the signature and in Triton's
            names: {"x": "*bf16", "width": "i32", "query": "tensordesc<bf16[64, 128]>"}. Pointers
            and integers are compiled as multiples of 16, as they are for usual widths; an integer
            that is always 1 belongs to the constants.
        constants: the values of the others.
        warps, stages: launch options.
        most_spilled: bytes that a thread may spill; the promise is none.
        capabilities: of the GPUs to compile for: 80 is an A100, 90 an H100 or H200.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    most_spilled: int = 0
    capabilities: tuple[int, ...] = (80, 90)


class Cost(NamedTuple):
    """What the assembler says of a compiled kernel."""

    registers: int
    spilled: int
    wgmma: int
    serial: int


def kernel_files() -> list[Path]:
    """The files of the package that have kernels, or offer those of others."""
    found = sorted((ROOT / "implementations").rglob("*.py"))
    named = (path for path in found if path.name.endswith(ENDINGS))
    return [path.relative_to(ROOT) for path in named if re.search(SIGNS, path.read_text(), re.M)]


def variants_of(path: Path) -> Iterator[Variant]:
    """What a kernel file offers.

    Raises:
        ValueError: it has no `variants()`.
    """
    module = importlib.import_module(".".join(path.with_suffix("").parts))
    if not hasattr(module, "variants"):
        raise ValueError(f"{path} offers no kernel to compile: it lacks a function variants()")
    return module.variants()


def cost(variant: Variant, capability: int) -> Cost:
    """Compile for one GPU and ask the assembler's own tool what came out."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    kernel, names = variant.kernel, variant.kernel.arg_names
    if missing := set(names) ^ set(variant.types) ^ set(variant.constants):
        raise ValueError(f"{variant.name}: no type, or two, for {', '.join(sorted(missing))}")
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (position,): aligned
        for position, kind in enumerate(signature.values())
        if kind.startswith(("*", "i"))
    }
    source = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    compiled = triton.compile(
        source(kernel, signature, variant.constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": variant.warps, "num_stages": variant.stages},
    )
    usage = resource_usage(compiled.asm["cubin"])
    wgmma = compiled.asm["ptx"].count("wgmma.mma_async")
    serial = serializations(compiled.asm["ptx"], capability) if wgmma else 0
    return Cost(usage["REG"], usage["STACK"] + usage["LOCAL"], wgmma, serial)


def serializations(ptx: str, capability: int) -> int:
    """How often the assembler says that asynchronous products will run one after the other.

    Triton assembles with the same program and hides what it says.
    """
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        arch = sm_arch_from_capability(capability)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={arch}", str(file)]
        command += ["-o", str(file.with_suffix(".cubin"))]
        said = subprocess.run(command, check=True, capture_output=True, text=True)
    return (said.stdout + said.stderr).count("wgmma.mma_async instructions are serialized")


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL, SHARED of the one function in a compiled program."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    line = next(line for line in printed.splitlines() if "REG:" in line)
    return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}


def main(paths: list[Path]) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("under TRITON_INTERPRET=1 kernels are interpreted and never compiled")
    # Without a GPU, Triton does not know that it may fuse a product and a sum, and forbids it.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    print("gpu    registers  spilled  allowed  wgmma  serial  kernel")
    for path in paths or kernel_files():
        for variant in variants_of(path):
            for capability in variant.capabilities:
                seen = cost(variant, capability)
                print(
                    f"sm_{capability}  {seen.registers:9}  {seen.spilled:7}  "
                    f"{variant.most_spilled:7}  {seen.wgmma:5}  {seen.serial:6}  "
                    f"{path}: {variant.name}"
                )


if __name__ == "__main__":
    with clear_errors():
        main([Path(path) for path in sys.argv[1:]])
