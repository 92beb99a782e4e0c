"""Devices are counted once, so each question is asked in a process of its own."""

import os
import subprocess
import sys

import jax
import pytest

from implementations.lab.host_devices import use_host_devices

ASK = "import jax; from implementations.lab.host_devices import use_host_devices as use; "


def run(code: str) -> subprocess.CompletedProcess:
    free = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", ASK + code]
    return subprocess.run(command, env=free, capture_output=True, text=True)


def test_jax_sees_as_many_devices_as_were_asked_for():
    assert run("use(3); print(jax.local_device_count())").stdout == "3\n"


def test_too_late_is_said_and_not_passed_over():
    answer = run("jax.numpy.zeros(2); use(2)")
    assert "ValueError: ask for 2 devices before JAX's first operation" in answer.stderr


def test_what_is_there_already_suffices():
    """conftest.py has asked for two."""
    use_host_devices(2)
    assert jax.local_device_count() == 2


def test_there_is_at_least_one_device():
    with pytest.raises(ValueError, match="at least one device, got 0"):
        use_host_devices(0)
