"""Order, counting and arithmetic of the stopwatch. No test asserts how long anything took."""

import ast
import re
from pathlib import Path

import pytest
import torch

from implementations.lab.timing import Timings, over_rounds, time_interleaved

WEEKS = Path(__file__).parents[2] / "weeks"


def recorder(log):
    """Two functions that note their names."""
    return {name: lambda *_, name=name: log.append(name) for name in ("ours", "peer")}


def test_rounds_alternate_in_order_so_that_a_drift_favours_nobody():
    log = []
    time_interleaved(recorder(log), torch.ones(1), rounds=4, warmup=0)
    assert log == ["ours", "peer", "peer", "ours", "ours", "peer", "peer", "ours"]


def test_warm_up_calls_come_first_and_are_not_counted():
    log = []
    timings = time_interleaved(recorder(log), torch.ones(1), rounds=2, warmup=3)
    assert log == ["ours", "peer"] * 3 + ["ours", "peer", "peer", "ours"]
    assert {name: len(seconds) for name, seconds in timings.seconds.items()} == {
        "ours": 2,
        "peer": 2,
    }


def test_each_call_is_timed_under_its_own_name(monkeypatch):
    """A clock that each function moves by a known step: 1 s and 3 s."""
    now = 0.0

    def taking(seconds):
        def function(*_):
            nonlocal now
            now += seconds

        return function

    monkeypatch.setattr("time.perf_counter", lambda: now)
    timings = time_interleaved({"ours": taking(1.0), "peer": taking(3.0)}, rounds=3)
    assert timings.seconds == {"ours": [1.0, 1.0, 1.0], "peer": [3.0, 3.0, 3.0]}
    assert timings.ratio("ours", "peer") == 3.0


def test_every_function_receives_the_inputs():
    x, y, received = torch.ones(2), torch.ones(3), []
    time_interleaved({"ours": lambda *inputs: received.append(inputs)}, x, y, rounds=2, warmup=1)
    assert len(received) == 3
    assert all(a is x and b is y for a, b in received)


HAND_MADE = Timings({"ours": [1.0, 1.0, 2.0, 4.0, 1.0], "peer": [2.0, 6.0, 2.0, 12.0, 5.0]})


def test_median_ratio_and_spread_of_a_hand_worked_example():
    """Ratios 2, 6, 1, 3, 5: their median is 3 and their quartiles are 2 and 5. The ratio of the
    medians would be 5, and their mean is 3.4."""
    assert HAND_MADE.median("ours") == 1.0
    assert HAND_MADE.median("peer") == 5.0
    assert HAND_MADE.ratios("ours", "peer") == [2.0, 6.0, 1.0, 3.0, 5.0]
    assert HAND_MADE.ratio("ours", "peer") == 3.0
    assert HAND_MADE.spread("ours", "peer") == 1.5


def test_spread_of_two_rounds_stays_inside_them():
    """Ratios 1 and 3: quartiles 1.5 and 2.5."""
    timings = Timings({"ours": [1.0, 1.0], "peer": [1.0, 3.0]})
    assert timings.spread("ours", "peer") == 0.5


def test_a_measurement_over_rounds_by_hand():
    """The ratios of above; half their range would be 2.5. Of one ratio there is no spread."""
    found = over_rounds(HAND_MADE.ratios("ours", "peer"))
    assert found == {"measured": 3.0, "spread": 1.5, "seeds": 5, "repeated": "rounds"}
    assert over_rounds([1.0, 3.0], "questions")["repeated"] == "questions"
    assert over_rounds([4.0]) == {"measured": 4.0}


def spreads(tree):
    """What a script writes after `spread=` or "spread":"""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "spread":
            yield node.value
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "spread":
                    yield value


def other_spreads(script):
    """Spreads that are half a range or a standard error."""
    for value in spreads(ast.parse(script)):
        text = ast.unparse(value)
        if re.search(r"\b(min|max|amin|amax|sqrt)\b|\*\* 0\.5|\*\* -0\.5", text):
            yield text


def test_a_spread_means_one_thing_in_every_script():
    """One deviation or half of what lies between the quartiles; over_rounds and over_seeds know."""
    scripts = {path: path.read_text("utf-8") for path in WEEKS.glob("*/*.py")}
    assert sum(1 for text in scripts.values() for _ in spreads(ast.parse(text))) > 20
    assert not {path.name: list(other_spreads(text)) for path, text in scripts.items()
                if list(other_spreads(text))}  # fmt: skip
    assert list(other_spreads("f(spread=(max(x) - min(x)) / 2)"))
    assert list(other_spreads("{'spread': x.std() / len(x) ** 0.5}"))
    assert not list(other_spreads("f(spread=x.std().item())"))


def test_a_slow_round_for_both_does_not_move_the_ratio():
    """The machine halves its speed in the third round; pair by pair it cancels."""
    steady = Timings({"ours": [1.0] * 5, "peer": [2.0] * 5})
    disturbed = Timings({"ours": [1.0, 1.0, 9.0, 9.0, 9.0], "peer": [2.0, 2.0, 18.0, 18.0, 18.0]})
    assert disturbed.ratio("ours", "peer") == steady.ratio("ours", "peer") == 2.0
    assert disturbed.spread("ours", "peer") == 0.0


def test_inputs_of_zeros_are_refused_and_named():
    with pytest.raises(ValueError, match="input 1 is all zeros"):
        time_interleaved({"ours": torch.add}, torch.ones(3), torch.zeros(3))


def test_empty_inputs_and_single_zeros_are_not_refused():
    time_interleaved({"ours": torch.neg}, torch.empty(0), rounds=2)
    time_interleaved({"ours": torch.neg}, torch.tensor([0.0, 1.0]), rounds=2)


@pytest.mark.parametrize("rounds", [1, 0, -1])
def test_fewer_than_two_rounds_are_refused(rounds):
    with pytest.raises(ValueError, match=f"at least two rounds, got {rounds}"):
        time_interleaved({"ours": torch.neg}, torch.ones(3), rounds=rounds)
