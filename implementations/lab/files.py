"""Files that survive accidents: a cache folder, and writes that happen wholly or not at all.

    write(path, data)  =  write a temporary neighbour, then rename it over path

A rename within one folder is atomic, so a reader sees the old file or the new one, never half of
either. A trained model is kept in a folder named by all that it was made from.

Run     uv run python implementations/lab/files.py
"""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path


def cache_folder(*parts: str) -> Path:
    """The user's cache folder for this repository, or a folder inside it; made if it is missing."""
    folder = user_cache_path("ml-studies", appauthor=False).joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_folder(name: str, settings: Mapping[str, Any], *scripts: str) -> Path:
    """The cache folder of one training run, named by its settings and by the code that trains.

    After any edit of the package, or of the scripts named, the run begins anew: what an older code
    has learned is never taken for what this code would learn.

    Args:
        name: what is trained, for the reader of the cache.
        settings: all that decides what is learned; values that JSON can hold.
        scripts: paths of further files that do.
    """
    whole = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    package = Path(__file__).parents[1]
    for path in [*sorted(package.rglob("*.py")), *map(Path, scripts)]:
        whole.update(path.read_bytes())
    return cache_folder("runs", f"{name}-{whole.hexdigest()[:12]}")


def write_atomically(path: Path, data: str | bytes) -> Path:
    """Write all of `data` to `path`, or leave what was there; returns `path`.

    Raises:
        OSError: naming the path, when its folder is missing or cannot be written, or the disk is
            full.
    """
    data = data.encode() if isinstance(data, str) else data
    # Random, because threads share a process number, and so do hosts that share a disk.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as problem:
        # The system names the temporary neighbour, of which the user knows nothing.
        raise OSError(problem.errno, problem.strerror, str(path)) from problem
    finally:
        with suppress(OSError):
            temporary.unlink()
    return path


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    path = write_atomically(cache_folder() / "example.txt", "all of it\n")
    print(f"{path}\n  sha256 {sha256(path)}")


if __name__ == "__main__":
    main()
