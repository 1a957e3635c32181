"""The page about a run: curves first, then what the model answers, then what happened."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megamm.errors import RunError
from megamm.pages import frame
from megamm.report import sections
from megamm.report.chart import Chart, Line, draw, x_extent
from megamm.report.curves import Curves, make_buckets
from megamm.report.read import Run, read_run
from megamm.report.samples import panels_html, read_panels
from megamm.report.style import SCRIPT, STYLE
from megamm.whole_files import written_whole


def write_report(directory: Path, out: Path) -> Run:
    """Write the page about the run in `directory` into the file `out`.

    Raises:
        InputError: no run has written there.
        RunError: the page cannot be written.
    """
    run = read_run(directory)
    try:
        with written_whole(out) as file:
            file.writelines(page(run, time.time()))
    except OSError as error:
        raise RunError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    return run


def page(run: Run, now: float) -> Iterator[str]:
    """The HTML."""
    yield frame.head(f"{sections.name_of(run)}: {sections.state_of(run)[1]}", STYLE, SCRIPT)
    yield from sections.header(run, now)
    yield "<main>\n"
    if len(run.curves):
        yield from _charts(run)
    panels = read_panels(run.directory / "samples", run.last_step)
    if panels:
        yield '<h2 class="of" id="samples">What the model answers</h2>\n'
        yield from panels_html(panels)
    yield from sections.data_section(run)
    yield from sections.incident_section(run)
    yield from sections.checkpoint_section(run)
    yield from sections.start_section(run)
    yield from sections.event_section(run)
    yield from sections.recipe_section(run)
    yield "</main>\n" + frame.foot()


def charts_of(run: Run) -> list[Chart]:
    """The charts that the run has numbers for."""
    columns = run.curves.columns

    def known(name: str) -> bool:
        return bool(np.isfinite(columns[name]).any())

    found = [
        Chart(
            "Loss",
            [Line("every step", "loss", "raw"), Line("smoothed", "loss_smoothed")],
            from_zero=False,
            wide=True,
            dots=[(one.step, one.loss) for one in run.validations],
            dots_name="validation",
        ),
        Chart("Learning rate", [Line("", "lr")]),
        Chart("Gradient norm", [Line("", "grad_norm")]),
        Chart("Tokens per second", [Line("", "tokens_per_s")]),
    ]
    if known("mfu"):
        lines = [Line("MFU", "mfu")]
        if known("hfu") and np.nanmax(np.abs(columns["hfu"] - columns["mfu"])) > 5e-4:
            lines.append(Line("HFU", "hfu", "second"))
        found.append(Chart("Use of the devices", lines, unit="%", scale=100))
    else:
        found.append(Chart("TFLOP/s per device", [Line("", "tflops_per_device")]))
    found.append(Chart("Seconds per step", [Line("", "seconds")]))
    found.append(Chart("Waiting for data", [Line("", "data_wait")], unit="% of the time", scale=100))
    return found


def _charts(run: Run) -> Iterator[str]:
    curves: Curves = run.curves
    buckets = make_buckets(curves.steps)
    again = [
        start["step"] for start in run.starts if isinstance(start.get("step"), int) and start["step"] > 0
    ]
    left, right = x_extent(curves.steps)
    numbers: dict[str, Any] = {
        "left": left,
        "right": right,
        "first": buckets.first.tolist(),
        "last": buckets.last.tolist(),
        "charts": [],
    }
    yield '<div class="charts" id="curves">\n'
    for chart in charts_of(run):
        html, values = draw(chart, curves, buckets, again)
        numbers["charts"].append(values)
        yield html
    yield "</div>\n"
    notes = ["Dotted lines: the run was started again."] if again else []
    if not np.isfinite(curves.columns["loss"]).all() or not np.isfinite(curves.columns["grad_norm"]).all():
        notes.append("Red marks: a value that is no number.")
    if notes:
        yield f'<p class="note">{" ".join(notes)}</p>\n'
    text = json.dumps(numbers, separators=(",", ":"))  # nothing of it is foreign text
    yield f'<script type="application/json" id="numbers">{text}</script>\n<script>{SCRIPT}</script>\n'
