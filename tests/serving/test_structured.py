"""Masks against every text that can be written; engine output against the expression and JSON."""

import itertools
import json
import re

import pytest
import torch

from implementations.serving.engine import Engine, Parameters
from implementations.serving.structured import (
    Automaton,
    distances,
    expression_of,
    smollm2_bytes,
)

TOKENS = [b"a", b"b", b"ab", b"1", None]
END = 4
EXPRESSIONS = ["a(b|1)*", "(ab){2,3}", "a?b?1", "[ab]+1[ab]*", "(a|ab)(1|b1)", "1+"]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_allowed_tokens_are_those_that_some_text_takes(expression):
    """Against all texts of up to five tokens, tried one by one with Python's `re`."""
    automaton = Automaton(expression, TOKENS, END)
    length = 5
    complete = {
        text
        for n in range(length + 1)
        for text in itertools.product(range(4), repeat=n)
        if re.fullmatch(expression, b"".join(TOKENS[i] for i in text).decode())
    }
    states = {(): automaton.start}
    for n in range(length):
        for text in [text for text in states if len(text) == n]:
            for remaining in range(length - n + 1):
                starts = {
                    full[n]
                    for full in complete
                    if full[:n] == text and n < len(full) <= n + remaining
                }
                ends = {END} if text in complete else set()
                if automaton.shortest(states[text]) > remaining:
                    assert not starts | ends
                    continue
                found = automaton.allowed(states[text], remaining).nonzero()[:, 0]
                assert set(found.tolist()) == starts | ends, (text, remaining)
            for token in automaton.next[states[text]]:
                states[(*text, token)] = automaton.after(states[text], token)


def test_distances_by_hand():
    """0 -> 1 -> 2 final, 0 -> 3 which leads nowhere."""
    moves = {0: {5: 1, 6: 3}, 1: {5: 2}, 2: {}, 3: {5: 3}}
    assert distances(moves, {2}) == {2: 0, 1: 1, 0: 2}


LETTERS = [bytes([byte]) for byte in b'{}",:0123456789abcdefghi]['] + [b"true", b"null", None]


def letters(tokens: list[int]) -> str:
    return b"".join(LETTERS[token] or b"" for token in tokens).decode()


SCHEMAS = [
    {"type": "integer"},
    {"type": "array", "items": {"enum": ["a", "bc", 7]}, "minItems": 1, "maxItems": 2},
    {
        "type": "object",
        "properties": {
            "a": {"type": "string", "minLength": 2, "maxLength": 4},
            "b": {"anyOf": [{"type": "null"}, {"const": 12}]},
        },
        "required": ["a", "b"],
    },
]


def meets(value, schema) -> bool:
    """These three schemas, checked by hand."""
    if schema["type"] == "integer":
        return isinstance(value, int)
    if schema["type"] == "array":
        return 1 <= len(value) <= 2 and all(item in ("a", "bc", 7) for item in value)
    return set(value) == {"a", "b"} and 2 <= len(value["a"]) <= 4 and value["b"] in (None, 12)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema["type"])
def test_whatever_the_model_wants_the_text_is_valid(tiny, schema):
    """A model that knows nothing of JSON, twelve seeds, from the fewest tokens on."""
    automaton = Automaton(expression_of(schema), LETTERS, end=28)
    fewest = automaton.shortest(automaton.start)
    engine = Engine(tiny, blocks=120, page=4)
    for count in (fewest, fewest + 1, fewest + 12):
        wanted = [
            Parameters(count, temperature=2.0 * (seed > 0), seed=seed, constraint=automaton)
            for seed in range(12)
        ]
        for got in engine.generate([[seed] for seed in range(12)], wanted):
            assert got.error is None and got.finish in ("stop", "length")
            assert meets(json.loads(letters(got.output)), schema)
    if fewest > 1:
        with pytest.raises(ValueError, match=f"at least {fewest} tokens, got {fewest - 1}"):
            engine.add([1], Parameters(fewest - 1, constraint=automaton))


def test_a_fork_goes_on_in_the_same_state(tiny):
    automaton = Automaton("[ab]{12}1", LETTERS, end=28)
    engine = Engine(tiny, blocks=40, page=4)
    request = engine.add([3], Parameters(20, temperature=1.0, constraint=automaton))
    for _ in range(6):
        engine.step()
    twin = engine.fork(request, Parameters(20, temperature=1.0, seed=1, constraint=automaton))
    with pytest.raises(ValueError, match="keeps the constraint"):
        engine.fork(request, Parameters(20))
    while not (twin.finish and request.finish):
        engine.step()
    for tokens in (request.output, twin.tokens[1:]):
        assert re.fullmatch("[ab]{12}1", letters(tokens))


def test_a_fork_is_measured_from_its_own_state(tiny):
    """Of eight letters six are written: the twin needs two more, and one is too few."""
    automaton = Automaton("abcdefgh", LETTERS, end=28)
    engine = Engine(tiny, blocks=40, page=4)
    request = engine.add([3], Parameters(8, constraint=automaton))
    for _ in range(6):
        engine.step()
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        engine.fork(request, Parameters(1, constraint=automaton))
    twin = engine.fork(request, Parameters(2, constraint=automaton))
    while not twin.finish:
        engine.step()
    assert letters(twin.tokens[1:]) == "abcdefgh"


BAD = {
    "type among": {"type": "nothing"},
    "type among .*null'\\]": {"type": ["string", "null"]},
    "minLength is a number from 0 on, got '2'": {"type": "string", "minLength": "2"},
    "minLength is a number from 0 on, got -1": {"type": "string", "minLength": -1},
    "maxItems is a number": {"type": "array", "items": {"type": "null"}, "maxItems": 2.5},
    "required is a list of names, got None": {
        "type": "object",
        "properties": {"a": {"type": "null"}},
        "required": None,
    },
    "or not a list": {"anyOf": 5},
    "JSON compliant": {"const": float("nan")},
    "minimum, which is not enforced for integer": {"type": "integer", "minimum": 0},
    "format, which": {"type": "string", "format": "email"},
    "empty enum": {"enum": []},
    "empty anyOf": {"anyOf": []},
    "minLength 5 and maxLength 2": {"type": "string", "minLength": 5, "maxLength": 2},
    "without properties": {"type": "object"},
    "requires 'b'": {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["b"]},
    "the schema.items is not an object": {"type": "array"},
    "additionalProperties": {
        "type": "object",
        "properties": {"a": {"type": "null"}},
        "additionalProperties": True,
    },
    "the schema.a needs a type": {"type": "object", "properties": {"a": {}}},
    "the schema.anyOf\\[1\\] needs": {"anyOf": [{"type": "null"}, {"not": {}}]},
    "an object but False": False,
}


@pytest.mark.parametrize("sentence", BAD)
def test_a_schema_that_would_not_be_kept_is_refused(sentence, unchecked):
    with pytest.raises(ValueError, match=sentence):
        expression_of(BAD[sentence])


@pytest.mark.parametrize("expression", ["[", "a(?=b)", "c", "\\x00b"])
def test_an_expression_that_no_tokens_write_is_refused(expression):
    with pytest.raises(ValueError, match="0 to 4, got 5"):
        Automaton("a", TOKENS, end=5)
    with pytest.raises(ValueError, match=r"expression|can be written"):
        Automaton(expression, TOKENS, END)


def test_a_state_out_of_tokens_and_a_token_out_of_turn():
    automaton = Automaton("(ab){2}", TOKENS, END)
    with pytest.raises(ValueError, match="2 tokens are needed for a complete text, 1 remain"):
        automaton.allowed(automaton.start, 1)
    with pytest.raises(ValueError, match="cannot follow"):
        automaton.after(automaton.start, 3)


def test_smollm2s_tokens_spell_a_year():
    """Over the real vocabulary, whose digits are single tokens."""
    tokens = smollm2_bytes()
    automaton = Automaton("(19|20)[0-9]{2}", tokens, end=2)
    first = automaton.allowed(automaton.start, 4).nonzero()[:, 0].tolist()
    assert [tokens[i] for i in first] == [b"1", b"2"] and automaton.shortest(automaton.start) == 4
    assert tokens[0] is None and torch.tensor(first).max() < len(tokens)
