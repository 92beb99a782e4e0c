"""The block manager: which pages of a cache hold which text, so that texts can share them.

    table[i]  = block of tokens i · page ... (i + 1) · page - 1        one table a text
    digest(i) = SHA-256(digest(i - 1), tokens of block i)              full blocks only

A cache cut into blocks of equal size wastes less than one block a text, where a slab wastes all
that the text never grew into. A block may stand in several tables; `references` counts them.

    fork      copies the table, not the blocks
    append    copies a shared last block before it writes there (copy on write)
    free      a block in no table keeps its contents until another text needs the memory
    allocate  finds blocks whose whole prefix is the same by digest, in use or not, and reuses them

A key depends on all tokens before it, so a block may be reused only if everything up to it is
equal: that is why the digest takes in the one before. Nothing here touches a tensor. The caller
writes what `allocate` and `append` made room for before it asks for anything else.

Paper   Kwon et al. 2023, arXiv:2309.06180 (PagedAttention, sections 4.2 to 4.5)
Run     uv run python implementations/serving/block_manager.py
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class OutOfBlocks(Exception):
    """No memory for what was asked; nothing has changed. Free a text, then ask again."""


class Copy(NamedTuple):
    """A block whose contents have to be copied before anything is written."""

    source: int
    target: int


@dataclass(eq=False)
class Text:
    """A text in the cache: its tokens and where they are."""

    tokens: list[int]
    table: list[int]
    digests: list[bytes] = field(default_factory=list)
    """of its full blocks"""


class BlockManager:
    """Hands out `blocks` blocks of `page` tokens each.

    Raises:
        ValueError: there is no block, or no token in one.
    """

    def __init__(self, blocks: int, page: int):
        if min(blocks, page) < 1:
            raise ValueError(f"a cache needs blocks and tokens in them, got {blocks} of {page}")
        self.page, self.references = page, [0] * blocks
        self.clear()

    def clear(self) -> None:
        """No text, and nothing to find."""
        blocks = len(self.references)
        self.references = [0] * blocks
        self.idle = OrderedDict.fromkeys(range(blocks))  # in no table; the first is taken first
        self.digest: dict[int, bytes] = {}  # of blocks that can be found again
        self.found: dict[bytes, int] = {}  # the inverse
        self.texts: set[Text] = set()

    def allocate(self, tokens: Sequence[int]) -> tuple[Text, int]:
        """A text, and how many of its first tokens are in the cache already.

        The last token is never among them: it has to be read, or there would be no logits.

        Raises:
            ValueError: there is no token.
            OutOfBlocks: too few blocks are idle.
        """
        if not tokens:
            raise ValueError("a text has at least one token, got none")
        tokens = list(tokens)
        digests = self.digests(tokens)
        table = self.known(digests[: (len(tokens) - 1) // self.page])
        known = len(table) * self.page
        missing = self.count(len(tokens)) - len(table)
        self.require(missing, len(self.idle) - sum(block in self.idle for block in table))
        for block in table:
            self.share(block)
        table += [self.take() for _ in range(missing)]
        text = Text(tokens, table, digests)
        self.texts.add(text)
        self.register(text, known // self.page)
        return text, known

    def append(self, text: Text, tokens: Sequence[int]) -> list[Copy]:
        """Make room for more tokens; the copies have to be made before they are written.

        Raises:
            ValueError: the text was freed.
            OutOfBlocks: too few blocks are idle.
        """
        self.check(text)
        if not tokens:
            return []
        start, partial = len(text.tokens), len(text.tokens) % self.page
        shared = partial > 0 and self.references[text.table[-1]] > 1
        # 14 of 16 tokens of a page begin no block, fill none and share none.
        if not shared and 0 < partial < self.page - len(tokens):
            text.tokens += tokens
            return []
        missing = self.count(start + len(tokens)) - len(text.table)
        self.require(missing + shared, len(self.idle))
        copies = []
        if shared:
            copies = [Copy(text.table[-1], self.take())]
            self.release(text.table[-1])
            text.table[-1] = copies[0].target
        text.table += [self.take() for _ in range(missing)]
        text.tokens += tokens
        full = len(text.digests)
        if len(text.tokens) // self.page > full:
            text.digests = self.digests(text.tokens, text.digests)
            self.register(text, full)
        return copies

    def fork(self, text: Text) -> Text:
        """The same text once more, in the same blocks.

        Raises:
            ValueError: the text was freed.
        """
        self.check(text)
        for block in text.table:
            self.share(block)
        twin = Text(list(text.tokens), list(text.table), list(text.digests))
        self.texts.add(twin)
        return twin

    def free(self, text: Text) -> None:
        """Give its blocks back; their contents can be found until the memory is taken.

        The last block goes first, so that of one text the end is evicted before the start, without
        which it could not be found.

        Raises:
            ValueError: the text was freed before.
        """
        self.check(text)
        self.texts.remove(text)
        for block in reversed(text.table):
            self.release(block)

    def count(self, tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-tokens // self.page)

    def digests(self, tokens: list[int], known: Sequence[bytes] = ()) -> list[bytes]:
        """Of every full block; the first of them are known."""
        digests = list(known)
        for start in range(len(known) * self.page, len(tokens) - self.page + 1, self.page):
            parent = digests[-1] if digests else b""
            block = array("q", tokens[start : start + self.page]).tobytes()
            digests.append(hashlib.sha256(parent + block).digest())
        return digests

    def known(self, digests: list[bytes]) -> list[int]:
        """The blocks of the longest start that is in the cache."""
        table = []
        for digest in digests:
            if digest not in self.found:
                break
            table.append(self.found[digest])
        return table

    def register(self, text: Text, first: int) -> None:
        """Make full blocks findable from the first new one on; of equal blocks one is enough."""
        for digest, block in zip(text.digests[first:], text.table[first:], strict=False):
            if digest not in self.found:
                self.found[digest], self.digest[block] = block, digest

    def take(self) -> int:
        """The least recently used block, its old contents forgotten."""
        block, _ = self.idle.popitem(last=False)
        if block in self.digest:
            del self.found[self.digest.pop(block)]
        self.references[block] = 1
        return block

    def share(self, block: int) -> None:
        self.idle.pop(block, None)
        self.references[block] += 1

    def release(self, block: int) -> None:
        self.references[block] -= 1
        if self.references[block] == 0:
            self.idle[block] = None
            # What nobody can find is taken before what somebody may want.
            self.idle.move_to_end(block, last=block in self.digest)

    def require(self, wanted: int, idle: int) -> None:
        if wanted > idle:
            total = len(self.references)
            raise OutOfBlocks(f"{wanted} blocks are needed, {idle} of {total} are idle")

    def check(self, text: Text) -> None:
        if text not in self.texts:
            raise ValueError("this text was freed, or belongs to another manager")


def main() -> None:
    manager = BlockManager(blocks=64, page=16)
    system = list(range(100))
    for question in range(8):
        text, known = manager.allocate([*system, 1000 + question])
        print(f"text {question}: {len(text.tokens)} tokens, {known} of them in the cache already")
    forks = [manager.fork(text) for _ in range(4)]
    copies = [manager.append(fork, [7]) for fork in forks]
    used = len(manager.references) - len(manager.idle)
    print(f"4 forks: {sum(map(len, copies))} blocks copied on their first write")
    tokens = sum(len(text.tokens) for text in manager.texts)
    alone = sum(manager.count(len(text.tokens)) for text in manager.texts)
    print(f"{tokens} tokens in {used} blocks; without sharing {alone}")


if __name__ == "__main__":
    main()
