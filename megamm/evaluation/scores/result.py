"""Scores of one run, and of several: as data and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Numbers = dict[str, "float | None"]
Groups = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Scores:
    """What a metric says of a file of predictions.

    Attributes:
        metric: its name.
        numbers: the headline; in percent, but for the sums of MME. None: could not be computed.
        counts: of questions ("n"), of those without a prediction ("unanswered"), ...
        groups: numbers of parts of the questions: kind of part -> part -> name -> value ("n" is a count).
        notes: sentences for the reader.
    """

    metric: str
    numbers: Numbers
    counts: dict[str, int]
    groups: Groups = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """What `megamm score --json` prints."""
        return {"metric": self.metric, **self.numbers, **self.counts, **self.groups, "notes": [*self.notes]}


def percent(flags: Iterable[float]) -> float:
    """The mean of numbers between 0 and 1, times 100; 0 of none."""
    values = list(flags)
    return 100.0 * sum(values) / len(values) if values else 0.0


def accuracy_by(pairs: Iterable[tuple[str | None, float]]) -> dict[str, dict[str, float]]:
    """Accuracy (percent) and number of each group, in the order of their names; None belongs to no group."""
    found: dict[str, list[float]] = {}
    for name, value in pairs:
        if name is not None:
            found.setdefault(name, []).append(value)
    return {name: {"accuracy": percent(found[name]), "n": len(found[name])} for name in sorted(found)}


@dataclass(frozen=True)
class Runs:
    """Scores of several runs over the same references."""

    runs: Sequence[Scores]
    names: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        """Means under the names that one run has, standard deviations (n - 1) below "std", each run below
        "runs". A number that one of the runs lacks is None."""
        first = self.runs[0]
        trees = [{**run.numbers, **run.groups} for run in self.runs]
        means, deviations = _over(trees, statistics.fmean), _over(trees, statistics.stdev)
        counts = {name: self._count(name) for name in first.counts}
        named = [
            {"predictions": name, **run.as_dict()} for name, run in zip(self.names, self.runs, strict=True)
        ]
        return {
            "metric": first.metric,
            **means,
            **counts,
            "num_runs": len(self.runs),
            "std": deviations,
            "runs": named,
        }

    def _count(self, name: str) -> int | list[int]:
        """A count, or those of the runs where they differ."""
        values = [run.counts[name] for run in self.runs]
        return values[0] if len(set(values)) == 1 else values

    def as_text(self) -> str:
        """A line for each number: mean, deviation, and the runs."""
        merged = self.as_dict()
        names = [f"run {number}" for number in range(1, len(self.runs) + 1)]
        lines = [f"{name}: {path}" for name, path in zip(names, self.names, strict=True)]
        cells = [["", "mean", "std", *names]]
        for name in self.runs[0].numbers:
            values = [merged[name], merged["std"][name], *(run.numbers[name] for run in self.runs)]
            cells.append([name, *map(_shown, values)])
        notes = dict.fromkeys(note for run in self.runs for note in run.notes)
        return "\n".join([*lines, *_aligned(cells), *(f"note: {note}" for note in notes)])


def _over(trees: Sequence[Mapping[str, Any]], of: Any) -> dict[str, Any]:
    """`of` the values that trees of numbers have in the same place; counts stay what they are in the
    first."""
    found: dict[str, Any] = {}
    for key, value in trees[0].items():
        others = [tree.get(key) for tree in trees]
        if isinstance(value, Mapping):
            found[key] = _over([other or {} for other in others], of)
        elif key == "n":
            found[key] = value
        else:
            found[key] = None if None in others else of(others)
    return found


def as_text(scores: Scores) -> str:
    """A short table: the headline, then parts of the questions, then what has to be known about them."""
    counts = ", ".join(f"{value} {name}" for name, value in scores.counts.items() if value and name != "n")
    lines = [f"{scores.metric}: {scores.counts['n']} questions{f' ({counts})' if counts else ''}"]
    lines += _aligned([[name, _shown(value)] for name, value in scores.numbers.items()])
    for kind, parts in scores.groups.items():
        columns = list(dict.fromkeys(name for part in parts.values() for name in part))
        cells = [[kind, *columns]]
        cells += [[name, *(_shown(part.get(column)) for column in columns)] for name, part in parts.items()]
        lines += ["", *_aligned(cells)]
    if scores.notes:
        lines += ["", *(f"note: {note}" for note in scores.notes)]
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in cells
    ]
