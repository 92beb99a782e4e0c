"""Structured output: text that a regular expression or a JSON schema describes, always.

    state        of the automaton after what is written
    allowed      tokens whose bytes the automaton can read, after which there is still time to end
    next state   by the token that was drawn among them

The automaton reads bytes and the model writes tokens, so outlines-core walks every token through it
from every state once. A mask alone gives no valid text if the tokens run out in the middle of it;
so we count how many tokens each state still needs at least, and forbid a token after which too few
would remain. Masked sampling is not the model's distribution given that its text is valid: it is
renormalised token by token, and never looks ahead to what a prefix will cost.

Paper   Willard & Louf 2023, arXiv:2307.09702
Run     uv run python implementations/serving/structured.py
"""

import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from outlines_core import Index, Vocabulary
from outlines_core.json_schema import build_regex_from_schema
from torch import Tensor

# What outlines-core turns into an expression. Of others it says nothing and ignores some (minimum,
# uniqueItems), so that its text would be invalid.
KEYWORDS = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
    "string": {"minLength", "maxLength"},
    "integer": set(),
    "number": set(),
    "boolean": set(),
    "null": set(),
}
NOTES = {"title", "description"}
# Ends every text inside the automaton. outlines-core 0.2.14 forgets how a complete text may go on,
# so that `[0-9]+` would be one token; no text is complete before this byte, which none may hold.
STOP = b"\x00"


class Automaton:
    """Which tokens may follow, for every state that a text of the expression can be in.

    Args:
        expression: in the syntax of Rust's crate `regex`; it describes the whole text.
        tokens: the bytes of each token by its id; None where a token writes no text.
        end: the token that ends a text.

    Raises:
        ValueError: the expression cannot be read, no text of it can be written in these tokens, or
            the end is not among them.
    """

    def __init__(self, expression: str, tokens: Sequence[bytes | None], end: int):
        if not 0 <= end < len(tokens):
            raise ValueError(f"a text ends with a token from 0 to {len(tokens) - 1}, got {end}")
        spelled: dict[bytes, list[int]] = {STOP: [end]}
        for i, token in enumerate(tokens):
            if token and i != end and STOP not in token:
                spelled.setdefault(token, []).append(i)
        try:
            index = Index(f"(?:{expression})\\x00", Vocabulary(len(tokens), spelled))
        except ValueError as problem:
            raise ValueError(f"the expression {expression!r} cannot be served: {problem}") from None
        self.start, self.end, self.vocabulary = index.get_initial_state(), end, len(tokens)
        moves, complete = index.get_transitions(), index.get_final_states()
        self.final = {state for state, after in moves.items() if after.get(end) in complete}
        unread = {end, len(tokens)}  # outlines-core's own end is one token more than there are
        self.next = {
            state: {token: then for token, then in after.items() if token not in unread}
            for state, after in moves.items()
        }
        self.needed = distances(self.next, self.final)
        self.table = {
            state: (
                torch.tensor(list(moves), dtype=torch.long),
                torch.tensor([self.shortest(after) for after in moves.values()]),
            )
            for state, moves in self.next.items()
        }
        if self.start not in self.needed:
            raise ValueError(f"no text of {expression!r} can be written in these tokens")

    def shortest(self, state: int) -> int:
        """How many tokens a complete text still needs at least, without the one that ends it; more
        than any text has if none can be completed."""
        return self.needed.get(state, 2**31)

    def allowed(self, state: int, remaining: int) -> Bool[Tensor, " vocabulary"]:
        """The tokens after which a text can be completed within `remaining` tokens in all.

        Raises:
            ValueError: no text can.
        """
        if self.shortest(state) > remaining:
            needed = self.shortest(state)
            raise ValueError(f"{needed} tokens are needed for a complete text, {remaining} remain")
        mask = torch.zeros(self.vocabulary, dtype=torch.bool)
        tokens, needed = self.table.get(state, (torch.zeros(0).long(), torch.zeros(0)))
        mask[tokens[needed < remaining]] = True
        mask[self.end] = state in self.final
        return mask

    def after(self, state: int, token: int) -> int:
        """The state after one more token.

        Raises:
            ValueError: the token cannot follow.
        """
        if token not in self.next.get(state, {}):
            raise ValueError(f"token {token} cannot follow in state {state}")
        return self.next[state][token]


def distances(moves: Mapping[int, Mapping[int, int]], final: set[int]) -> dict[int, int]:
    """Tokens from each state to the nearest final one, breadth first and backwards."""
    before: dict[int, set[int]] = {}
    for state, tokens in moves.items():
        for after in set(tokens.values()):
            before.setdefault(after, set()).add(state)
    needed, queue = dict.fromkeys(final, 0), deque(final)
    while queue:
        state = queue.popleft()
        for earlier in before.get(state, ()):
            if earlier not in needed:
                needed[earlier] = needed[state] + 1
                queue.append(earlier)
    return needed


def expression_of(schema: Mapping[str, Any]) -> str:
    """A regular expression of JSON texts that the schema holds for: one order of the keys, at most
    one space where JSON allows any.

    Raises:
        ValueError: a keyword that would not be enforced, or nothing meets the schema.
    """
    check_schema(schema, "the schema")
    return build_regex_from_schema(json.dumps(schema, allow_nan=False))


def check_schema(schema: Any, where: str) -> None:
    """Raise ValueError unless all that the schema says is enforced, and something can meet it."""
    if not isinstance(schema, Mapping):
        raise ValueError(f"{where} is not an object but {schema!r}")
    given = set(schema) - NOTES
    if given in ({"enum"}, {"const"}):
        if not schema.get("enum", [None]):
            raise ValueError(f"{where} has an empty enum, which nothing meets")
        return
    if given == {"anyOf"}:
        if not isinstance(schema["anyOf"], list) or not schema["anyOf"]:
            raise ValueError(f"{where} has an empty anyOf, which nothing meets, or not a list")
        for i, option in enumerate(schema["anyOf"]):
            check_schema(option, f"{where}.anyOf[{i}]")
        return
    kind = schema.get("type")
    if not isinstance(kind, str) or kind not in KEYWORDS:  # of several types: anyOf
        raise ValueError(f"{where} needs a type among {', '.join(KEYWORDS)}, got {kind!r}")
    ignored = given - {"type"} - KEYWORDS[kind]
    if ignored:
        raise ValueError(f"{where} has {sorted(ignored)[0]}, which is not enforced for {kind}")
    for low, high in (("minItems", "maxItems"), ("minLength", "maxLength")):
        for limit in {low, high} & given:
            if type(schema[limit]) is not int or schema[limit] < 0:
                raise ValueError(f"{where}.{limit} is a number from 0 on, got {schema[limit]!r}")
        if schema.get(low, 0) > schema.get(high, float("inf")):
            raise ValueError(f"{where} asks for {low} {schema[low]} and {high} {schema[high]}")
    if kind == "array":
        check_schema(schema.get("items"), f"{where}.items")
    if kind == "object":
        properties, required = schema.get("properties"), schema.get("required", [])
        if not isinstance(properties, Mapping) or not properties:
            raise ValueError(f"{where} is an object without properties")
        if schema.get("additionalProperties", False) is not False:
            raise ValueError(f"{where} allows additionalProperties, which are never written")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise ValueError(f"{where}.required is a list of names, got {required!r}")
        for missing in set(required) - set(properties):
            raise ValueError(f"{where} requires {missing!r}, which it does not describe")
        for name, part in properties.items():
            check_schema(part, f"{where}.{name}")


def smollm2_bytes() -> list[bytes | None]:
    """The bytes of each of SmolLM2's tokens; None for the special ones."""
    from implementations.sources.weights import smollm2_vocabulary
    from implementations.text.byte_pair_encoding import unspelled

    vocabulary = smollm2_vocabulary()
    special = set(vocabulary.special.values())
    return [None if i in special else unspelled(t) for i, t in enumerate(vocabulary.tokens)]


def main() -> None:
    tokens = [b"1", b"2", b"12", b", ", None]
    automaton = Automaton("[0-9]{3}(, [0-9]{3})*", tokens, end=4)
    state, written = automaton.start, b""
    for token in (2, 0, 3):
        allowed = automaton.allowed(state, remaining=8).nonzero()[:, 0].tolist()
        names = [tokens[i] or "end" for i in allowed]
        print(f"after {written!s:7} at least {automaton.shortest(state)} more, one of {names}")
        state, written = automaton.after(state, token), written + tokens[token]
    print(expression_of({"type": "object", "properties": {"age": {"type": "integer"}}}))


if __name__ == "__main__":
    main()
