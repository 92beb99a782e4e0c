"""What a weekly script found: a claim, its measurement, and what was expected of it.

    expected   what theory or a paper says: if the measurement breaks it, the script exits with 1
    goal       what we hope for, a speed ratio say: shown beside the measurement, never failing
    neither    reported

Run     uv run python implementations/lab/findings.py
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Value = float | int | str | bool


@dataclass(frozen=True)
class Expectation:
    """A rule and its bounds; made by the four functions below."""

    rule: str
    bound: Any

    def holds(self, measured: Value) -> bool:
        """Whether the measurement keeps the rule; NaN keeps none."""
        if isinstance(measured, float) and math.isnan(measured):
            return False
        if self.rule == "at_least":
            return measured >= self.bound
        if self.rule == "at_most":
            return measured <= self.bound
        if self.rule == "within":
            return self.bound[0] <= measured <= self.bound[1]
        return measured == self.bound

    def __str__(self) -> str:
        if self.rule == "within":
            return f"{number(self.bound[0])} to {number(self.bound[1])}"
        return f"{self.rule.replace('_', ' ')} {number(self.bound)}".removeprefix("equals ")


def at_least(bound: float) -> Expectation:
    return Expectation("at_least", bound)


def at_most(bound: float) -> Expectation:
    return Expectation("at_most", bound)


def within(low: float, high: float) -> Expectation:
    return Expectation("within", (low, high))


def equals(value: Value) -> Expectation:
    return Expectation("equals", value)


@dataclass(frozen=True)
class Finding:
    """One claim and what was measured.

    Args:
        claim: a sentence that the measured value completes.
        measured: the value, in `unit`.
        expected: what theory or a paper demands.
        goal: what we hope for.
        spread: one standard deviation, or half the interquartile range of a ratio, over `seeds`
            repeats.
        repeated: what was repeated, where it was not the seed.
        source: where the expectation comes from.
    """

    claim: str
    measured: Value
    unit: str = ""
    expected: Expectation | None = None
    goal: Expectation | None = None
    spread: float | None = None
    seeds: int | None = None
    repeated: str = "seeds"
    source: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the expectation, or else the goal, is met; None where there is neither."""
        rule = self.expected or self.goal
        return None if rule is None else rule.holds(self.measured)

    def as_json(self) -> dict[str, Any]:
        """The record of this finding, as in results/*.json."""
        rules = {
            name: {rule.rule: rule.bound} if rule else None
            for name, rule in (("expected", self.expected), ("goal", self.goal))
        }
        return {**self.__dict__, **rules, "holds": self.holds}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Finding":
        """The finding that `as_json` recorded."""
        rules = {
            name: Expectation(*next(iter(record[name].items()))) if record[name] else None
            for name in ("expected", "goal")
        }
        return cls(**{key: value for key, value in record.items() if key != "holds"} | rules)


def over_seeds(runs: Iterable[Any]) -> dict[str, Any]:
    """A Finding's measurement of one quantity in several runs: mean, deviation, and how many.

    Of one run there is no deviation, and nothing was repeated.
    """
    values = [float(value) for value in runs]
    several = {"spread": statistics.stdev(values), "seeds": len(values)} if values[1:] else {}
    return {"measured": statistics.fmean(values), **several}


def number(value: Any) -> str:
    """A value as a person would write it: 134,515,008; 0.932; 3.1e-07."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        small = value != 0 and not 1e-3 <= abs(value) < 1e6
        return f"{value:.1e}" if small else f"{value:,.4g}"
    return str(value)


def rows(findings: Sequence[Finding]) -> list[tuple[str, str, str, str]]:
    """Claim, measurement, demand and verdict of each finding, as text."""
    table = []
    for finding in findings:
        spread = "" if finding.spread is None else f" ± {number(finding.spread)}"
        repeats = f" ({finding.seeds} {finding.repeated})" if (finding.seeds or 0) > 1 else ""
        measured = f"{number(finding.measured)}{spread} {finding.unit}".strip() + repeats
        demand = str(finding.expected) if finding.expected else ""
        demand = f"goal: {finding.goal}" if finding.goal and not demand else demand
        verdict = {None: "", True: "holds", False: "missed"}[finding.holds]
        verdict = "FAILS" if finding.expected and not finding.holds else verdict
        table.append((finding.claim, measured, demand, verdict))
    return table


def print_table(findings: Sequence[Finding]) -> None:
    """An aligned table on the terminal."""
    table = [("finding", "measured", "expected", ""), *rows(findings)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def failed(findings: Sequence[Finding]) -> list[Finding]:
    """The findings whose expectation does not hold."""
    return [finding for finding in findings if finding.expected and not finding.holds]


def main() -> None:
    print_table(
        [
            Finding(
                "a fair coin lands heads", 0.503, expected=within(0.49, 0.51), source="symmetry"
            ),
            Finding("our coin is tossed faster than theirs by", 0.97, "x", goal=at_least(1.0)),
            Finding("coins tossed", 10_000),
        ]
    )


if __name__ == "__main__":
    main()
