"""A plot: SVG that is stretched to the width there is, with labels around it that are not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any, Literal, NamedTuple

import numpy as np

from megamm.pages.axis import tick_label, ticks
from megamm.report.curves import Buckets, Curves, Points, points

SIZE = 1000  # units of the stretched picture, both ways
OUTLIERS = 99.5  # values beyond this percentile may be cut off ...
FAR = 1.6  # ... where they would take this many times the room of the others


class Line(NamedTuple):
    """A curve: "raw" ones are faint, what lies between least and greatest value; others a line."""

    name: str
    column: str
    style: Literal["raw", "main", "second"] = "main"


class Chart(NamedTuple):
    """What one plot shows.

    Attributes:
        scale: values are multiplied by it.
        from_zero: the axis begins at 0.
        dots: (step, value) of single points, as a further line named `dots_name`.
    """

    title: str
    lines: Sequence[Line]
    unit: str = ""
    scale: float = 1.0
    from_zero: bool = True
    wide: bool = False
    dots: Sequence[tuple[int, float]] = ()
    dots_name: str = ""


def draw(chart: Chart, curves: Curves, buckets: Buckets, marks: Sequence[int]) -> tuple[str, dict[str, Any]]:
    """The HTML of a chart, and its numbers for the read-out of the page's script.

    Args:
        marks: steps after which the run was started again.
    """
    found = [points(curves.columns[line.column] * chart.scale, buckets) for line in chart.lines]
    low, high, is_cut = _extent(chart, curves)
    left, right = x_extent(curves.steps)
    x = SIZE * (buckets.last - left) / (right - left)

    def y(values: np.ndarray) -> np.ndarray:
        return np.clip(SIZE * (high - values) / (high - low), -SIZE, 2 * SIZE)

    def x_of(step: float) -> float:
        return float(SIZE * (step - left) / (right - left))

    y_ticks = ticks(low, high, 5)
    shapes = [f'<path class="grid" d="M0 {float(y(np.array(tick))):.1f}h{SIZE}"/>' for tick in y_ticks]
    shapes += [
        f'<path class="again" d="M{x_of(step):.1f} 0v{SIZE}"/>' for step in marks if left <= step <= right
    ]
    is_bucketed = len(buckets.starts) < len(curves)
    for line, values in zip(chart.lines, found, strict=True):
        if is_bucketed and (line.style == "raw" or len(chart.lines) == 1):
            shapes.append(f'<path class="band" d="{_band(x, y(values.low), y(values.high))}"/>')
        if not (is_bucketed and line.style == "raw"):
            shapes.append(f'<path class="{line.style}" d="{_path(x, y(values.mean))}"/>')
    if chart.dots:
        steps, seen = (np.array(column, float) for column in zip(*chart.dots, strict=True))
        at_x, at_y = SIZE * (steps - left) / (right - left), y(seen * chart.scale)
        shapes.append(f'<path class="second" d="{_path(at_x, at_y)}"/>')
        dots = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(at_x, at_y, strict=True) if math.isfinite(b))
        shapes.append(f'<path class="dots" d="{dots}"/>')
    lost = np.flatnonzero(~np.isfinite(curves.columns[chart.lines[0].column]))
    shapes += [f'<path class="lost" d="M{x_of(curves.steps[row]):.1f} {SIZE}v-120"/>' for row in lost[:50]]
    summary = _summary(chart, curves) + (" · beyond the frame: cut off" if is_cut else "")
    html = "".join(_frame(chart, shapes, summary, (low, high, y_ticks), (left, right)))
    return html, _numbers(chart, found)


def x_extent(steps: np.ndarray) -> tuple[float, float]:
    """The steps at both ends of a chart."""
    first, last = float(steps[0]), float(steps[-1])
    left = 0.0 if first <= 0.1 * last or first == 1 else first
    return left, max(last, left + 1)


def _frame(
    chart: Chart,
    shapes: list[str],
    summary: str,
    y_axis: tuple[float, float, list[float]],
    x_axis: tuple[float, float],
) -> Iterator[str]:
    low, high, y_ticks = y_axis
    left, right = x_axis
    wide = " wide" if chart.wide else ""
    unit = f" <small>{escape(chart.unit)}</small>" if chart.unit else ""
    yield f'<section class="card chart{wide}" tabindex="0" aria-label="{escape(chart.title)} by step">\n'
    yield f'<div class="top"><h2>{escape(chart.title)}{unit}</h2>{_legend(chart)}</div>\n'
    yield f'<p class="read">{escape(summary)}</p>\n<div class="plot"><div class="y">'
    for tick in y_ticks:
        yield f'<span style="bottom:{100 * (tick - low) / (high - low):.2f}%">{short(tick)}</span>'
    yield f'</div><div class="area"><svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" role="img" '
    yield f'aria-label="{escape(chart.title + ": " + summary)}">{"".join(shapes)}</svg><i></i></div>'
    yield '<div class="x">'
    for tick in ticks(left, right, 6, whole=True):
        share = 100 * (tick - left) / (right - left)
        edge = ' class="end"' if share > 97 else ' class="start"' if share < 3 else ""
        yield f'<span{edge} style="left:{share:.2f}%">{short(tick)}</span>'
    yield "</div></div></section>\n"


def _legend(chart: Chart) -> str:
    named = [(line.style, line.name) for line in chart.lines if line.name]
    if chart.dots:
        named.append(("second", chart.dots_name))
    keys = "".join(f'<span class="key {style}">{escape(name)}</span>' for style, name in named)
    return f'<div class="keys">{keys}</div>' if len(named) > 1 else ""


def _extent(chart: Chart, curves: Curves) -> tuple[float, float, bool]:
    """Both ends of the vertical axis, and whether something lies beyond."""
    parts = [curves.columns[line.column] for line in chart.lines]
    parts.append(np.array([value for _, value in chart.dots]))
    values = np.concatenate(parts) * chart.scale
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0, False
    low, high = float(values.min()), float(values.max())
    base = min(low, 0.0) if chart.from_zero else low
    usual, is_cut = float(np.percentile(values, OUTLIERS)), False
    if high - base > FAR * (usual - base) > 0:
        high, is_cut = usual + 0.15 * (usual - base), True
    if high <= base:
        return base, base + (abs(base) or 1.0), False
    room = 0.06 * (high - base)
    return base if chart.from_zero else base - room, high + room, is_cut


def _runs(good: np.ndarray) -> Iterator[tuple[int, int]]:
    """Begin and end of every stretch of True."""
    edges = np.flatnonzero(np.diff(good.astype(np.int8), prepend=0, append=0))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """A line that is interrupted where there are no values; a single one is a dot."""
    parts = []
    for begin, end in _runs(np.isfinite(y)):
        pairs = [f"{a:.1f} {b:.1f}" for a, b in zip(x[begin:end], y[begin:end], strict=True)]
        parts.append("M" + "L".join(pairs) + ("h0" if len(pairs) == 1 else ""))
    return "".join(parts)


def _band(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
    parts = []
    for begin, end in _runs(np.isfinite(low)):
        there = [f"{a:.1f} {b:.1f}" for a, b in zip(x[begin:end], high[begin:end], strict=True)]
        back = [f"{a:.1f} {b:.1f}" for a, b in zip(x[begin:end], low[begin:end], strict=True)]
        parts.append("M" + "L".join([*there, *reversed(back)]) + "Z")
    return "".join(parts)


def _summary(chart: Chart, curves: Curves) -> str:
    """What is said as long as nobody points at the chart: about its last line, the smoothest."""
    line = next((line for line in chart.lines if line.style == "main"), chart.lines[0])
    values = curves.columns[line.column] * chart.scale
    good = np.flatnonzero(np.isfinite(values))
    if not len(good):
        return "no finite value"
    raw = curves.columns[chart.lines[0].column] * chart.scale
    peak = int(np.nanargmax(np.where(np.isfinite(raw), raw, -np.inf)))
    said = [f"last {short(values[good[-1]])}", f"median {short(float(np.median(values[good])))}"]
    said.append(f"highest {short(raw[peak])} at step {curves.steps[peak]:,}")
    if chart.dots:
        said.insert(1, f"{chart.dots_name} {short(chart.dots[-1][1] * chart.scale)}")
    return " · ".join(said)


def _numbers(chart: Chart, found: Sequence[Points]) -> dict[str, Any]:
    lines = []
    for line, values in zip(chart.lines, found, strict=True):
        one: dict[str, Any] = {"name": line.name or chart.title, "mean": _json(values.mean)}
        if line.style == "raw" or len(chart.lines) == 1:
            one |= {"low": _json(values.low), "high": _json(values.high)}
        lines.append(one)
    dots = [[step, _json(np.array([value * chart.scale]))[0]] for step, value in chart.dots]
    unit = " %" if chart.unit.startswith("%") else ""
    return {"unit": unit, "lines": lines, "dots": dots, "dotsName": chart.dots_name}


def _json(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values.tolist()]


def short(value: float) -> str:
    """A number in few characters."""
    size = abs(value)
    if not math.isfinite(value):
        return "–"
    if size and size < 1e-3:
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            unit = 1e3 if letter == "k" else limit
            return f"{value / unit:.4g}".rstrip(".") + letter
    return tick_label(float(f"{value:.4g}"))
