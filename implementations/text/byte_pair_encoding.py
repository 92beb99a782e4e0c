"""Byte-pair encoding: start from the 256 bytes, and again and again join the commonest pair.

    train     merge_k = argmax of count(a b) over pairs of neighbours; then a b becomes ab
    encode    of all pairs that have a merge, join the leftmost of the earliest merge; repeat

Text is first cut into pieces (a word with the space before it, a run of signs, a digit), and no
merge reaches across a cut. It starts from bytes, so every text has a code.

naive     counts all pairs anew for each merge, and looks at all pairs of a piece for each join
fast      recounts only the pieces that held the pair, and finds the next pair in a heap

Of equally common pairs the one of smaller ids is joined, its left id compared first, as in the
tokenizers library. Ids count the bytes in GPT-2's order, visible characters first, then the merges,
then the special tokens.

Paper   Sennrich et al. 2016, arXiv:1508.07909, algorithm 1; over bytes: Radford et al. 2019,
        Language Models are Unsupervised Multitask Learners, section 2.2
Run     uv run python implementations/text/byte_pair_encoding.py
"""

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import regex

from implementations.lab.files import write_atomically
from implementations.sources.weights import smollm2_vocabulary

Pair = tuple[int, int]
Merge = tuple[bytes, bytes]

# A letter is \p{L} and a number \p{N}, of any script.
GPT2_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Every digit for itself, and no space goes with it.
DIGIT_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
BYTES = [bytes([byte]) for byte in (*VISIBLE, *HIDDEN)]
# GPT-2 spells a byte with a letter that can be seen: its own in Latin-1, or one from U+0100 on.
LETTERS = {byte: chr(byte) for byte in VISIBLE} | {b: chr(256 + i) for i, b in enumerate(HIDDEN)}
SPELLED = {letter: byte for byte, letter in LETTERS.items()}


class BytePairEncoding:
    """Text to token ids and back.

    Args:
        merges: pairs of tokens in the order in which they were learned.
        tokens: the token of each id; the 256 bytes and what the merges make, unless given.
        special: tokens that no merge makes, with their ids; without ids, they follow the others.
        pieces: the regular expression that cuts text, GPT2_PIECES or DIGIT_PIECES.

    Raises:
        ValueError: a merge needs or makes a token that is not there, or a special token is empty or
            has the id of another.
    """

    def __init__(
        self,
        merges: Sequence[Merge],
        tokens: Sequence[bytes] | None = None,
        special: Mapping[str, int] | Sequence[str] = (),
        pieces: str = DIGIT_PIECES,
    ):
        tokens = list(
            dict.fromkeys([*BYTES, *(a + b for a, b in merges)]) if tokens is None else tokens
        )
        if not isinstance(special, Mapping):
            special = {token: len(tokens) + i for i, token in enumerate(dict.fromkeys(special))}
            tokens += [token.encode() for token in special]
        for token, i in special.items():
            if not token or tokens[i : i + 1] != [token.encode()]:
                raise ValueError(f"the special token {token!r} cannot have the id {i}")
        self.merges, self.tokens, self.special = list(merges), tokens, dict(special)
        self.pieces = regex.compile(pieces)
        reserved = set(self.special.values())
        self.ids = {token: i for i, token in enumerate(tokens) if i not in reserved}
        if missing := {token for a, b in merges for token in (a, b, a + b)} - self.ids.keys():
            raise ValueError(f"the merges need the token {min(missing)!r}, which is not there")
        self.rank = {(self.ids[a], self.ids[b]): rank for rank, (a, b) in enumerate(merges)}
        self.product = [self.ids[a + b] for a, b in merges]
        longest_first = sorted(self.special, key=len, reverse=True)
        self.marks = regex.compile("|".join(map(regex.escape, longest_first)) or r"(?!)")
        # Words come again: of the 950,000 pieces of the Bible, 15,000 differ.
        self.encode_piece = lru_cache(2**16)(self.encode_piece)

    def __reduce__(self):
        """Pickled without what it remembers, for the workers of a data loader."""
        return type(self), (self.merges, self.tokens, self.special, self.pieces.pattern)

    @classmethod
    def from_smollm2(cls) -> "BytePairEncoding":
        """SmolLM2's 49,152 tokens; 21 bytes have none (see sources/weights.py)."""
        tokens, merges, special, *_ = smollm2_vocabulary()
        tokens = [token.encode() if token in special else unspelled(token) for token in tokens]
        return cls([(unspelled(a), unspelled(b)) for a, b in merges], tokens, special)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of a text; nothing is added.

        Args:
            special: whether the name of a special token in the text is that token, as in the
                tokenizers library. Switch it off for what a stranger wrote.

        Raises:
            ValueError: the text holds half a character (a lone surrogate), or a byte without a
                token, which the tokenizers library would drop.
        """
        require_whole_characters(text)
        ids, start = [], 0
        for mark in self.marks.finditer(text) if special else ():
            ids += self.encode_ordinary(text[start : mark.start()])
            ids.append(self.special[mark[0]])
            start = mark.end()
        return ids + self.encode_ordinary(text[start:])

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text in which no token is special."""
        return [i for piece in self.pieces.findall(text) for i in self.encode_piece(piece)]

    def encode_piece(self, piece: str) -> tuple[int, ...]:
        """The ids of one piece."""
        letters = [bytes([byte]) for byte in piece.encode()]
        if missing := [letter for letter in letters if letter not in self.ids]:
            raise ValueError(f"the vocabulary has no token for the byte {missing[0]} in {piece!r}")
        return tuple(joined([self.ids[letter] for letter in letters], self.rank, self.product))

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """The text of some ids, special tokens by name.

        Args:
            errors: what becomes of bytes that are no UTF-8, half a character say: "replace" puts
                U+FFFD in their place, "strict" raises UnicodeDecodeError, a ValueError.

        Raises:
            ValueError: there is no such id.
        """
        ids = list(ids)
        if wrong := [i for i in ids if not 0 <= i < len(self.tokens)]:
            raise ValueError(f"the ids are 0 to {len(self.tokens) - 1}, got {wrong[0]}")
        return b"".join(self.tokens[i] for i in ids).decode(errors=errors)

    def save(self, path: Path) -> Path:
        """Write all of it as JSON in GPT-2's spelling, wholly or not at all."""
        record = {
            "pieces": self.pieces.pattern,
            "special": self.special,
            "tokens": [spelled(token) for token in self.tokens],
            "merges": [[spelled(a), spelled(b)] for a, b in self.merges],
        }
        return write_atomically(path, json.dumps(record, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> "BytePairEncoding":
        """What `save` wrote.

        Raises:
            ValueError: the file is damaged.
        """
        try:
            record = json.loads(path.read_text("utf-8"))
            merges = [(unspelled(a), unspelled(b)) for a, b in record["merges"]]
            tokens = [unspelled(token) for token in record["tokens"]]
            return cls(merges, tokens, record["special"], record["pieces"])
        except (ValueError, KeyError, TypeError, AttributeError, regex.error) as problem:
            raise ValueError(f"{path} is not a saved encoding: {problem!r}") from None


def spelled(token: bytes) -> str:
    """A token in GPT-2's spelling: " the" is `Ġthe`."""
    return "".join(LETTERS[byte] for byte in token)


def unspelled(token: str) -> bytes:
    """The bytes of a token in GPT-2's spelling; ValueError if it is in another."""
    if foreign := set(token) - SPELLED.keys():
        raise ValueError(f"{token!r} is not in GPT-2's spelling: {min(foreign)!r} spells no byte")
    return bytes(SPELLED[letter] for letter in token)


def require_whole_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        half = text[problem.start]
        raise ValueError(
            f"{half!r} at {problem.start} is half a character, a lone surrogate: UTF-8 has none"
        ) from None


def joined_naive(ids: Sequence[int], rank: Mapping[Pair, int], product: Sequence[int]) -> list[int]:
    """Join the leftmost pair of the earliest merge, until no pair has a merge.

    Args:
        rank: which merge joins a pair, counted from 0.
        product: the id that a merge makes.
    """
    ids = list(ids)
    while known := [(rank[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in rank]:
        merge, i = min(known)
        ids[i : i + 2] = [product[merge]]
    return ids


def joined(ids: Sequence[int], rank: Mapping[Pair, int], product: Sequence[int]) -> list[int]:
    """The same with a heap of pairs over a linked list: n log n, also for a run of a million."""
    ids, end = list(ids), len(ids)
    before, after = list(range(-1, end - 1)), list(range(1, end + 1))
    heap = [(rank[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in rank]
    heapq.heapify(heap)
    while heap:
        merge, i = heapq.heappop(heap)
        j = after[i]
        if j == end or rank.get((ids[i], ids[j])) != merge:
            continue  # one of the two has been joined to another neighbour
        ids[i], ids[j], after[i] = product[merge], -1, after[j]
        if after[i] < end:
            before[after[i]] = i
        for left, right in ((before[i], i), (i, after[i])):
            if left >= 0 and right < end and (ids[left], ids[right]) in rank:
                heapq.heappush(heap, (rank[ids[left], ids[right]], left))
    return [i for i in ids if i >= 0]


def train(
    text: str, merges: int, *, special: Sequence[str] = (), pieces: str = DIGIT_PIECES
) -> BytePairEncoding:
    """Learn `merges` merges from a text, or fewer if before that every piece is one token.

    Raises:
        ValueError: `merges` is negative, or the text is empty or holds a lone surrogate.
    """
    if merges < 0:
        raise ValueError(f"the number of merges cannot be negative, got {merges}")
    if not text:
        raise ValueError("an empty text has nothing to learn from")
    require_whole_characters(text)
    counts = Counter(regex.findall(pieces, text))
    learned = learn({piece.encode(): count for piece, count in counts.items()}, merges)
    return BytePairEncoding(learned, special=special, pieces=pieces)


def learn_naive(counts: Mapping[bytes, int], merges: int) -> list[Merge]:
    """Merges from how often each piece occurs: count every pair, join the commonest, repeat."""
    tokens, words, learned = list(BYTES), as_ids(counts), []
    for _ in range(merges):
        pairs = Counter()
        for word, count in zip(words, counts.values(), strict=True):
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        a, b = min(pairs, key=lambda pair: (-pairs[pair], pair))
        learned.append((tokens[a], tokens[b]))
        words = [replaced(word, (a, b), len(tokens)) for word in words]
        tokens.append(tokens[a] + tokens[b])
    return learned


def learn(counts: Mapping[bytes, int], merges: int) -> list[Merge]:
    """The same, recounting only pieces that held the pair; a heap knows the commonest."""
    tokens, words, learned = list(BYTES), as_ids(counts), []
    times, pairs, where = list(counts.values()), Counter(), defaultdict(set)
    for index, word in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += times[index]
            where[pair].add(index)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    while heap and len(learned) < merges:
        count, pair = heapq.heappop(heap)
        if pairs[pair] != -count:
            # It became rarer when a neighbour was joined, and waits again with its true count.
            if pairs[pair]:
                heapq.heappush(heap, (-pairs[pair], pair))
            continue
        a, b = pair
        learned.append((tokens[a], tokens[b]))
        new, commoner = len(tokens), set()
        tokens.append(tokens[a] + tokens[b])
        for index in where.pop(pair):
            for neighbours in pairwise(words[index]):
                pairs[neighbours] -= times[index]
            words[index] = replaced(words[index], pair, new)
            for neighbours in pairwise(words[index]):
                pairs[neighbours] += times[index]
                if new in neighbours:
                    where[neighbours].add(index)
                    commoner.add(neighbours)
        for neighbours in commoner:
            heapq.heappush(heap, (-pairs[neighbours], neighbours))
    return learned


def as_ids(pieces: Iterable[bytes]) -> list[list[int]]:
    """Each piece as the ids of its bytes."""
    ids = {letter[0]: i for i, letter in enumerate(BYTES)}
    return [[ids[byte] for byte in piece] for piece in pieces]


def replaced(word: list[int], pair: Pair, new: int) -> list[int]:
    """The word with `pair` replaced by `new` wherever it stands, from left to right."""
    result, i = [], 0
    while i < len(word):
        found = tuple(word[i : i + 2]) == pair
        result.append(new if found else word[i])
        i += 2 if found else 1
    return result


def main() -> None:
    import time

    from implementations.sources.text import bible_verses

    text = "\n".join(bible_verses("web").values())
    started = time.perf_counter()
    encoding = train(text, 4096)
    print(f"4,096 merges from {len(text):,} characters in {time.perf_counter() - started:.1f} s")
    print("  first ", " ".join(spelled(a + b) for a, b in encoding.merges[:16]))
    print("  last  ", " ".join(spelled(a + b) for a, b in encoding.merges[-8:]))
    for name, other in {"its own": encoding, "SmolLM2's": BytePairEncoding.from_smollm2()}.items():
        ids = other.encode(text)
        exact = "exactly" if other.decode(ids) == text else "WRONGLY"
        rate = len(text.encode()) / len(ids)
        print(f"  in {name} tokens: {rate:.2f} bytes a token, {exact} decoded")


if __name__ == "__main__":
    main()
