"""What all checks share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

from megamm.config import ModelConfig, Recipe


def value_of(section: Recipe | ModelConfig, dotted: str) -> Any:
    return reduce(getattr, dotted.split("."), section)


def next_multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def divides(key: str, value: int, by_key: str, by: int) -> Iterator[str]:
    if value % by:
        yield (
            f"{key}: {value} is not divisible by {by_key} {by}; "
            f"change {by_key} or take {next_multiple(value, by)}"
        )
