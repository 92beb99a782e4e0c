"""Checkpoints that are whole or absent, and proved before they are used.

    save    files -> hidden folder, fsync each -> manifest of SHA-256 sums, fsync
            -> rename to step-00001000, fsync the parent
    load    newest first: every file's sum must be the manifest's, else the one before it

A rename is atomic: a process killed at any moment leaves a checkpoint that is complete or one that
nobody sees. fsync before the rename keeps that promise through a power cut, and the sums catch what
disks and copies do later. Tensors are safetensors, the rest is JSON: nothing is ever unpickled, so
a checkpoint from a stranger cannot run code.

Paper   Pillai et al. 2014, "All file systems are not created equal", OSDI
Run     uv run python implementations/training/checkpoint.py
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from implementations.lab.files import sha256

MANIFEST, SCALARS = "manifest.json", "state.json"


class State(NamedTuple):
    """What a checkpoint holds."""

    tensors: dict[str, dict[str, Tensor]]
    """one safetensors file for each group, by name: weights, moments, ..."""
    scalars: dict[str, Any]
    """what JSON can hold"""


def save(folder: Path, step: int, state: State, *, keep: int = 3) -> Path:
    """Write `folder/step-00001000`, remove all but the newest `keep` up to it; returns the path.

    Raises:
        OSError: the disk is full or the folder cannot be written; earlier checkpoints are intact.
        ValueError: none would be kept.
    """
    if keep < 1:
        raise ValueError(f"keep at least one checkpoint, got {keep}")
    path = checkpoint_path(folder, step)
    hidden = folder / f".{path.name}.{secrets.token_hex(4)}"
    sweep(folder)  # what a killed process left
    try:
        write_folder(hidden, step, state)
        if path.exists():  # refused when it was read, and now made again
            os.rename(path, hidden.with_suffix(".old"))
        os.rename(hidden, path)
        sync(folder)
        for older in checkpoints(folder, up_to=step)[:-keep]:
            os.rename(older, folder / f".{older.name}")  # at no moment half of one is seen
    except OSError as problem:
        good = [older.name for older in checkpoints(folder)] or ["none"]
        raise OSError(
            problem.errno,
            f"cannot write this checkpoint ({problem.strerror}); still there: {', '.join(good)}",
            str(path),
        ) from problem
    finally:
        sweep(folder)
    return path


def sweep(folder: Path) -> None:
    """Remove what is hidden: half-written, replaced, or no longer kept."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def write_folder(folder: Path, step: int, state: State) -> None:
    """All files of a checkpoint and their manifest, on the disk when this returns."""
    folder.mkdir()
    sums = {}
    for name, data in contents(state):
        write_and_sync(folder / name, data)
        # Of the bytes in memory: what a bad disk gives back must not vouch for itself.
        sums[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_and_sync(folder / MANIFEST, json.dumps({"step": step, "files": sums}).encode())
    sync(folder)


def contents(state: State):
    """The files of a checkpoint one by one, so that only one is held twice."""
    for name, tensors in state.tensors.items():
        # Cloned, because safetensors refuses tensors that share memory, as a tied head does.
        own = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        yield f"{name}.safetensors", safetensors.torch.save(own)
    yield SCALARS, json.dumps(state.scalars, indent=1).encode()


def write_and_sync(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Make the names in a folder last; the contents of its files are synced apart."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_latest(folder: Path) -> tuple[int, State] | None:
    """Step and state of the newest good checkpoint; None if the folder has no checkpoint at all.

    Each one that is refused is named, with its file, in a line on stderr.

    Raises:
        ValueError: there are checkpoints and none is good. To start over, move them away: that is
            not for a program to decide.
    """
    refused = []
    for path in reversed(checkpoints(folder)):
        try:
            return read_folder(path)
        except (ValueError, OSError) as problem:
            refused.append(str(problem))
            print(f"refused {problem}; looking for the checkpoint before it", file=sys.stderr)
    if refused:
        raise ValueError(f"no good checkpoint is left in {folder}: {'; '.join(refused)}")
    return None


def load_finished(folder: Path) -> tuple[int, State] | None:
    """Step and state of the newest checkpoint, if its scalars say that the run was `finished` then.

    It is replaced by none, and so it can be read while another process holds the folder. One that
    cannot be read counts as none: why, says `load_latest`, when nobody else is writing.
    """
    for path in checkpoints(folder)[-1:]:
        with suppress(ValueError, OSError):
            if json.loads((path / SCALARS).read_bytes()).get("finished"):
                return read_folder(path)
    return None


def checkpoints(folder: Path, up_to: int | None = None) -> list[Path]:
    """The checkpoints in a folder, oldest first, by their names alone."""
    found = {}
    for path in folder.glob("step-*") if folder.is_dir() else ():
        if match := re.fullmatch(r"step-(\d{8,})", path.name):
            found[int(match[1])] = path
    return [found[step] for step in sorted(found) if up_to is None or step <= up_to]


def read_folder(path: Path) -> tuple[int, State]:
    """Step and state of one checkpoint, every file checked before any is opened.

    Raises:
        ValueError: naming the file that is missing or is not as it was written.
    """
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{manifest}: the file is missing")
    try:
        step, entries = (json.loads(manifest.read_bytes())[key] for key in ("step", "files"))
        sums = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{manifest}: the file is damaged") from None
    if checkpoint_path(path.parent, step) != path:
        raise ValueError(f"{manifest}: it is of step {step}, not of this folder's")
    for name, (size, digest) in sums.items():
        check_file(path / name, size, digest)
    if SCALARS not in sums:
        raise ValueError(f"{path / SCALARS}: the manifest does not name it")
    groups = [name for name in sums if name.endswith(".safetensors")]
    tensors = {Path(name).stem: safetensors.torch.load_file(path / name) for name in groups}
    scalars = json.loads((path / SCALARS).read_bytes())
    return step, State(tensors, scalars)


def check_file(path: Path, size: int, digest: str) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: the file is missing")
    if path.stat().st_size != size:
        raise ValueError(f"{path}: {path.stat().st_size} bytes where {size} were written")
    if sha256(path) != digest:
        raise ValueError(f"{path}: its SHA-256 is not the manifest's, some bits have changed")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step in (10, 20):
            save(folder, step, State({"weights": {"w": torch.full((3,), float(step))}}, {}))
        damaged = folder / "step-00000020" / "weights.safetensors"
        data = bytearray(damaged.read_bytes())
        data[-1] ^= 1
        damaged.write_bytes(data)
        step, state = load_latest(folder)
        print(f"one bit flipped in step 20; loaded step {step}: {state.tensors['weights']['w']}")


if __name__ == "__main__":
    main()
