"""Every weekly script finds with --quick what it expects; every record and README is whole."""

import json
import re
import runpy
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from implementations.lab.findings import Finding
from implementations.lab.readme import PART, documents, filled, output

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(ROOT.glob("weeks/*/*.py"))
RECORDS = sorted(ROOT.glob("weeks/*/results/*.json"))
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "weeks"))


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_script_finds_what_it_expects(script, cache, monkeypatch, capsys):
    """Exit code 0 says that every expectation holds, with --quick as without."""
    monkeypatch.setattr(sys, "argv", [str(script), "--quick"])
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as leaving:
            runpy.run_path(str(script), run_name="__main__")
    finally:
        plt.close("all")
        torch.set_num_threads(threads)
    printed = capsys.readouterr()
    assert leaving.value.code == 0, printed.out + printed.err
    assert "finding" in printed.out
    # The record is this script's: it makes the same claims, up to the numbers in them.
    record = json.loads((script.parent / "results" / f"{script.stem}.json").read_text("utf-8"))
    recorded = {NUMBER.sub("#", finding["claim"]) for finding in record["findings"]}
    table = printed.out[printed.out.index("finding ") :].splitlines()[1:]
    claims = {NUMBER.sub("#", re.split(r"\s{2,}", line)[0]) for line in table}
    assert {claim for claim in claims if not claim.startswith(("figure", "record"))} <= recorded


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_script_has_its_record(script):
    """Run in full and written with --record, by the script of that name, with its settings."""
    record = json.loads((script.parent / "results" / f"{script.stem}.json").read_text("utf-8"))
    assert record["script"] == str(script.relative_to(ROOT))
    assert "--quick" not in record["command"]
    source = script.read_text("utf-8")
    assert all(f"    {field}: " in source for field in record["config"])


@pytest.mark.parametrize("path", RECORDS, ids=name)
def test_record_keeps_what_it_expects(path):
    """A committed record holds no broken expectation, and its verdicts are those of its numbers."""
    record = json.loads(path.read_text("utf-8"))
    assert (ROOT / record["script"]).exists()
    assert re.fullmatch(r"[0-9a-f]{7,40}", record["commit"]), "recorded from uncommitted code"
    for entry in record["findings"]:
        finding = Finding.from_json(entry)
        assert finding.holds == entry["holds"]
        assert finding.holds or not finding.expected, finding.claim


@pytest.mark.parametrize("page", documents(), ids=lambda page: str(page.relative_to(ROOT)))
def test_generated_parts_are_current(page):
    """Rewrite them with `uv run python implementations/lab/readme.py`."""
    assert filled(page, outputs=False) == page.read_text("utf-8")


SHOWN = [
    (page, match[2], match[3])
    for page in documents()
    for match in PART.finditer(page.read_text("utf-8"))
    if match[2]
]


@pytest.mark.parametrize("page, command, shown", SHOWN, ids=[command for _, command, _ in SHOWN])
def test_shown_output_is_what_the_command_prints(page, command, shown, tmp_path):
    """Words to the letter, numbers to 0.011, errors (1e-7) to a factor of 10: machines differ."""
    printed = f"```text\n{output(command, ROOT)}```\n"
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
    for got, want in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        got, want = (float(text.replace(",", "")) for text in (got, want))
        close = abs(got - want) < 0.011 if abs(want) > 1e-3 else want / 10 <= got <= want * 10
        assert close or got == want, f"{command} printed {got}, {page.name} shows {want}"
