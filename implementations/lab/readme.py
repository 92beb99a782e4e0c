"""Fill the generated parts of every README and note from what was measured; nobody types a number.

    <!-- findings -->                  a table of the week's results/*.json, expectations beside
    them <!-- weeks -->                     the map of all weeks: question, scripts, headline
    <!-- output: uv run python X -->   what that command prints

Each part ends at <!-- end -->. A week's README names its headline with <!-- headline: script number
-->, the number of a finding of that script, from 0.

Run     uv run python implementations/lab/readme.py
"""

import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from implementations.lab.files import write_atomically
from implementations.lab.findings import Finding, rows

ROOT = Path(__file__).parents[2]
PART = re.compile(r"<!-- (findings|weeks|output: (.+?)) -->\n(.*?)<!-- end -->", re.DOTALL)


def documents(root: Path = ROOT) -> list[Path]:
    """Every page that may hold a generated part."""
    pages = [*root.glob("weeks/*/README.md"), *root.glob("notes/*.md")]
    return [root / "README.md", *sorted(pages)]


def filled(page: Path, root: Path = ROOT, *, outputs: bool = True) -> str:
    """The page's text with its generated parts made anew; no command is run if not `outputs`."""

    def part(match: re.Match) -> str:
        kind, command, old = match.groups()
        if command:
            body = f"```text\n{output(command, root)}```\n" if outputs else old
        else:
            body = findings_table(page.parent) if kind == "findings" else weeks_table(root)
        return f"<!-- {kind} -->\n{body}<!-- end -->"

    return PART.sub(part, page.read_text(encoding="utf-8"))


def findings_table(week: Path) -> str:
    """One row a finding, under the script that found it."""
    lines = ["| script | finding | measured | expected | |", "|---|---|---|---|---|"]
    for path in sorted(week.glob("results/*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        script = Path(record["script"]).name
        where = f"[{script}]({script})<br>{record['device']}, {record['seconds']:g} s"
        for row in rows([Finding.from_json(finding) for finding in record["findings"]]):
            lines.append("| " + " | ".join(cell(text) for text in (where, *row)) + " |")
            where = ""
    return "\n".join(lines) + "\n"


def weeks_table(root: Path) -> str:
    """One row a week: its question, its scripts, and the finding that its README chose."""
    lines = ["| week | question | scripts | a finding |", "|---|---|---|---|"]
    for page in sorted(root.glob("weeks/*/README.md")):
        text, folder = page.read_text(encoding="utf-8"), page.parent.name
        title, question = re.match(r"# (.+?)\n\n\*(.+?)\*\n", text, re.DOTALL).groups()
        names = sorted(path.stem for path in page.parent.glob("*.py"))
        scripts = ", ".join(f"[{name}](weeks/{folder}/{name}.py)" for name in names)
        week = f"[{title}](weeks/{folder}/README.md)"
        lines.append("| " + " | ".join(map(cell, (week, question, scripts, headline(page)))) + " |")
    return "\n".join(lines) + "\n"


def headline(page: Path) -> str:
    """The finding that a week's README names, as a sentence."""
    script, index = re.search(r"<!-- headline: (\w+) (\d+) -->", page.read_text("utf-8")).groups()
    record = json.loads((page.parent / "results" / f"{script}.json").read_text("utf-8"))
    claim, measured, *_ = rows([Finding.from_json(record["findings"][int(index)])])[0]
    return f"{claim} **{measured}**"


def cell(text: str) -> str:
    """Text that cannot break out of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def output(command: str, root: Path) -> str:
    """What a command of the form `uv run python FILE ...` prints, run with this very Python.

    It runs in a folder of its own, where whatever it saves is dropped.
    """
    words = shlex.split(command)
    if words[:3] != ["uv", "run", "python"]:
        raise ValueError(f"a shown command starts with `uv run python`, got {command!r}")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(root / words[3]), *words[4:]]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


def main() -> None:
    for page in documents():
        text = filled(page)
        changed = text != page.read_text(encoding="utf-8")
        if changed:
            write_atomically(page, text)
        print(f"{'written' if changed else 'current'}  {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
