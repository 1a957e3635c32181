"""How one thing grows with another: the exponent of a power law, and its picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT, MARGIN = 420, 300, 56
SLACK = 0.15  # by which an exponent may lie outside of what is expected


@dataclass(frozen=True)
class Fit:
    """y = factor * x ** exponent.

    Attributes:
        error: standard error of the exponent; 0 where two points leave none.
    """

    exponent: float
    error: float
    factor: float

    def at(self, x: float) -> float:
        """The value on the line."""
        return float(self.factor * x**self.exponent)

    def __str__(self) -> str:
        return f"{self.exponent:.2f} ± {self.error:.2f}"


def fit(xs: Sequence[float], ys: Sequence[float]) -> Fit:
    """Least squares of log y over log x.

    Raises:
        ValueError: there are fewer than two different xs, or a number that is not above 0.
    """
    if len(set(xs)) < 2 or min(*xs, *ys) <= 0:
        raise ValueError(f"no power law goes through {list(xs)} and {list(ys)}")
    x, y = np.log(np.asarray(xs, float)), np.log(np.asarray(ys, float))
    slope, offset = np.polyfit(x, y, 1)
    residuals, free = y - slope * x - offset, len(x) - 2
    spread = float(((x - x.mean()) ** 2).sum())
    error = math.sqrt(float((residuals**2).sum()) / free / spread) if free else 0.0
    return Fit(float(slope), error, math.exp(offset))


@dataclass(frozen=True)
class Growth:
    """One quantity as another grows.

    Attributes:
        of, over: what was measured, and what was varied.
        unit: of `ys`.
        expected: least and greatest exponent.
    """

    of: str
    over: str
    unit: str
    xs: list[float]
    ys: list[float]
    expected: tuple[float, float]

    @property
    def fit(self) -> Fit:
        return fit(self.xs, self.ys)

    @property
    def is_as_expected(self) -> bool:
        """Within the bounds, but for SLACK and the error of the fit."""
        low, high = self.expected
        found, slack = self.fit, SLACK + self.fit.error
        return low - slack <= found.exponent <= high + slack

    @property
    def name(self) -> str:
        """For files."""
        text = f"{self.of} over {self.over}".lower()
        return "".join(c if c.isalnum() else "_" for c in text)

    @property
    def expectation(self) -> str:
        """In words."""
        low, high = self.expected
        return f"{low:g}" if low == high else f"{low:g} to {high:g}"

    def cells(self) -> list[str]:
        """A row of the table whose columns are COLUMNS."""
        points = ", ".join(f"{short(x)}: {short(y)}" for x, y in zip(self.xs, self.ys, strict=True))
        verdict = "as expected" if self.is_as_expected else "not as expected"
        return [
            f"{self.of} over {self.over}",
            f"{points} {self.unit}",
            str(self.fit),
            self.expectation,
            verdict,
        ]

    def picture(self) -> str:
        """Points and the fitted line, both axes logarithmic, as SVG."""
        return draw(self)


COLUMNS = ["quantity", "points", "exponent", "expected", ""]


def short(value: float) -> str:
    """Three digits, thousands marked."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def draw(growth: Growth) -> str:
    """See `Growth.picture`."""
    found = growth.fit
    ends = [found.at(growth.xs[0]), found.at(growth.xs[-1])]
    x_low, x_high = min(growth.xs), max(growth.xs)
    low, high = min(*growth.ys, *ends) / 1.3, max(*growth.ys, *ends) * 1.3

    def point(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / x_low) / math.log(x_high / x_low)
        up = math.log(y / low) / math.log(high / low)
        return MARGIN + (WIDTH - MARGIN - 16) * across, HEIGHT - 40 - (HEIGHT - 84) * up

    line = " ".join("{:.1f},{:.1f}".format(*point(x, found.at(x))) for x in (x_low, x_high))
    title = f"{growth.of} over {growth.over}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="11"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{MARGIN}" y="18" font-size="13">{escape(title)}</text>',
        f'<text x="{MARGIN}" y="33" fill="#555">exponent {found}, expected {growth.expectation}</text>',
        f'<path d="M{MARGIN} 44V{HEIGHT - 40}H{WIDTH - 16}" fill="none" stroke="#999"/>',
        f'<polyline points="{line}" fill="none" stroke="#2f6f9f"/>',
    ]
    for x, y in zip(growth.xs, growth.ys, strict=True):
        across, up = point(x, y)
        parts.append(f'<circle cx="{across:.1f}" cy="{up:.1f}" r="3" fill="#c8553d"/>')
        parts.append(f'<text x="{across:.1f}" y="{HEIGHT - 24}" text-anchor="middle">{short(x)}</text>')
    for y in (min(growth.ys), max(growth.ys)):
        _, up = point(x_low, y)
        parts.append(f'<text x="{MARGIN - 6}" y="{up + 4:.1f}" text-anchor="end">{short(y)}</text>')
    parts.append(
        f'<text x="{WIDTH - 16}" y="{HEIGHT - 8}" text-anchor="end">{escape(growth.over)}</text>'
        f'<text x="6" y="{HEIGHT - 8}">{escape(growth.unit)}</text></svg>'
    )
    return "\n".join(parts) + "\n"
