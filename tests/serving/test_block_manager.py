"""The block manager against a dense copy of every text, by hand and in random order."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from implementations.serving.block_manager import BlockManager, OutOfBlocks, Text

PAGE, BLOCKS = 3, 24
# Two letters: equal blocks after different starts, and equal starts, are both frequent.
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=11)


class Store:
    """Memory behind the tables. What stands for a key is the text up to it, on which it depends."""

    def __init__(self, blocks: int, page: int):
        self.page, self.memory = page, [[None] * page for _ in range(blocks)]

    def write(self, text: Text, start: int) -> None:
        for i in range(start, len(text.tokens)):
            row = self.memory[text.table[i // self.page]]
            row[i % self.page] = tuple(text.tokens[: i + 1])

    def copy(self, copies) -> None:
        for source, target in copies:
            self.memory[target] = list(self.memory[source])

    def read(self, text: Text) -> list:
        return [
            self.memory[text.table[i // self.page]][i % self.page] for i in range(len(text.tokens))
        ]


class Manager(RuleBasedStateMachine):
    """Any order of operations, with too little memory for all of them."""

    def __init__(self):
        super().__init__()
        self.manager, self.store = BlockManager(BLOCKS, PAGE), Store(BLOCKS, PAGE)
        self.dense: dict[Text, list[int]] = {}
        self.evictions = 0

    def state(self):
        manager = self.manager
        texts = {text: (list(text.tokens), list(text.table)) for text in manager.texts}
        found = dict(manager.found), dict(manager.digest)
        return list(manager.references), list(manager.idle), found, texts

    def pick(self, data) -> Text:
        return data.draw(st.sampled_from(list(self.dense)))

    def attempt(self, operation):
        """The operation, or nothing at all: what is refused has changed nothing."""
        before = self.state()
        try:
            return operation()
        except OutOfBlocks:
            assert self.state() == before
            return None

    @rule(tokens=TOKENS)
    def allocate(self, tokens):
        answer = self.attempt(lambda: self.manager.allocate(tokens))
        if answer is not None:
            text, known = answer
            assert known < len(tokens) and known % PAGE == 0
            self.dense[text] = tokens
            self.store.write(text, known)

    @precondition(lambda self: self.dense)
    @rule(data=st.data(), tokens=TOKENS)
    def append(self, data, tokens):
        text = self.pick(data)
        copies = self.attempt(lambda: self.manager.append(text, tokens))
        if copies is not None:
            self.store.copy(copies)
            start = len(self.dense[text])
            self.dense[text] = self.dense[text] + tokens
            self.store.write(text, start)

    @precondition(lambda self: self.dense)
    @rule(data=st.data())
    def fork(self, data):
        text = self.pick(data)
        self.dense[self.manager.fork(text)] = self.dense[text]

    @precondition(lambda self: self.dense)
    @rule(data=st.data())
    def free(self, data):
        text = self.pick(data)
        self.manager.free(text)
        del self.dense[text]

    @precondition(lambda self: self.manager.idle)
    @rule(data=st.data())
    def evict(self, data):
        """A text like no other takes some idle blocks and leaves: the longest idle are lost."""
        idle, found = list(self.manager.idle), dict(self.manager.found)
        count = data.draw(st.integers(1, len(idle)))
        self.evictions += 1
        text, known = self.manager.allocate([1 + self.evictions] * count * PAGE)
        assert known == 0 and text.table == idle[:count]
        self.store.write(text, 0)
        self.manager.free(text)
        for digest, block in found.items():
            assert (digest in self.manager.found) == (block not in text.table)

    @invariant()
    def every_text_reads_as_its_dense_copy(self):
        assert self.manager.texts == set(self.dense)
        for text, tokens in self.dense.items():
            expected = [tuple(tokens[: i + 1]) for i in range(len(tokens))]
            assert text.tokens == tokens and self.store.read(text) == expected

    @invariant()
    def references_are_exact_and_no_block_is_lost(self):
        uses = Counter(block for text in self.dense for block in text.table)
        assert self.manager.references == [uses[block] for block in range(BLOCKS)]
        assert set(self.manager.idle) == set(range(BLOCKS)) - set(uses)
        assert all(len(t.table) == -(-len(t.tokens) // PAGE) for t in self.dense)

    @invariant()
    def what_can_be_found_is_there(self):
        assert {block: digest for digest, block in self.manager.found.items()} == (
            self.manager.digest
        )


# 40 runs of 50 steps: 2,000 operations, each followed by the three invariants.
TestManager = Manager.TestCase
TestManager.settings = settings(
    max_examples=40, stateful_step_count=50, deadline=None, derandomize=True
)


# By hand


def test_a_prefix_is_found_in_use_and_after_it_is_freed():
    manager = BlockManager(8, 4)
    first, known = manager.allocate(range(10))
    assert (first.table, known) == ([0, 1, 2], 0)
    second, known = manager.allocate([*range(8), 70, 71])
    assert (second.table, known) == ([0, 1, 3], 8)
    assert manager.references == [2, 2, 1, 1, 0, 0, 0, 0]
    third, known = manager.allocate([*range(4), 60, 5, 6, 7])
    assert (third.table, known) == ([0, 4], 4)
    for text in (first, second, third):
        manager.free(text)
    assert manager.references == [0] * 8
    again, known = manager.allocate(range(9))
    assert (again.table[:2], known) == ([0, 1], 8)


def test_the_last_token_is_always_read():
    """Two full blocks, both cached: the second is read again, for the logits after it."""
    manager = BlockManager(8, 4)
    manager.allocate(range(8))
    text, known = manager.allocate(range(8))
    assert known == 4 and text.table == [0, 2]


def test_equal_blocks_after_different_starts_are_different():
    manager = BlockManager(12, 2)
    manager.allocate([1, 2, 5, 6, 0])
    manager.allocate([3, 4, 7, 8, 0])
    text, known = manager.allocate([3, 4, 5, 6, 0])
    assert known == 2 and text.table == [3, 6, 7]


def test_digits_do_not_run_together():
    """Tokens 1, 23 and 12, 3 are not the same block."""
    manager = BlockManager(8, 2)
    manager.allocate([1, 23, 0])
    assert manager.allocate([12, 3, 0])[1] == 0


def test_a_block_filled_by_append_can_be_found():
    manager = BlockManager(8, 2)
    text, _ = manager.allocate([1])
    assert manager.append(text, [2, 3]) == []
    assert manager.allocate([1, 2, 9])[1] == 2


def test_a_block_can_be_found_from_its_last_token_on():
    """Filled token by token, before the next block begins."""
    manager = BlockManager(8, 4)
    text, _ = manager.allocate([1])
    for token in (2, 3, 4):
        assert manager.append(text, [token]) == []
    assert manager.allocate([1, 2, 3, 4, 9])[1] == 4


def test_a_fork_copies_its_last_block_on_the_first_write():
    manager = BlockManager(8, 4)
    text, _ = manager.allocate(range(6))
    fork = manager.fork(text)
    assert fork.table == [0, 1] and manager.references[:2] == [2, 2]
    assert manager.append(fork, [9]) == [(1, 2)]
    assert (fork.table, text.table) == ([0, 2], [0, 1])
    assert manager.append(fork, [9]) == manager.append(text, [8]) == []  # each has its own now
    assert manager.references == [2, 1, 1, 0, 0, 0, 0, 0]


def test_a_full_last_block_is_not_copied():
    manager = BlockManager(8, 4)
    text, _ = manager.allocate(range(4))
    fork = manager.fork(text)
    assert manager.append(fork, [9]) == [] and fork.table == [0, 1] and text.table == [0]


def test_the_longest_idle_goes_first_and_of_a_text_its_end():
    manager = BlockManager(4, 2)
    first, _ = manager.allocate([1, 1, 2, 2])
    second, _ = manager.allocate([3, 3, 4, 4])
    manager.free(second)
    manager.free(first)
    manager.allocate([9])  # takes the end of the second text
    assert (
        manager.allocate([3, 3, 0])[1] == 2
    )  # its start is there; this takes the end of the first
    text, known = manager.allocate([1, 1])
    assert known == 0 and text.table == [0]  # the last token is read, into the last idle block
    with pytest.raises(OutOfBlocks, match="1 blocks are needed, 0 of 4 are idle"):
        manager.allocate([1])


def test_an_evicted_block_cannot_be_found():
    manager = BlockManager(2, 2)
    manager.free(manager.allocate([1, 1])[0])
    manager.free(manager.allocate([5, 5, 6])[0])  # takes both blocks
    assert manager.allocate([1, 1, 0])[1] == 0


def test_blocks_that_nobody_can_find_are_taken_first():
    manager = BlockManager(2, 2)
    kept, _ = manager.allocate([1, 1])
    manager.free(kept)
    blank, _ = manager.allocate([5])
    manager.free(blank)
    assert manager.allocate([6])[0].table == blank.table
    assert manager.allocate([7])[0].table == kept.table


def test_a_prefix_that_is_found_does_not_count_as_room():
    """Three blocks wanted, one of them found idle: the other two need two more."""
    manager = BlockManager(3, 2)
    text, _ = manager.allocate([1, 1])
    manager.free(text)
    manager.allocate([9])
    with pytest.raises(OutOfBlocks, match="2 blocks are needed, 1 of 3 are idle"):
        manager.allocate([1, 1, 2, 2, 3])
    assert manager.allocate([1, 1, 2])[1] == 2


def test_mistakes_are_sentences():
    for sizes in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="needs blocks and tokens"):
            BlockManager(*sizes)
    manager = BlockManager(4, 2)
    with pytest.raises(ValueError, match="at least one token"):
        manager.allocate([])
    text, _ = manager.allocate([1])
    manager.free(text)
    for operation in (manager.free, manager.fork, lambda text: manager.append(text, [1])):
        with pytest.raises(ValueError, match="was freed"):
            operation(text)
    assert manager.references == [0] * 4 and len(manager.idle) == 4
