"""Round numbers for the axes of plots."""

from __future__ import annotations

import math


def ticks(low: float, high: float, about: int, whole: bool = False) -> list[float]:
    """Round numbers from `low` to `high`, about so many; whole ones on request."""
    step = nice_above(max(high - low, 1e-9 * max(abs(low), abs(high)), 1e-300) / about)
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    digits = 9 - math.floor(math.log10(step))
    return [round(step * i, digits) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def nice_above(value: float) -> float:
    """The smallest of 1, 2, 2.5, 4, 5, 8 times a power of ten that is not below `value`."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * factor for factor in (1, 2, 2.5, 4, 5, 8, 10) if power * factor >= value * (1 - 1e-9))


def tick_label(value: float) -> str:
    """A number of an axis, with thousands marked and at most three decimals."""
    return f"{int(value):,}" if value == int(value) else f"{value:.3f}".rstrip("0").rstrip(".")
