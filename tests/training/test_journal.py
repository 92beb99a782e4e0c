"""The diary of a run: whole lines, no step twice, a picture."""

import errno
import json
import time

import pytest

from implementations.training.journal import (
    LOG,
    append,
    counted,
    cut,
    draw,
    processor_seconds,
    read,
)


def write(path, steps):
    for step in steps:
        append(path, {"step": step, "loss": 1 / step})


def test_lines_come_back_in_order_and_are_on_the_disk_at_once(tmp_path):
    path = tmp_path / LOG
    write(path, [1, 2])
    assert path.read_text().count("\n") == 2
    assert read(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]


def test_cutting_forgets_later_steps_and_a_torn_line(tmp_path):
    path = tmp_path / LOG
    write(path, range(1, 8))
    with path.open("a") as file:
        file.write('{"step": 8, "lo')
    cut(path, 5)
    write(path, [6])
    assert [line["step"] for line in read(path)] == [1, 2, 3, 4, 5, 6]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_log_that_is_not_there_is_empty(tmp_path):
    cut(tmp_path / LOG, 5)
    assert read(tmp_path / LOG) == [] and draw(tmp_path) is None


@pytest.mark.parametrize("steps", [1, 137])
def test_the_picture_is_a_picture(tmp_path, steps):
    write(tmp_path / LOG, range(1, steps + 1))
    assert draw(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_a_full_disk_names_the_log():
    """/dev/full is a disk without room: every write to it fails as a real one would."""
    from pathlib import Path

    if not Path("/dev/full").exists():
        pytest.skip("only Linux has /dev/full")
    with pytest.raises(OSError, match="/dev/full") as caught:
        append(Path("/dev/full"), {"step": 1})
    assert caught.value.errno == errno.ENOSPC


def test_time_is_counted_over_interruptions(tmp_path):
    """Two stretches of 0.05 s of work, the first one interrupted; sleeping is not counted."""

    def work(seconds):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    assert processor_seconds(tmp_path) == 0
    with pytest.raises(KeyboardInterrupt), counted(tmp_path):
        work(0.05)
        raise KeyboardInterrupt
    with counted(tmp_path):
        work(0.05)
        time.sleep(0.2)
    assert 0.1 <= processor_seconds(tmp_path) < 0.2
