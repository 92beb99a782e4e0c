"""Run a weekly script: one command line, one table, one record.

A script is `main(config) -> list[Finding]` with a frozen dataclass of settings, and ends with

    run(main, Config(), quick=Config(...))

which adds three options to the script's own: --quick (small sizes, under ten seconds), --record
[DIR] (write results/<script>.json and figures/<script>.png beside the script, or under DIR) and
--commit (where a copy of the repository has no history). Figures are those that `main` left open in
pyplot. Settings with a `variant` that is not empty have it in the name of their record and figures.

Run     uv run python implementations/lab/script.py --quick
"""

import datetime
import importlib.metadata
import inspect
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import torch
import tyro

from implementations.lab.command_line import clear_errors
from implementations.lab.files import cache_folder, write_atomically
from implementations.lab.findings import Finding, failed, print_table
from implementations.lab.pictures import save_figure

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "jax", "numpy", "transformers", "triton")


@dataclass(frozen=True)
class Options:
    """The options that every weekly script has besides its own."""

    quick: bool = False
    """small sizes: under ten seconds on two cores"""
    record: tuple[Path, ...] | None = None
    """write results/ and figures/ beside the script, or under the folder named"""
    commit: str | None = None
    """the commit to write into the record, where there is no git"""


def run(main: Callable[[Any], list[Finding]], config: Any, quick: Any) -> None:
    """Parse the command line, run the script, print what it found and record it.

    Exits with 0, with 1 if an expectation fails, with 2 if the input is wrong.

    Args:
        main: the script.
        config: its default settings, a frozen dataclass.
        quick: the settings that --quick starts from.
    """
    script = Path(inspect.getfile(main)).resolve()
    with clear_errors():
        options, config = parse(config, quick, main.__globals__["__doc__"])
        device = getattr(config, "device", "cpu")
        check_device(device)
        if options.record is not None:  # a folder that cannot be is noticed before the work
            folder = options.record[0] if options.record else script.parent
            results, figures = made(folder / "results"), made(folder / "figures")
        started = time.perf_counter()
        findings = main(config)
        seconds = time.perf_counter() - started
        print_table(findings)
        parts = (script.stem, getattr(config, "variant", ""), short_name(device))
        name = ".".join(part for part in parts if part)
        if options.record is None:
            save_figures(name, cache_folder("figures", script.parent.name))
        else:
            record = describe(script, config, options, seconds, findings)
            text = json.dumps(record, indent=1, default=str, ensure_ascii=False) + "\n"
            print("record", write_atomically(results / f"{name}.json", text))
            save_figures(name, figures)
    sys.exit(1 if failed(findings) else 0)


def parse(config: Any, quick: Any, description: str | None) -> tuple[Options, Any]:
    """The shared options and the script's own settings, from one command line."""
    start = quick if "--quick" in sys.argv[1:] else config
    flat = tyro.conf.arg(name="")
    both = tuple[Annotated[Options, flat], Annotated[type(config), flat]]
    options, config = tyro.cli(both, default=(Options(), start), description=description)
    if options.record is not None and len(options.record) > 1:
        raise ValueError(f"--record takes one folder, got {len(options.record)}")
    return options, config


def check_device(device: str) -> None:
    """Raise ValueError unless this machine has the device: cpu, cuda, cuda:1."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0]
        raise ValueError(f"the device {device!r} cannot be used here: {reason}") from None


def describe(
    script: Path, config: Any, options: Options, seconds: float, findings: list[Finding]
) -> dict[str, Any]:
    """The whole record of one run, ready for JSON."""
    path, device = str(script.relative_to(ROOT)), getattr(config, "device", "cpu")
    return {
        "script": path,
        "command": " ".join(["uv run python", path, *own_arguments(sys.argv[1:])]),
        "config": asdict(config),
        "device": device_name(device),
        "commit": options.commit or commit(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "seconds": round(seconds, 1),
        "findings": [finding.as_json() for finding in findings],
    }


def own_arguments(arguments: list[str]) -> list[str]:
    """A command's arguments without those that only say where and under what to record."""
    kept, skipping = [], False
    for argument in arguments:
        starts = argument.startswith(("--record", "--commit"))
        skipping = starts or (skipping and not argument.startswith("-"))
        if not skipping:
            kept.append(argument)
    return kept


def save_figures(name: str, folder: Path) -> None:
    """Save every open pyplot figure; one with a label gets it into its name."""
    for number in plt.get_fignums():
        figure = plt.figure(number)
        label = f"_{figure.get_label()}" if figure.get_label() else ""
        print("figure", save_figure(figure, folder / f"{name}{label}.png"))


def made(folder: Path) -> Path:
    """The folder, made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def device_name(device: str) -> str:
    """What the numbers are measured on."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' * (threads > 1)}"


def short_name(device: str) -> str:
    """A device's name in the name of a file: NVIDIA H100 80GB HBM3 is h100, a CPU has none."""
    if device == "cpu":
        return ""
    name = device_name(device)
    model = re.search(r"\b[A-Z]{1,2}\d+[A-Z]?\b", name)
    return (model.group() if model else name.split()[-1]).lower()


def commit() -> str:
    """The commit of the working tree, with '+' if its code has changed; 'unknown' without git."""
    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--", "*.py", "uv.lock")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def git(*arguments: str) -> str:
    """What git prints, run in this repository."""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that make the numbers."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    present = {name: found[name] for name in PACKAGES if name in found}
    return {"python": platform.python_version(), **present}


@dataclass(frozen=True)
class Config:
    """Toss coins."""

    tosses: int = 100_000
    """how often"""


def main(config: Config) -> list[Finding]:
    heads = torch.randint(2, (config.tosses,), generator=torch.Generator().manual_seed(0))
    return [Finding("share of heads", heads.double().mean().item())]


if __name__ == "__main__":
    run(main, Config(), quick=Config(tosses=100))
