"""The distributions of a dataset as one SVG picture, drawn without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np

from megamm.data.inspect.histogram import Histogram
from megamm.data.inspect.stats import Statistics
from megamm.errors import RunError
from megamm.pages.axis import nice_above, tick_label, ticks
from megamm.whole_files import written_whole

PANEL_W, PANEL_H, GAP_X, GAP_Y, MARGIN, TOP = 330, 190, 80, 112, 66, 124
COLUMNS, BARS, FEW = 3, 40, 24  # a histogram of at most FEW different values has a bar for each
TAIL = 99.5  # what lies beyond this percentile is told in words instead of drawn

STYLE = """
svg { font: 12px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
.paper { fill: #fff } text { fill: #3c4350 } .title { font-size: 18px; font-weight: 600; fill: #14181f }
.name { font-size: 14px; font-weight: 600; fill: #14181f } .grid { stroke: #e3e6ea } .axis { stroke: #7b8494 }
.bar { fill: #3b76c4 } .median { stroke: #14181f; stroke-dasharray: 4 3 }
.limit { stroke: #c2410c; stroke-width: 1.5 }
.small { font-size: 11px } .limit-text { fill: #b03a0a; font-weight: 600 }
.mark { paint-order: stroke; stroke: #fff; stroke-width: 4px; stroke-linejoin: round }
@media (prefers-color-scheme: dark) {
.paper { fill: #14171c } text { fill: #b8c0cc } .title, .name { fill: #f0f3f7 } .grid { stroke: #2b313a }
.axis { stroke: #7b8494 } .bar { fill: #6ea3e8 } .median { stroke: #f0f3f7 } .limit { stroke: #fb923c }
.limit-text { fill: #fdba74 } .mark { stroke: #14171c }
}
"""


class Panel(NamedTuple):
    """One histogram: its title, what its axis counts, what is counted, and a limit to mark."""

    title: str
    axis: str
    what: str
    histogram: Histogram
    limit: Optional[int] = None


def write_plot(statistics: Statistics, path: Path, sequence_length: int | None = None) -> None:
    """Draw `statistics` into the SVG file `path`; `sequence_length` is marked where positions are shown.

    Raises:
        RunError: the file cannot be written.
    """
    try:
        with written_whole(path) as file:
            file.write(draw(statistics, sequence_length))
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror}); choose another --plot") from None


def draw(statistics: Statistics, sequence_length: int | None = None) -> str:
    """The picture as SVG."""
    panels = list(_panels(statistics, sequence_length))
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // COLUMNS)
    width = 2 * MARGIN + columns * PANEL_W + (columns - 1) * GAP_X
    height = TOP + rows * PANEL_H + (rows - 1) * GAP_Y + 66
    share = statistics.learnt / max(statistics.tokens, 1)
    facts = f"{statistics.all_samples:,} samples"
    if statistics.samples != statistics.all_samples:
        facts += f" ({statistics.samples:,} looked at)"
    facts += f" · {statistics.tokens:,} tokens · {share:.1%} of them carry loss"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img">',
        f"<title>{escape(str(statistics.directory))}</title><style>{STYLE}</style>",
        f'<rect class="paper" width="{width}" height="{height}"/>',
        f'<text class="title" x="{MARGIN}" y="36">{escape(str(statistics.directory))}</text>',
        f'<text x="{MARGIN}" y="58">{escape(facts)}</text>',
    ]
    for number, panel in enumerate(panels):
        left = MARGIN + (number % COLUMNS) * (PANEL_W + GAP_X)
        top = TOP + (number // COLUMNS) * (PANEL_H + GAP_Y)
        parts += [f'<g transform="translate({left} {top})">', *_panel(panel), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panels(statistics: Statistics, sequence_length: int | None) -> Iterator[Panel]:
    found = statistics.histograms
    if "positions" in found:
        axis = "positions (images expanded)"
        yield Panel("Length in training", axis, "samples", found["positions"], sequence_length)
    else:
        axis = "tokens (an image is one)"
        yield Panel("Stored length", axis, "samples", found["tokens"], sequence_length)
    yield Panel("Label share", "share of a sample's tokens that carry loss", "samples", found["label share"])
    yield Panel("Images per sample", "images", "samples", found["images per sample"])
    if "image width" in found:
        yield Panel("Image width", "pixels", "images", found["image width"])
        yield Panel("Image height", "pixels", "images", found["image height"])
        aspect = "image aspect (width/height)"
        yield Panel("Image aspect", "width / height", "images", found[aspect])


def _panel(panel: Panel) -> Iterator[str]:
    one = panel.histogram
    edges, single = _edges(one, panel.limit)
    shares = 100 * one.bars(edges) / max(one.total, 1)
    top = 1.12 * float(shares.max()) or 1.0  # room for the words beside the median
    low, high = float(edges[0]), float(edges[-1])

    def x(value: float) -> float:
        return PANEL_W * (value - low) / (high - low)

    def y(value: float) -> float:
        return PANEL_H * (1 - value / top)

    yield f'<text class="name" x="0" y="-33">{escape(panel.title)}</text>'
    yield f'<text class="small" x="0" y="-16">{_beyond(one, high, panel.what)}</text>'
    for tick in ticks(0, top, 4):
        yield f'<line class="grid" x1="0" x2="{PANEL_W}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        place = f'x="-8" y="{y(tick) + 4:.1f}" text-anchor="end"'
        yield f'<text class="small" {place}>{tick_label(tick)} %</text>'
    for left, right, share in zip(edges[:-1], edges[1:], shares, strict=True):
        if share > 0:
            a, b = x(float(left)), x(float(right))
            gap = min(1.0, (b - a) / 6)
            size = f'width="{b - a - gap:.2f}" height="{PANEL_H - y(float(share)):.2f}"'
            yield f'<rect class="bar" x="{a + gap / 2:.2f}" y="{y(float(share)):.2f}" {size}/>'
    yield f'<line class="axis" x1="0" x2="{PANEL_W}" y1="{PANEL_H}" y2="{PANEL_H}"/>'
    shift = 0.5 if single else 0.0  # a bar of one value stands around it
    for tick in ticks(low + shift, high - shift, 6, whole=one.step == 1):
        yield f'<line class="axis" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{PANEL_H}" y2="{PANEL_H + 5}"/>'
        place = f'x="{x(tick):.1f}" y="{PANEL_H + 19}" text-anchor="middle"'
        yield f'<text class="small" {place}>{tick_label(tick)}</text>'
    yield f'<text class="small" x="{PANEL_W / 2}" y="{PANEL_H + 38}" text-anchor="middle">{panel.axis}</text>'
    marks = [(one.percentile(50), "median", "small mark")]
    if panel.limit is not None:
        marks.append((panel.limit, "limit", "small mark limit-text"))
    yield from _marks(marks, x)


def _marks(marks: list[tuple[float, str, str]], x: Callable[[float], float]) -> Iterator[str]:
    """Vertical lines with their values; two that lie close are written at different heights."""
    for number, (value, kind, style) in enumerate(marks):
        at = x(value)
        right = at > 0.7 * PANEL_W
        anchor, shift = ("end", -5) if right else ("start", 5)
        yield f'<line class="{kind}" x1="{at:.1f}" x2="{at:.1f}" y1="-4" y2="{PANEL_H}"/>'
        yield (
            f'<text class="{style}" x="{at + shift:.1f}" y="{8 + 15 * number}" text-anchor="{anchor}">'
            f"{kind} {tick_label(value)}</text>"
        )


def _edges(one: Histogram, limit: int | None) -> tuple[np.ndarray, bool]:
    """Edges of the bars, and whether each has one value."""
    least, most = one.percentile(0), one.percentile(100)
    if one.step == 1 and len(one.values) <= FEW and most - least < FEW:
        return np.arange(int(least), int(most) + 2) - 0.5, True
    high = max(one.percentile(TAIL), limit or 0)
    low = 0.0 if least < 0.4 * high else float(least)
    wide = nice_above((high - low) / BARS) if one.step == 1 else max((high - low) / BARS, one.step)
    if one.step == 1:
        wide = max(1.0, math.ceil(wide))
        low = math.floor(low / wide) * wide
    return low + wide * np.arange(math.ceil((high - low) / wide + 1e-9) + 1), False


def _beyond(one: Histogram, high: float, what: str) -> str:
    count = int(one.counts[one.values * one.step > high].sum())
    text = f"{one.total:,} {what}"
    return f"{text}, {count:,} beyond (to {tick_label(one.percentile(100))})" if count else text
