"""Which sample of which source comes when, and which sources share a step.

Sources of one sequence length (and, with data.pure_batches, of one kind of samples) form a group. A step
takes the next samples of one group: of the one that is furthest behind its share of the samples. So the
position of a run is one number per group, how many samples of it were used, and everything else follows:

    position -> group -> its samples start ... end - 1 -> source of each (apportion.py) -> row (order.py)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Any, Literal

import numpy as np

from megamm.config import DataConfig, NamedSource, Recipe
from megamm.data.apportion import Apportionment
from megamm.data.concatenated import ConcatenatedDataset
from megamm.data.order import hashed, samples_at, substitute_at
from megamm.data.row_kinds import RowsOfKind, split_by_kind

Kind = Literal["any", "images", "text"]
Position = tuple[int, ...]  # samples used of each group


@dataclass(frozen=True)
class Part:
    """The samples of one source that belong to one group.

    Attributes:
        source: its name. kind: which of its samples these are.
        key: of their order.
        rows: of the concatenated datasets.
        share: of all samples, in no unit: shares are compared with each other.
    """

    source: str
    kind: Kind
    key: str
    rows: range | RowsOfKind
    share: Fraction

    def samples(self, seed: int, start: int, count: int) -> np.ndarray:
        """[count] int64 rows of the samples start ... start + count - 1 of this part."""
        return self._rows(samples_at(seed, self.key, start, count, len(self.rows)))

    def substitute(self, seed: int, index: int, draw: int) -> int:
        """The row that stands in for sample `index` of the group, in its `draw`-th (from 1) replacement."""
        number = substitute_at(seed, self.key, index, draw, len(self.rows))
        return int(self._rows(np.array([number]))[0])

    def _rows(self, numbers: np.ndarray) -> np.ndarray:
        return self.rows.start + numbers if isinstance(self.rows, range) else self.rows.at(numbers)


@dataclass(frozen=True)
class Group:
    """Samples that may share a step.

    Attributes:
        key: of what is drawn for its samples beside their order.
        sequence_length: S of its rows.
    """

    key: str
    sequence_length: int
    parts: list[Part]
    apportionment: Apportionment
    seed: int

    @property
    def share(self) -> Fraction:
        """Of all samples, in the unit of its parts."""
        return sum((part.share for part in self.parts), Fraction(0))

    def samples(self, start: int, count: int) -> np.ndarray:
        """[count] int64 rows of the samples start ... start + count - 1 of the group."""
        sources, before = self.apportionment.at(start, count)
        rows = np.empty(count, np.int64)
        for number, part in enumerate(self.parts):
            mine = sources == number
            rows[mine] = part.samples(self.seed, before[number], int(mine.sum()))
        return rows

    def substitutes(self, index: int, draws: Sequence[int]) -> np.ndarray:
        """[n] int64 rows that stand in for sample `index`, in its `draws`-th (from 1) replacements."""
        return np.array([self._substitute(index, draw) for draw in draws], np.int64)

    def _substitute(self, index: int, draw: int) -> int:
        number = 0
        if len(self.parts) > 1:
            drawn = hashed(self.seed, self.key, "substitute source", index, draw)
            drawn = drawn * self.apportionment.cycle >> 64  # a cycle may be longer than 64 bits count
            number = bisect_right(list(accumulate(self.apportionment.counts)), drawn)
        return self.parts[number].substitute(self.seed, index, draw)


class Blend:
    """The order of the samples of a recipe.

    Attributes:
        groups: in the order in which the recipe names their sources.
    """

    def __init__(self, dataset: ConcatenatedDataset, recipe: Recipe) -> None:
        """
        Args:
            dataset: opened from recipe.data.
        """
        self._dataset = dataset
        self._rates = _rates(recipe.data.sources())
        # of a step, about: so that the rarest group does not begin the run, nor come a whole step early
        self._half = Fraction(recipe.training.global_batch_size, 2)
        found = list(_stretches(dataset, recipe.data))
        members: dict[tuple[int, Kind], list[Part]] = {}
        for source, kind, rows, share in found:
            # one part alone has the order of its stage, whatever it is called
            key = recipe.stage if len(found) == 1 else f"{recipe.stage}/{source.name}/{kind}"
            group = members.setdefault((source.sequence_length, kind), [])
            group.append(Part(source.name, kind, key, rows, share))
        self.groups = [
            Group(
                recipe.stage if len(members) == 1 else f"{recipe.stage}/{number}",
                length,
                parts,
                Apportionment([part.share for part in parts]),
                recipe.seed,
            )
            for number, ((length, _kind), parts) in enumerate(members.items())
        ]

    def next_group(self, position: Position) -> int:
        """The group that would be furthest behind its share in the middle of its next step, the first of
        several (Webster's method of apportionment)."""
        numbers = zip(position, self.groups, strict=True)
        behind = [(used + self._half) / group.share for used, group in numbers]
        return behind.index(min(behind))

    def contents(self) -> list[dict[str, Any]]:
        """What the groups consist of, for checkpoints and other ranks; JSON."""
        fingerprints = dict(zip(self._rates, self._dataset.fingerprints(), strict=True))
        return [
            {
                "group": number,
                "source": part.source,
                "kind": part.kind,
                "samples": len(part.rows),
                "rate": self._rates[part.source],
                "fingerprint": fingerprints[part.source],
            }
            for number, group in enumerate(self.groups)
            for part in group.parts
        ]


def _stretches(
    dataset: ConcatenatedDataset, data: DataConfig
) -> Iterator[tuple[NamedSource, Kind, range | RowsOfKind, Fraction]]:
    """(source, kind, rows, share) of all parts, in the order of the sources. The share of a source is that of
    its rows, each counted alike."""
    firsts = dataset.first_rows.tolist()
    for source, part, first in zip(data.sources(), dataset.parts, firsts[:-1], strict=True):
        rows = range(first, first + len(part))
        kinds: dict[Any, range | RowsOfKind] = {"any": rows}
        if data.pure_batches:
            kinds = dict(split_by_kind(part, first))
        per_row = source.rate / len(rows) if source.by_weight else source.rate
        for kind, some in kinds.items():
            yield source, kind, some, per_row * len(some)


def _rates(sources: Sequence[NamedSource]) -> dict[str, str]:
    """Of each source, its part of all weights or epochs; 1/3 and 2/3 are the same blend as 2 and 4."""
    total = sum((source.rate for source in sources), Fraction(0))
    unit = "of all weights" if sources[0].by_weight else "of all epochs"
    return {source.name: f"{source.rate / total} {unit}" for source in sources}
