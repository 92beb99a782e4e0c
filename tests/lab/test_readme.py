"""Generated parts of a README, on a made-up repository."""

import json

import pytest

from implementations.lab.findings import Finding, at_least
from implementations.lab.readme import documents, filled, output

WEEK = """# Week 01: attention

*What does a head look at?*

<!-- headline: heads 1 -->
<!-- findings -->
stale
<!-- end -->
"""


@pytest.fixture
def repository(tmp_path):
    """A week with one script and two findings."""
    week = tmp_path / "weeks" / "01_attention"
    (week / "results").mkdir(parents=True)
    (week / "README.md").write_text(WEEK)
    (week / "heads.py").write_text("")
    (tmp_path / "README.md").write_text("before\n<!-- weeks -->\n<!-- end -->\nafter\n")
    findings = [Finding("a | b", 1.0, expected=at_least(0.5)), Finding("heads", 72)]
    record = {
        "script": "weeks/01_attention/heads.py",
        "device": "laptop",
        "seconds": 3.0,
        "findings": [finding.as_json() for finding in findings],
    }
    (week / "results" / "heads.json").write_text(json.dumps(record))
    return tmp_path


def test_findings_come_from_the_records(repository):
    text = filled(repository / "weeks/01_attention/README.md", repository)
    assert "stale" not in text
    assert "| [heads.py](heads.py)<br>laptop, 3 s | a \\| b | 1 | at least 0.5 | holds |" in text
    assert "|  | heads | 72 |  |  |" in text


def test_map_of_weeks(repository):
    text = filled(repository / "README.md", repository)
    assert text.startswith("before\n<!-- weeks -->\n| week |") and text.endswith(
        "<!-- end -->\nafter\n"
    )
    assert (
        "| [Week 01: attention](weeks/01_attention/README.md) | What does a head look at? |" in text
    )
    assert "[heads](weeks/01_attention/heads.py) | heads **72** |" in text


def test_filling_twice_changes_nothing(repository):
    for page in documents(repository):
        page.write_text(filled(page, repository))
        assert filled(page, repository) == page.read_text()


def test_output_is_what_the_command_prints(repository):
    (repository / "hello.py").write_text("print('hello')")
    page = repository / "README.md"
    page.write_text("<!-- output: uv run python hello.py -->\nold\n<!-- end -->\n")
    assert "old" in filled(page, repository, outputs=False)
    assert "```text\nhello\n```" in filled(page, repository)
    with pytest.raises(ValueError, match="starts with `uv run python`"):
        output("rm -r /", repository)
