"""metrics.jsonl and validation.jsonl: a row of JSON for each optimizer step, and for each validation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def row_line(row: Mapping[str, Any]) -> str:
    """A row as its line of the file. JSON has no NaN and no infinity: they become null."""
    return json.dumps({name: _finite(value) for name, value in row.items()}) + "\n"


def read_metrics(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, none where there is no file. What a kill or a full disk has left of a line is
    passed over."""
    if not Path(path).exists():
        return
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):  # cut off by a kill, or being written
                return
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row


def drop_rows_after(path: Path, step: int) -> None:
    """Rewrite a file without the rows of steps after `step` (all of it or nothing of it)."""
    if not path.exists():
        return
    new = path.with_name(path.name + ".new")
    with open(new, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] <= step)
    os.replace(new, path)


class SmoothedLoss:
    """An exponential moving average in which a loss counts half after `half_life` steps.

    The average is divided by the sum of its weights (Kingma and Ba 2015, section 3), so that it does not
    start at 0. Losses that are no numbers are left out.
    """

    def __init__(self, half_life: float) -> None:
        self._keep = 0.5 ** (1 / half_life)
        self._sum = self._weight = 0.0

    def add(self, loss: float | None) -> float | None:
        """The average with the loss of another step; None as long as there was none."""
        if loss is not None and math.isfinite(loss):
            self._sum = self._keep * self._sum + (1 - self._keep) * loss
            self._weight = self._keep * self._weight + (1 - self._keep)
        return self._sum / self._weight if self._weight else None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
