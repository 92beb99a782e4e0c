"""Files of installed packages: found, checked, and never silently wrong."""

import hashlib
import importlib.metadata
import sys
from pathlib import Path

import pytest

from implementations.sources.packages import packaged_file

CONTENT = b"the data as published"
CHECKSUM = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A distribution `some-data`, whose files are in a temporary folder; returns its one file."""
    (tmp_path / "some_data").mkdir()
    (tmp_path / "some_data-1.0.dist-info").mkdir()
    (tmp_path / "some_data-1.0.dist-info" / "METADATA").write_text(
        "Name: some-data\nVersion: 1.0\n"
    )
    path = tmp_path / "some_data" / "table.bin"
    path.write_bytes(CONTENT)
    monkeypatch.syspath_prepend(tmp_path)
    return path


def test_the_published_file_is_found(installed):
    assert packaged_file("some-data", "some_data/table.bin") == installed
    assert packaged_file("some-data", "some_data/table.bin", CHECKSUM) == installed


def test_a_real_package_is_found_where_its_own_metadata_says():
    """numpy's file list, which the installer wrote, is the authority."""
    name = "numpy/__init__.py"
    listed = next(file for file in importlib.metadata.files("numpy") if str(file) == name)
    assert packaged_file("numpy", name).samefile(Path(listed.locate()))


def one_sentence(problem, *parts):
    """One line that holds every part."""
    sentence = str(problem.value)
    assert "\n" not in sentence
    assert all(part in sentence for part in parts), sentence


@pytest.mark.parametrize(
    "damage",
    [CONTENT[:-1], b"", CONTENT.replace(b"p", b"q", 1), CONTENT + b"\n"],
    ids=["truncated", "empty", "one letter", "longer"],
)
def test_a_damaged_file_is_named_with_its_repair(installed, damage):
    installed.write_bytes(damage)
    with pytest.raises(ValueError) as problem:
        packaged_file("some-data", "some_data/table.bin", CHECKSUM)
    one_sentence(problem, str(installed), "is damaged", "`uv sync --reinstall-package some-data`")


def test_a_wrong_checksum_is_refused(installed):
    with pytest.raises(ValueError, match="its SHA-256 is not 000000000000…"):
        packaged_file("some-data", "some_data/table.bin", "0" * 64)


@pytest.mark.parametrize("name", ["some_data/other.bin", "some_data"], ids=["missing", "folder"])
def test_a_missing_file_is_named_with_its_repair(installed, name):
    with pytest.raises(FileNotFoundError) as problem:
        packaged_file("some-data", name)
    one_sentence(
        problem, "some-data", f"without its file {name}", "`uv sync --reinstall-package some-data`"
    )


def test_a_missing_package_is_named_with_its_repair():
    with pytest.raises(FileNotFoundError) as problem:
        packaged_file("no-such-data-package", "table.bin")
    one_sentence(problem, "no-such-data-package is not installed", "`uv sync`")


def test_a_package_is_never_imported(installed):
    installed.with_name("__init__.py").write_text("raise RuntimeError('this code was run')")
    packaged_file("some-data", "some_data/table.bin", CHECKSUM)
    assert "some_data" not in sys.modules
