"""A write happens wholly or not at all, whatever goes wrong in its middle."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from implementations.lab import files
from implementations.lab.files import cache_folder, run_folder, sha256, write_atomically


@pytest.mark.parametrize("data", ["grüße\n", b"\x00\xff\r\n", "", b""], ids=repr)
def test_what_is_written_is_read_back(tmp_path, data):
    path = tmp_path / "result"
    path.write_text("something longer than what comes now")
    assert write_atomically(path, data) == path
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert list(tmp_path.iterdir()) == [path]


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), ".a hidden neighbour")


def impatient_user(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("accident", [full_disk, impatient_user])
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch, moment, accident
):
    path = tmp_path / "result"
    path.write_text("old")
    monkeypatch.setattr(os, moment, accident)
    with pytest.raises((OSError, KeyboardInterrupt)):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_reaches_the_disk_before_the_name_does(tmp_path, monkeypatch):
    """Renamed first, a power cut could leave the new name on an empty file."""
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, real=real: order.append(name) or real(*a)
        )
    write_atomically(tmp_path / "result", "all")
    assert order == ["fsync", "replace"]


def test_an_error_names_the_path_that_was_asked_for(tmp_path, monkeypatch):
    path = tmp_path / "missing" / "result"
    with pytest.raises(FileNotFoundError) as problem:
        write_atomically(path, "new")
    assert problem.value.filename == str(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as problem:
        write_atomically(tmp_path / "folder", "new")
    assert problem.value.filename == str(tmp_path / "folder")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError) as problem:
        write_atomically(tmp_path / "result", "new")
    assert problem.value.filename == str(tmp_path / "result")
    assert problem.value.errno == errno.ENOSPC


def test_permissions_are_those_of_any_new_file(tmp_path):
    """Temporary files made by tempfile are readable by their owner only."""
    (tmp_path / "ordinary").touch()
    ours = write_atomically(tmp_path / "ours", "all")
    assert ours.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_two_threads_can_write_one_path(tmp_path):
    """They share a process number, so it alone must not name the temporary neighbour."""
    path, problems = tmp_path / "result", []

    def write(letter):
        try:
            for _ in range(30):
                write_atomically(path, letter * 10_000)
        except OSError as problem:
            problems.append(problem)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert path.read_text() in [letter * 10_000 for letter in "abcd"]
    assert list(tmp_path.iterdir()) == [path]


SIZE = 32 * 2**20  # large enough for the parent to see it half written
WRITE_FOREVER = f"""
import itertools, pathlib, sys
from implementations.lab.files import write_atomically
for letter in itertools.cycle("ab"):
    write_atomically(pathlib.Path(sys.argv[1]), letter * {SIZE})
"""


def test_a_killed_writer_never_leaves_part_of_a_file(tmp_path):
    """A real process, killed three times while some file in the folder is half written."""
    path = tmp_path / "result"
    path.write_bytes(b"a" * SIZE)
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, str(path)])
        deadline = time.monotonic() + 20
        while not half_written(tmp_path) and writer.poll() is None and time.monotonic() < deadline:
            time.sleep(0.0005)
        assert writer.poll() is None
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        content = path.read_bytes()
        assert content in (b"a" * SIZE, b"b" * SIZE)
        for neighbour in set(tmp_path.iterdir()) - {path}:
            neighbour.unlink()


def half_written(folder):
    try:
        return any(0 < file.stat().st_size < SIZE for file in list(folder.iterdir()))
    except FileNotFoundError:  # renamed while we looked
        return False


def test_sha256_is_that_of_the_published_examples_and_of_hashlib(tmp_path):
    """ "abc" is the first example of FIPS 180-4's test vectors."""
    path = tmp_path / "data"
    path.write_bytes(b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    data = os.urandom(2**20 + 1)  # longer than one read
    path.write_bytes(data)
    assert sha256(path) == hashlib.sha256(data).hexdigest()


def test_the_cache_is_where_the_environment_says(cache):
    assert cache_folder() == cache
    assert cache_folder("models", "small") == cache / "models" / "small"
    assert (cache / "models" / "small").is_dir()
    assert cache_folder("models", "small").is_dir()  # a second time is no error


def test_a_run_begins_anew_after_a_change_of_settings_or_script(cache, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("rate = 1")
    first = run_folder("model", {"width": 8, "rate": 0.1}, str(script))
    assert first.parent == cache / "runs" and first.is_dir()
    assert first == run_folder("model", {"rate": 0.1, "width": 8}, str(script))
    assert first != run_folder("model", {"rate": 0.2, "width": 8}, str(script))
    script.write_text("rate = 2")
    assert first != run_folder("model", {"rate": 0.1, "width": 8}, str(script))


def test_a_run_begins_anew_after_an_edit_of_the_package(cache, tmp_path, monkeypatch):
    """In a small package of its own, beside which files.py seems to lie."""
    package = tmp_path / "package"
    (package / "lab").mkdir(parents=True)
    (package / "layers").mkdir()
    layer = package / "layers" / "norm.py"
    layer.write_text("return self.norm(x)")
    monkeypatch.setattr(files, "__file__", str(package / "lab" / "files.py"))
    before = run_folder("model", {})
    assert before == run_folder("model", {})
    layer.write_text("return x")
    assert before != run_folder("model", {})
