"""Rules, verdicts and the table."""

import json
import math

import pytest
import torch

from implementations.lab.findings import (
    Finding,
    at_least,
    at_most,
    equals,
    failed,
    number,
    over_seeds,
    print_table,
    rows,
    within,
)


@pytest.mark.parametrize(
    "rule, keeps, breaks",
    [
        (at_least(2), [2, 3.5], [1.999, -math.inf]),
        (at_most(2), [2, -1], [2.001, math.inf]),
        (within(1, 2), [1, 1.5, 2], [0.99, 2.01]),
        (equals(49152), [49152], [49151]),
        (equals("yes"), ["yes"], ["no"]),
    ],
)
def test_rules(rule, keeps, breaks):
    assert all(rule.holds(value) for value in keeps)
    assert not any(rule.holds(value) for value in [*breaks, math.nan])


def test_several_runs_are_a_mean_and_a_deviation():
    """2, 4, 9: mean 5, squares 9 + 1 + 16 over two. A single run has no deviation."""
    finding = Finding("accuracy", goal=at_least(4), **over_seeds(torch.tensor([2.0, 4.0, 9.0])))
    assert (finding.measured, finding.spread, finding.seeds) == (5, math.sqrt(13), 3)
    assert over_seeds([0.5]) == {"measured": 0.5}


def test_an_expectation_fails_and_a_goal_does_not():
    findings = [
        Finding("a", 1, expected=at_least(2)),
        Finding("b", 1, goal=at_least(2)),
        Finding("c", 1),
        Finding("d", 2, expected=at_least(2)),
    ]
    assert [finding.holds for finding in findings] == [False, False, None, True]
    assert failed(findings) == findings[:1]


@pytest.mark.parametrize("rule", [at_least(0.93), within(1.9, 2.1), equals("yes"), None])
def test_a_record_gives_the_finding_back(rule):
    finding = Finding("claim", 0.5, "x", expected=rule, spread=0.1, seeds=3, source="paper")
    again = Finding.from_json(json.loads(json.dumps(finding.as_json())))
    assert rows([again]) == rows([finding]) and again.holds == finding.holds


@pytest.mark.parametrize(
    "value, text",
    [
        (134515008, "134,515,008"),
        (0.93251, "0.9325"),
        (3.14e-7, "3.1e-07"),
        (0.0, "0"),
        (2.5e7, "2.5e+07"),
        (True, "yes"),
        (math.nan, "nan"),
        ("cannot", "cannot"),
    ],
)
def test_numbers_as_a_person_writes_them(value, text):
    assert number(value) == text


def test_table_is_aligned_and_says_what_fails(capsys):
    print_table(
        [
            Finding("short", 1.0, "x", goal=at_least(2)),
            Finding("a longer claim", 0.25, expected=within(0, 0.1), spread=0.02, seeds=5),
        ]
    )
    assert capsys.readouterr().out.splitlines() == [
        "finding         measured               expected",
        "short           1 x                    goal: at least 2  missed",
        "a longer claim  0.25 ± 0.02 (5 seeds)  0 to 0.1          FAILS",
    ]
