"""Checkpoints are whole, proved, kept and refused by name. Kills are in test_kill.py."""

import errno
import json
import os
import resource
import shutil
import signal

import pytest
import torch

from implementations.training.checkpoint import (
    MANIFEST,
    SCALARS,
    State,
    checkpoint_path,
    checkpoints,
    load_finished,
    load_latest,
    save,
)

FILES = ["weights.safetensors", "moments.safetensors", SCALARS, MANIFEST]


def state_of(step: int) -> State:
    shared = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
    weights = {
        "table": shared,
        "head": shared,  # tied
        "half": shared.bfloat16(),
        "turned": shared.T,  # not contiguous
        "count": torch.tensor(step),
        "empty": torch.empty(0, 3),
    }
    return State({"weights": weights, "moments": {"m": shared * 2}}, {"loss": 0.1 * step})


def same(loaded: State, expected: State) -> bool:
    """Every tensor to the bit and of the same type, and the scalars."""
    if loaded.scalars != expected.scalars or loaded.tensors.keys() != expected.tensors.keys():
        return False
    for group, tensors in expected.tensors.items():
        other = loaded.tensors[group]
        if other.keys() != tensors.keys():
            return False
        for name, tensor in tensors.items():
            if other[name].dtype != tensor.dtype or not torch.equal(other[name], tensor):
                return False
    return True


@pytest.fixture
def two(tmp_path):
    """A folder with the checkpoints of steps 10 and 20."""
    for step in (10, 20):
        save(tmp_path, step, state_of(step))
    return tmp_path


def test_what_is_saved_comes_back_to_the_bit(two):
    step, state = load_latest(two)
    assert step == 20 and same(state, state_of(20))
    assert not same(state, state_of(10))


def test_a_folder_without_checkpoints_is_a_beginning(tmp_path):
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "not there") is None


def test_only_the_newest_one_can_be_the_end_and_only_whole(two):
    """One that is damaged, or not yet written to its end, counts as none."""
    assert load_finished(two) is None and load_finished(two / "not there") is None
    end = state_of(30)._replace(scalars={"finished": True})
    path = save(two, 30, end)
    step, state = load_finished(two)
    assert step == 30 and same(state, end)
    weights = (path / "weights.safetensors").read_bytes()
    (path / "weights.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert load_finished(two) is None
    (path / SCALARS).unlink()
    assert load_finished(two) is None
    save(two, 30, end)
    save(two, 40, state_of(40))  # it went on
    assert load_finished(two) is None


def test_only_safetensors_and_json_are_written(two):
    """Nothing that could be unpickled, and a manifest that names every other file."""
    names = {path.name for path in checkpoint_path(two, 20).iterdir()}
    assert names == set(FILES)
    assert json.loads((checkpoint_path(two, 20) / MANIFEST).read_text())["files"].keys() == (
        names - {MANIFEST}
    )


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


HARM = {
    "first bit": lambda path: flip(path, 0),
    "middle bit": lambda path: flip(path, 8 * path.stat().st_size // 2),
    "last bit": lambda path: flip(path, 8 * path.stat().st_size - 1),
    "truncated": truncate,
    "emptied": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(two, name, harm, capfd):
    HARM[harm](checkpoint_path(two, 20) / name)
    step, state = load_latest(two)
    assert step == 10 and same(state, state_of(10))
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert f"step-00000020/{name}" in said and "refused" in said


@pytest.mark.parametrize(
    "stride", [9, pytest.param(1, marks=pytest.mark.full)], ids=["every 9th", "every"]
)
def test_no_bit_of_the_manifest_can_flip_unnoticed(two, stride):
    """One after the other: it has no sum of its own to vouch for it."""
    manifest = checkpoint_path(two, 20) / MANIFEST
    whole = manifest.read_bytes()
    shutil.rmtree(checkpoint_path(two, 10))
    for bit in range(0, 8 * len(whole), stride):
        flip(manifest, bit)
        with pytest.raises(ValueError, match="no good checkpoint"):
            load_latest(two)
        manifest.write_bytes(whole)
    assert load_latest(two)[0] == 20


def test_a_renamed_checkpoint_is_refused(two):
    """Its step would be wrong, and with it the place in the data and the learning rate."""
    checkpoint_path(two, 20).rename(checkpoint_path(two, 30))
    assert load_latest(two)[0] == 10


def test_when_none_is_good_it_says_so_and_does_not_start_over(two):
    flip(checkpoint_path(two, 20) / FILES[0], 99)
    truncate(checkpoint_path(two, 10) / FILES[1])
    with pytest.raises(ValueError, match="no good checkpoint is left") as caught:
        load_latest(two)
    for part in ("20/weights.safetensors", "10/moments.safetensors"):
        assert part in str(caught.value)


def test_the_newest_are_kept(tmp_path):
    for step in range(0, 60, 10):
        save(tmp_path, step, state_of(step), keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000040", "step-00000050"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_newer_one_does_not_push_out_a_good_one(two):
    """After a fall back to step 10 the next save is older than the damaged step 20."""
    flip(checkpoint_path(two, 20) / FILES[0], 99)
    save(two, 15, state_of(15), keep=1)
    assert load_latest(two)[0] == 15


def test_a_damaged_one_is_replaced_when_its_step_comes_again(two):
    flip(checkpoint_path(two, 20) / FILES[0], 99)
    save(two, 20, state_of(20))
    step, state = load_latest(two)
    assert step == 20 and same(state, state_of(20))


def test_leftovers_of_a_killed_process_are_ignored_and_removed(two):
    leftover = two / ".step-00000030.0123abcd"
    leftover.mkdir()
    (leftover / FILES[0]).write_bytes(b"half of")
    assert load_latest(two)[0] == 20
    save(two, 30, state_of(30))
    assert not leftover.exists()


def test_all_is_on_the_disk_before_the_rename_and_the_name_after_it(tmp_path, monkeypatch):
    """Or a power cut could leave the name without the contents. fsync follows the write."""
    done = []
    real_sync, real_rename = os.fsync, os.rename

    def fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        done.append(("sync", os.path.basename(path), os.fstat(descriptor).st_size))
        real_sync(descriptor)

    def rename(old, new):
        done.append(("rename", os.path.basename(new), None))
        real_rename(old, new)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("reads the names of open files from /proc")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    path = save(tmp_path, 10, state_of(10))
    place = done.index(("rename", "step-00000010", None))
    synced = {name: size for _, name, size in done[:place]}
    for name in FILES:
        assert synced[name] == (path / name).stat().st_size
    assert any(name.startswith(".step-00000010.") for name in synced)
    assert [(what, name) for what, name, _ in done[place + 1 :]] == [("sync", tmp_path.name)]


@pytest.mark.parametrize(
    "call, error",
    [("fsync", errno.ENOSPC), ("mkdir", errno.EROFS), ("mkdir", errno.EACCES)],
    ids=["disk full", "read-only disk", "forbidden folder"],
)
def test_a_failed_save_says_why_and_leaves_the_last_one_good(two, monkeypatch, call, error):
    def fail(*arguments, **more):
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(OSError, match="cannot write this checkpoint") as caught:
            save(two, 30, state_of(30))
    assert caught.value.errno == error
    assert os.strerror(error) in str(caught.value) and "step-00000030" in str(caught.value)
    assert "still there: step-00000010, step-00000020" in str(caught.value)
    assert same(load_latest(two)[1], state_of(20))
    assert len(list(two.iterdir())) == 2  # the failed one took its half-written files along
    save(two, 30, state_of(30))
    assert load_latest(two)[0] == 30


def test_a_real_limit_on_file_size_cuts_a_write_short(two):
    """The system itself stops the write after 4,096 bytes, as a full disk would: no simulation."""
    large = State({"weights": {"w": torch.zeros(10_000)}}, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(OSError, match="cannot write this checkpoint"):
            save(two, 30, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert load_latest(two)[0] == 20 and len(list(two.iterdir())) == 2


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one checkpoint, got 0"):
        save(tmp_path, 10, state_of(10), keep=0)
