"""The scheduler by hand: who reads what, who waits, and who has to stop."""

import pytest

from implementations.serving.block_manager import BlockManager
from implementations.serving.scheduler import Request, Scheduler


def start(blocks: int, page: int, *sizes: tuple[int, int], **limits) -> tuple[Scheduler, list]:
    """A scheduler, and requests of a prompt and a longest length, each of its own token."""
    scheduler = Scheduler(BlockManager(blocks, page), **limits)
    requests = [Request([i] * prompt, longest) for i, (prompt, longest) in enumerate(sizes)]
    for request in requests:
        scheduler.add(request)
    return scheduler, requests


def step(scheduler: Scheduler) -> list[tuple[int, int, int]]:
    """What is read, and one more token for every text that is read to its end."""
    plan = scheduler.plan()
    for request, *_ in plan.chunks:
        if not request.unread:
            request.tokens.append(request.number)
    return [(request.number, first, last) for request, first, last in plan.chunks]


def test_running_texts_go_first_and_a_long_prompt_is_cut():
    """Budget 8: the long prompt takes what the others leave, and nobody overtakes it."""
    scheduler, _ = start(20, 4, (3, 9), (14, 20), (4, 8), batch=4, budget=8)
    assert step(scheduler) == [(0, 0, 3), (1, 0, 5)]
    assert step(scheduler) == [(0, 3, 4), (1, 5, 12)]
    assert step(scheduler) == [(0, 4, 5), (1, 12, 14), (2, 0, 4)]
    assert step(scheduler) == [(0, 5, 6), (1, 14, 15), (2, 4, 5)]


def test_a_chunk_leaves_room_for_the_next_prompt():
    scheduler, _ = start(20, 4, (14, 20), (4, 8), batch=4, budget=8, chunk=5)
    assert step(scheduler) == [(0, 0, 5), (1, 0, 3)]


def test_at_most_batch_run_and_places_are_filled_in_order():
    scheduler, requests = start(20, 4, *[(2, 6)] * 4, batch=2, budget=8)
    assert [number for number, *_ in step(scheduler)] == [0, 1]
    scheduler.release(requests[0])
    assert [number for number, *_ in step(scheduler)] == [1, 2]


def test_the_youngest_stops_and_comes_back_in_its_turn():
    """Four blocks of two: at five tokens the older needs a third block, and takes the younger's."""
    scheduler, (old, young) = start(4, 2, (2, 8), (2, 8), batch=4, budget=8)
    late = Request([9], 8)
    assert step(scheduler) == [(0, 0, 2), (1, 0, 2)]
    assert step(scheduler) == [(0, 2, 3), (1, 2, 3)]
    scheduler.add(late)
    assert step(scheduler) == [(0, 3, 4), (1, 3, 4)]
    assert step(scheduler) == [(0, 4, 5)]
    assert scheduler.preemptions == 1 and scheduler.waiting == [young, late]
    assert young.tokens == [1] * 5 and young.read == 0
    scheduler.release(old)
    # One of its two blocks was not taken by anybody: its start is found and not read again.
    assert step(scheduler) == [(1, 2, 5)]


def test_what_does_not_fit_at_the_front_holds_everybody_back():
    scheduler, requests = start(4, 2, (2, 4), (6, 8), (1, 2), batch=4, budget=16)
    assert step(scheduler) == [(0, 0, 2)]
    assert step(scheduler) == [(0, 2, 3)] and scheduler.waiting == requests[1:]


def test_a_fork_needs_a_place_to_share_blocks():
    scheduler, (request,) = start(8, 2, (3, 8), batch=2, budget=8)
    step(scheduler)
    first, second = (Request(list(request.tokens), 8) for _ in range(2))
    scheduler.fork(request, first)
    scheduler.fork(request, second)
    assert first.text.table == request.text.table and second.text is None
    plan = scheduler.plan()
    assert [chunk[1:] for chunk in plan.chunks] == [(3, 4), (3, 4)] and len(plan.copies) == 1
    assert first.text.table[0] == request.text.table[0]
    assert first.text.table[1] != request.text.table[1]


def test_limits_that_make_no_sense_are_refused():
    manager = BlockManager(4, 2)
    for limits in ({"batch": 0, "budget": 4}, {"batch": 1, "budget": 4, "chunk": 0}):
        with pytest.raises(ValueError, match="limits are 1 or more"):
            Scheduler(manager, **limits)
    with pytest.raises(ValueError, match="budget of as many tokens"):
        Scheduler(manager, batch=5, budget=4)
    with pytest.raises(ValueError, match="9 tokens need 5 blocks of 2, there are 4"):
        Scheduler(manager, batch=1, budget=4).add(Request([1], 9))
