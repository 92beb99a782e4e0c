"""Byte-pair encoding: against the tokenizers library, and the fast forms against the naive."""

import json
import random
import time
import unicodedata

import numpy as np
import pytest
import regex
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from implementations.sources.text import bible_verses
from implementations.sources.weights import smollm2_tokenizer
from implementations.text.byte_pair_encoding import (
    BYTES,
    GPT2_PIECES,
    BytePairEncoding,
    joined,
    joined_naive,
    learn,
    learn_naive,
    replaced,
    spelled,
    train,
    unspelled,
)

ASSIGNED = regex.compile(r"[^\p{Cn}]")
SPACES = [c for c in map(chr, range(0x3001)) if c.isspace()] + ["\u200b", "\u180e", "\ufeff"]
SCRIPTS = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x590, 0x700), (0x900, 0x0E00)]
SCRIPTS += [(0x2000, 0x2C00), (0x3040, 0x3100), (0x4E00, 0x4F00), (0xAC00, 0xAD00), (0x300, 0x370)]
SCRIPTS += [(0x1F1E6, 0x1F200), (0x1F600, 0x1F650), (0x1F3FB, 0x1F400), (0xE000, 0xE010)]
SCRIPTS += [(0x1D400, 0x1D800), (0x2460, 0x24FF), (0x660, 0x66A), (0xFE00, 0xFE10)]
WORDS = [
    "the",
    "don't",
    "I'LL",
    "we've",
    "'s",
    "strawberry",
    "naïve",
    "Здравствуй",
    "مرحبا",
    "日本語",
]
WORDS += [
    "👩\u200d👩\u200d👧",
    "🇫🇷",
    "e\u0301",
    "नमस्ते",
    "2026",
    "3.14",
    "<|im_end|>",
    "<|im_",
    "===",
]


@pytest.fixture(scope="module")
def ours():
    return BytePairEncoding.from_smollm2()


@pytest.fixture(scope="module")
def theirs():
    return smollm2_tokenizer()


def character(random):
    """Any character of any plane, assigned or not; no half ones."""
    return chr((random.randrange(0x10F800) + 0xE000) % 0x110000)


def is_newer(letter):
    """Whether the regex package's Unicode knows the character and Python's does not.

    The tokenizers library's Unicode lies between: what the newest letters and numbers are cut from
    may differ. It changes no id with SmolLM2's merges, none of which joins their bytes to others.
    """
    return unicodedata.category(letter) == "Cn" and bool(ASSIGNED.match(letter))


def fuzzed(random):
    """A text of some of these: any character, one script, real words, spaces, digits, long runs."""
    parts = []
    for _ in range(random.randrange(1, 8)):
        low, high = random.choice(SCRIPTS)
        several = range(random.choice([1, 2, 3, 8, 30]))
        parts += random.choice(
            [
                lambda several=several: [character(random) for _ in several],
                lambda several=several, low=low, high=high: [
                    chr(random.randrange(low, high)) for _ in several
                ],
                lambda several=several: [random.choice(WORDS) for _ in several],
                lambda several=several: [random.choice(SPACES) for _ in several],
                lambda several=several: [random.choice("0123456789½²Ⅷ٣७") for _ in several],
                lambda several=several: [character(random) * random.choice([5, 50, 500])],
                lambda: [" ", random.choice(WORDS), " "],
            ]
        )()
    return "".join(parts)


def without_token(ours, text):
    """Whether the text holds one of the 21 bytes that SmolLM2 cannot say."""
    return any(bytes([byte]) not in ours.ids for byte in set(text.encode()))


def assert_encodes_as_the_library(ours, theirs, seed, count):
    generator = random.Random(seed)
    spoken = 0
    for _ in range(count):
        text = fuzzed(generator)
        if without_token(ours, text):
            with pytest.raises(ValueError, match="has no token for the byte"):
                ours.encode(text)
            text = "".join(c for c in text if not without_token(ours, c))
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids, repr(text)
        assert ours.decode(ids) == text
        spoken += bool(ids)
    assert spoken > 0.95 * count


def test_encodes_10000_fuzzed_texts_as_the_library(ours, theirs):
    """Token by token, and decoding gives the text back. A missing byte is said, not dropped."""
    assert_encodes_as_the_library(ours, theirs, seed=0, count=10_000)


@pytest.mark.full
def test_encodes_every_character_as_the_library(ours, theirs):
    """After a space, after a letter and before a digit, after a sign, and twice."""
    for code in [*range(0xD800), *range(0xE000, 0x110000)]:
        letter = chr(code)
        if not without_token(ours, letter):
            text = f" {letter} a{letter}1 !{letter}{letter}"
            assert ours.encode(text) == theirs.encode(text).ids, hex(code)


def test_a_million_letters_as_the_library(ours, theirs):
    """A quarter of the Bible in one piece."""
    text = "\n".join(bible_verses("web").values())[:1_000_000]
    assert np.array_equal(ours.encode(text), theirs.encode(text).ids)
    assert ours.encode("The capital of France is") == [504, 3575, 282, 4649, 314]


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("it's 1990s", ["it", "'s", " ", "1", "9", "9", "0", "s"]),
        ("a  b", ["a", " ", " b"]),
        ("a  5", ["a", "  ", "5"]),
        ("a \n\n b ", ["a", " \n\n", " b", " "]),
        ("x=(½)", ["x", "=(", "½", ")"]),
        ("e\u0301'S", ["e", "\u0301'", "S"]),
    ],
)
def test_pieces_by_hand(text, pieces):
    """GPT-2's rule after the digits are cut off, worked out on paper."""
    assert train("a", 0).pieces.findall(text) == pieces


def test_gpt2s_pieces_are_the_librarys():
    """GPT-2 keeps numbers whole, with the space before them."""
    library = pre_tokenizers.ByteLevel(add_prefix_space=False)
    generator = random.Random(2)
    for _ in range(500):
        text = "".join(letter for letter in fuzzed(generator) if not is_newer(letter))
        expected = [text[start:end] for _, (start, end) in library.pre_tokenize_str(text)]
        assert regex.findall(GPT2_PIECES, text) == expected, repr(text)


def trained_by_the_library(text, merges):
    tokenizer = Tokenizer(models.BPE())
    digits, pieces = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return json.loads(tokenizer.to_str())["model"]


def test_learns_the_librarys_merges_from_the_bible():
    """All 4,096 in their order, ties too, and the same ids; in under 5 seconds of one core."""
    text = "\n".join(bible_verses("web").values())
    started = time.process_time()
    learned = train(text, 4096)
    assert time.process_time() - started < 5
    model = trained_by_the_library(text, 4096)
    merges = [(unspelled(a), unspelled(b)) for a, b in model["merges"]]
    assert not [pair for pair in zip(learned.merges, merges, strict=True) if pair[0] != pair[1]]
    ids = {spelled(token): i for i, token in enumerate(learned.tokens)}
    assert not ids.items() ^ model["vocab"].items()
    spelled_back = learned.decode(learned.encode(text)) == text  # pytest explains no truth value
    assert spelled_back


@pytest.mark.parametrize("seed", range(60))
def test_learns_what_counting_everything_anew_learns(seed):
    """Few letters, long runs and equal counts: overlaps (aaa) and ties come all the time."""
    generator = random.Random(seed)
    letters = generator.choice(["a", "ab", "abc", "abcé🙂 "])
    counts = {
        "".join(generator.choices(letters, k=generator.randrange(1, 12))).encode(): (
            generator.randrange(1, 4)
        )
        for _ in range(generator.randrange(1, 20))
    }
    learned = learn(counts, 50)
    assert learned == learn_naive(counts, 50)
    assert learn(counts, 7) == learned[:7]  # fewer merges are the beginning of more


def test_learns_the_papers_example():
    """Section 3.2 counts low 5, lower 2, newest 6, widest 3: es, est and lo come first of all.

    The paper marks the ends of words, and we do not; ties go to the smaller ids.
    """
    counts = {b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3}
    first = [(b"e", b"s"), (b"es", b"t"), (b"l", b"o"), (b"lo", b"w"), (b"e", b"w")]
    assert learn(counts, 5) == learn_naive(counts, 5) == first


def test_a_run_is_joined_from_the_left():
    """aaaaa is aa aa a; aaa is aa a, and counts its pair twice."""
    assert replaced([0, 0, 0, 0, 0], (0, 0), 1) == [1, 1, 0]
    assert (
        learn({b"aaa": 3, b"xy": 5}, 1) == learn_naive({b"aaa": 3, b"xy": 5}, 1) == [(b"a", b"a")]
    )
    encoding = BytePairEncoding([(b"a", b"a")])
    assert [encoding.tokens[i] for i in encoding.encode("aaaaa")] == [b"aa", b"aa", b"a"]


def test_early_merges_come_before_long_ones():
    """With bc learned first, abc is a bc, though ab is as long and further left."""
    encoding = BytePairEncoding([(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")])
    assert [encoding.tokens[i] for i in encoding.encode("abc ab")] == [b"a", b"bc", b" ", b"ab"]


@pytest.mark.parametrize("seed", range(40))
def test_a_heap_joins_as_looking_at_all_pairs_does(seed):
    """For merges in any order at all, also such as no training gives."""
    generator = random.Random(seed)
    ids = generator.choices(range(generator.randrange(1, 5)), k=generator.randrange(80))
    pairs = {(generator.randrange(9), generator.randrange(9)) for _ in range(40)}
    rank = {pair: i for i, pair in enumerate(pairs)}
    product = generator.choices(range(9), k=len(rank))
    assert joined(ids, rank, product) == joined_naive(ids, rank, product)


@pytest.mark.parametrize(
    "text", ["ab" * 100_000, "a" * 200_000, " " * 200_000], ids=["ab", "a", " "]
)
def test_a_long_run_takes_seconds(ours, theirs, text):
    """Looking at all pairs for each join would take hours."""
    started = time.process_time()
    ids = ours.encode(text)
    assert time.process_time() - started < 5
    assert np.array_equal(ids, theirs.encode(text).ids)


def test_special_tokens(ours, theirs):
    text = "<|im_start|>user\nHi <|im_end|><|endoftext|> <|im_end"
    assert ours.encode(text) == theirs.encode(text).ids
    assert ours.decode(ours.encode(text)) == text
    assert ours.encode("<|im_end|>") == [2]
    spelled_out = ours.encode("<|im_end|>", special=False)
    assert len(spelled_out) > 1 and 2 not in spelled_out
    assert ours.decode(spelled_out) == "<|im_end|>"


def test_the_longest_special_token_wins_and_names_are_no_patterns():
    encoding = train("aaa", 1, special=["<a>", "<a>+", ".*"])
    assert encoding.encode("<a>+<a>x.*") == [258, 257, encoding.ids[b"x"], 259]
    assert encoding.decode([258, 257, 259]) == "<a>+<a>.*"


def test_decodes_any_ids_as_the_library(ours, theirs):
    """Ids that no text has give bytes that are no UTF-8: one U+FFFD for each broken character."""
    generator = random.Random(3)
    for _ in range(300):
        ids = [generator.randrange(17, generator.choice([252, 49_152])) for _ in range(8)]
        assert ours.decode(ids) == theirs.decode(ids)
    half = ours.encode("😀")[:1]
    assert ours.decode(half) == "\ufffd"
    with pytest.raises(ValueError, match="can't decode"):
        ours.decode(half, errors="strict")


@pytest.mark.parametrize("wrong", [-1, 49_152])
def test_an_unknown_id_is_a_sentence(ours, wrong):
    with pytest.raises(ValueError, match=f"the ids are 0 to 49151, got {wrong}"):
        ours.decode([5, wrong])


@pytest.mark.parametrize("text", ["ab\ud800", "ab\udfff", "ab\ude00\ud83d"])
def test_half_a_character_is_a_sentence(ours, text):
    for function in (ours.encode, lambda text: train(text, 5)):
        with pytest.raises(ValueError, match="at 2 is half a character, a lone surrogate"):
            function(text)


def test_what_cannot_be_learned_from_is_a_sentence():
    with pytest.raises(ValueError, match="cannot be negative, got -1"):
        train("text", -1)
    with pytest.raises(ValueError, match="an empty text has nothing to learn from"):
        train("", 5)


def test_few_or_no_merges():
    """No merge leaves bytes; when all pieces are one token, there is nothing left to learn."""
    assert train("text", 0).tokens == BYTES
    assert train("abc abc", 50).tokens[256:] == [b"ab", b"abc", b" abc"]
    assert train("abc", 0).encode("") == [] and train("abc", 0).decode([]) == ""


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (([(b"ab", b"c")],), "need the token b'ab', which is not there"),
        (([(b"a", b"b")], BYTES), "need the token b'ab'"),
        (([(b"a", b"b")], BYTES[1:]), "need the token"),
        (([], None, ["<a>", ""]), "the special token '' cannot have the id 257"),
        (([], [*BYTES, b"<a>"], {"<a>": 3}), "the special token '<a>' cannot have the id 3"),
        (([], [*BYTES, b"<a>"], {"<a>": 400}), "the special token '<a>' cannot have the id 400"),
    ],
)
def test_a_vocabulary_with_holes_is_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        BytePairEncoding(*arguments)


def test_saved_and_loaded(ours, tmp_path):
    """The same tokens, merges, special tokens and cuts."""
    verses = " ".join(list(bible_verses("web").values())[:300])
    for encoding in (ours, train(verses, 200, special=["<|end|>"], pieces=GPT2_PIECES)):
        again = BytePairEncoding.load(encoding.save(tmp_path / "encoding.json"))
        assert not [a for a, b in zip(again.tokens, encoding.tokens, strict=True) if a != b]
        assert not [a for a, b in zip(again.merges, encoding.merges, strict=True) if a != b]
        assert (again.special, again.pieces.pattern) == (encoding.special, encoding.pieces.pattern)
        text = "In 2026,  the\n beginning <|end|>"
        assert again.encode(text) == encoding.encode(text)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: text.replace('"merges"', '"merge"'),
        lambda text: text.replace('"he"', '"日"'),
        lambda text: text.replace('"he", ', "", 1),
        lambda text: "[]",
        lambda text: text.replace(r"\\p{L}", "("),
    ],
)
def test_a_damaged_file_is_a_sentence(tmp_path, damage):
    path = train("the cat and the dog and the cat", 5).save(tmp_path / "encoding.json")
    path.write_text(damage(path.read_text("utf-8")), "utf-8")
    with pytest.raises(ValueError, match=r"encoding\.json is not a saved encoding"):
        BytePairEncoding.load(path)


def test_spelling():
    """GPT-2's: a space is Ġ, a new line Ċ; every byte has a letter that can be seen."""
    assert spelled(b" the\n") == "ĠtheĊ" and unspelled("ĠtheĊ") == b" the\n"
    letters = [spelled(letter) for letter in BYTES]
    assert sorted(letters) == letters == sorted(pre_tokenizers.ByteLevel.alphabet())
    with pytest.raises(ValueError, match="is not in GPT-2's spelling: ' ' spells no byte"):
        unspelled("a b")
