"""What every test stands on: seeds, poisoned memory, checked shapes, kernels without a GPU."""

import os
import sys
import types
import warnings

import pytest

# Both are read once: by Triton when a kernel is decorated, by JAX when it first looks for devices.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import jaxtyping
from beartype import BeartypeConf, beartype

# Shapes in signatures are checked while tests run. Not in kernel files: the hook would hide a
# kernel's helpers from Triton.
KERNELS = ("_triton", "_hopper", "_hopper_forward", "_hopper_backward")


def checked_modules() -> list[str]:
    """Every module of the package, without the kernel files."""
    root = os.path.join(os.path.dirname(__file__), "..")
    found = []
    for folder, _, files in os.walk(os.path.join(root, "implementations")):
        for file in files:
            stem, ending = os.path.splitext(file)
            if ending == ".py" and not stem.endswith((*KERNELS, "__init__")):
                path = os.path.relpath(os.path.join(folder, stem), root)
                found.append(path.replace(os.sep, "."))
    return found


# The hook wants its checker as an importable name; this one lets an int stand where a float may.
checker = types.ModuleType("shape_checker")
checker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))
sys.modules[checker.__name__] = checker
jaxtyping.install_import_hook(checked_modules(), "shape_checker.check")


@pytest.fixture(autouse=True)
def reproducible():
    """The same numbers every time; and `torch.empty` is NaN, so that an unwritten output shows."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def unchecked():
    """Switch the shape checks off, to see what a user without them sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder for one test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ml-studies"


def pytest_collection_modifyitems(items):
    """A test marked `cuda` is skipped aloud where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
