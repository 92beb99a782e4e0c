"""Benchmarks: what is timed, what is compared, and how cases are read."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from implementations.lab.benchmark import (
    Case,
    Operation,
    as_json,
    as_table,
    main,
    measure,
    ratios,
)


def square(x: Tensor, *, negative: bool = False) -> Tensor:
    return -(x**2) if negative else x**2


def too_large(x: Tensor, **options) -> Tensor:
    raise torch.OutOfMemoryError("no room")


SQUARES = Operation(
    sizes="rows x columns",
    options=("negative",),
    forms=lambda device: {"power": square, "wrong": lambda x, **_: x**2 + 1, "large": too_large},
    inputs=lambda case, dtype, device: [2 * torch.ones(case.sizes, dtype=dtype, device=device)],
    work=lambda case, element: element * case.sizes[0] * case.sizes[1],
    unit="B/s",
    ours="power",
    cases={},
)


def measured(operation: Operation = SQUARES, text: str = "3x5", **options):
    return measure(operation, operation.read(text), "float64", "cpu", rounds=3, **options)


def test_a_case_is_read_and_written():
    case = SQUARES.read("3x5 negative")
    assert case == Case((3, 5), ("negative",))
    assert str(case) == "3x5 negative"
    assert case.keywords() == {"negative": True}


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("3x5x7", "a shape is rows x columns, got '3x5x7'"),
        ("3x5 causal", "the options are .*negative.*, got .*causal"),
        ("3xfive", "a shape is written like"),
        ("0x5", "a shape is written like"),
        ("", "a shape is written like"),
    ],
)
def test_a_bad_case_is_a_sentence(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        SQUARES.read(text)


def test_a_rate_is_work_over_median_time():
    """15 numbers of 8 bytes."""
    result = measured()
    for name in ("power", "wrong"):
        assert result.rates[name] * result.timings.median(name) == pytest.approx(15 * 8)
        assert len(result.timings.seconds[name]) == 3


def test_a_wrong_form_is_apart():
    """4 against 5, with the option -4 against 5; the first form is the measure."""
    assert measured().apart == {"power": 0.0, "wrong": pytest.approx(1 / 4)}
    assert measured(text="3x5 negative").apart["wrong"] == pytest.approx(9 / 4)


def test_what_does_not_fit_is_left_out_and_said():
    result = measured()
    assert result.left_out == ("large",)
    assert "does not fit" in as_table([result], "B/s")
    with pytest.raises(ValueError, match="no form of 3x5 fits"):
        measured(peers=("large",))


def test_the_backward_alone_is_timed():
    """The forward runs once; gradients 2x under one random upstream gradient for all forms."""
    forwards = []

    def counted(x: Tensor) -> Tensor:
        forwards.append(1)
        return x**2

    forms = {"power": counted, "product": lambda x: x * x, "wrong": lambda x: 3 * x}
    result = measured(replace(SQUARES, backward=True, forms=lambda device: forms))
    assert len(forwards) == 1
    assert result.apart == {"power": 0.0, "product": 0.0, "wrong": pytest.approx(1 / 4)}


def test_peers_are_chosen_by_name():
    assert list(measured(peers=("wrong",)).rates) == ["wrong"]
    with pytest.raises(ValueError, match="the forms here are power, wrong, large, got fast"):
        measured(peers=("fast",))
    with pytest.raises(ValueError, match="got 'float31'"):
        measure(SQUARES, SQUARES.read("3x5"), "float31", "cpu")


def test_ratios_are_taken_where_both_ran():
    both, alone = measured(), measured(peers=("power",))
    assert ratios([both, alone], "power", "wrong") == [both.timings.ratio("power", "wrong")]
    assert ratios([both, alone], "power", "large") == []


def test_json_has_every_round():
    result = measured()
    (entry,) = json.loads(json.dumps(as_json([result])))
    assert (entry["shape"], entry["dtype"], entry["left_out"]) == ("3x5", "float64", ["large"])
    assert entry["seconds"]["power"] == result.timings.seconds["power"]


def test_main_compares_two_forms(capsys):
    main()
    assert "times as fast" in capsys.readouterr().out
