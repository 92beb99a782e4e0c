"""The runner of weekly scripts: options, exit codes, records and figures."""

import json
import sys
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pytest

from implementations.lab.findings import Finding, at_least
from implementations.lab.script import own_arguments, run, short_name


@dataclass(frozen=True)
class Config:
    """A made-up script."""

    size: int = 100
    """how large"""

    @property
    def variant(self) -> str:
        return "huge" if self.size > 1000 else ""


def main(config: Config) -> list[Finding]:
    """The measured value is the size; a size of 13 is a user's mistake."""
    if config.size == 13:
        raise ValueError("13 is not a size")
    plt.subplots()[1].plot([1, 2, 3])
    plt.subplots(num="second")
    return [Finding("size", config.size, expected=at_least(10))]


def start(monkeypatch, *arguments) -> int:
    """Exit code of the made-up script."""
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
    try:
        with pytest.raises(SystemExit) as leaving:
            run(main, Config(), quick=Config(size=20))
    finally:
        plt.close("all")
    return leaving.value.code


def test_quick_starts_from_its_own_settings_and_options_override_both(cache, monkeypatch, capsys):
    for arguments, size in [((), "100"), (("--quick",), "20"), (("--quick", "--size", 30), "30")]:
        assert start(monkeypatch, *arguments) == 0
        assert f"size     {size}" in capsys.readouterr().out


def test_a_broken_expectation_exits_with_1_and_bad_input_with_2(cache, monkeypatch, capsys):
    assert start(monkeypatch, "--size", 9) == 1
    assert "FAILS" in capsys.readouterr().out
    assert start(monkeypatch, "--size", 13) == 2
    assert capsys.readouterr().err == "error: 13 is not a size\n"
    assert start(monkeypatch, "--size", "many") == 2
    assert start(monkeypatch, "--record", "a", "b") == 2


def test_record_writes_numbers_and_figures_where_it_is_told(tmp_path, monkeypatch):
    assert start(monkeypatch, "--record", tmp_path, "--size", 50, "--commit", "abc1234") == 0
    record = json.loads((tmp_path / "results" / "test_script.json").read_text("utf-8"))
    assert record["script"] == "tests/lab/test_script.py"
    assert record["command"] == "uv run python tests/lab/test_script.py --size 50"
    assert record["config"] == {"size": 50} and record["commit"] == "abc1234"
    assert record["findings"][0]["measured"] == 50 and record["findings"][0]["holds"] is True
    assert record["versions"]["torch"]
    figures = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert figures == ["test_script.png", "test_script_second.png"]


def test_a_variant_has_a_record_of_its_own(tmp_path, monkeypatch):
    assert start(monkeypatch, "--record", tmp_path, "--size", 2000) == 0
    assert (tmp_path / "results" / "test_script.huge.json").exists()
    assert (tmp_path / "figures" / "test_script.huge.png").exists()


def test_without_record_figures_go_to_the_cache(cache, monkeypatch):
    assert start(monkeypatch) == 0
    assert (cache / "figures" / "lab" / "test_script.png").exists()


@pytest.mark.parametrize(
    "given, kept",
    [
        (["--record"], []),
        (["--record", "out", "--size", "3"], ["--size", "3"]),
        (["--size", "3", "--record", "--quick"], ["--size", "3", "--quick"]),
        (["--commit", "abc", "--record", "out"], []),
        (["--commit=abc", "--size=3"], ["--size=3"]),
    ],
)
def test_the_recorded_command_says_nothing_of_where_it_wrote(given, kept):
    assert own_arguments(given) == kept


@pytest.mark.parametrize(
    "name, short",
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "4090"),
    ],
)
def test_a_record_is_called_after_the_model_of_its_gpu(name, short, monkeypatch):
    monkeypatch.setattr("implementations.lab.script.device_name", lambda device: name)
    assert short_name("cuda") == short
