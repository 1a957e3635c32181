"""The parts of the page that are words and tables."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megamm.pages.text import escaped
from megamm.report.chart import short
from megamm.report.read import INCIDENTS, QUARANTINED, Run, utc

RECENT = 200  # steps that "now" is about
REVISION = 12  # digits of it


def header(run: Run, now: float) -> Iterator[str]:
    """Name, state, the most important numbers, and what ran where."""
    kind, state = state_of(run)
    total = run.setting("training.steps", 0)
    yield f'<header>\n<div class="top"><h1>{escaped(name_of(run))}</h1>'
    yield f'<span class="state {kind}">{state}</span></div>\n'
    stage = run.setting("stage")
    said = [f"stage {escaped(str(stage))}"] if stage else []
    said.append(escaped(str(run.directory)))
    if run.starts:
        said.append(f"started {escaped(_minute(run.starts[0].get('time')))}")
    if run.written is not None:
        said.append(f"last step logged {utc(run.written)}, {_ago(now - run.written)}")
    yield f'<p class="facts">{" · ".join(said)}</p>\n'
    if isinstance(total, int) and total > 0:
        share = min(1.0, run.last_step / total)
        yield f'<div class="bar" role="img" aria-label="{share:.0%} done">'
        yield f'<i style="width:{100 * share:.2f}%"></i></div>\n'
    yield '<div class="tiles">\n'
    for label, value, more in _tiles(run):
        yield f"<div><span>{label}</span><b>{value}</b><small>{more}</small></div>\n"
    yield "</div>\n<dl>\n"
    yield from (f"<dt>{label}</dt><dd>{escaped(text)}</dd>\n" for label, text in _facts(run) if text)
    yield "</dl>\n</header>\n"


def name_of(run: Run) -> str:
    """The run's name, or that of its directory."""
    return str(run.setting("name") or run.directory.resolve().name)


def state_of(run: Run) -> tuple[str, str]:
    """How far the run is: a kind for the style, and words."""
    total, last = run.setting("training.steps"), run.last_step
    of = f" of {total:,}" if isinstance(total, int) else ""
    if not len(run.curves):
        return "begun", "no step yet"
    if not math.isfinite(run.curves.last("loss")):
        return "broken", f"diverged at step {last:,}{of}"
    if isinstance(total, int) and last >= total:
        return "done", f"finished: {total:,} steps"
    return "begun", f"at step {last:,}{of}"


def _tiles(run: Run) -> Iterator[tuple[str, str, str]]:
    curves, total = run.curves, run.setting("training.steps")
    if not len(curves):
        return
    columns, seconds = curves.columns, np.nan_to_num(curves.columns["seconds"])
    finite = np.flatnonzero(np.isfinite(columns["loss"]))
    first = (
        f"smoothed; {columns['loss'][finite[0]]:.4g} at step {curves.steps[finite[0]]:,}"
        if len(finite)
        else ""
    )
    yield "loss", short(curves.last("loss_smoothed")), first
    if run.validations:
        best = min(run.validations, key=lambda one: one.loss)
        yield (
            "validation loss",
            short(run.validations[-1].loss),
            f"best {short(best.loss)} at step {best.step:,}",
        )
    positions, images = (float(np.nansum(columns[name])) for name in ("num_tokens", "num_images"))
    seen = f"{short(positions)} positions, {short(images)} images"
    yield "samples seen", f"{np.nan_to_num(curves.last('consumed_samples')):,.0f}", seen
    yield "tokens/s", short(_recent(columns["tokens_per_s"])), f"median of {min(RECENT, len(curves))} steps"
    if np.isfinite(columns["mfu"]).any():
        hfu, mfu = _recent(columns["hfu"]), _recent(columns["mfu"])
        more = f"HFU {hfu:.1%}" if math.isfinite(hfu) and abs(hfu - mfu) > 5e-4 else ""
        yield "MFU", f"{mfu:.1%}", more
    else:
        yield "TFLOP/s", short(_recent(columns["tflops_per_device"])), "per device"
    waited = float(np.nansum(columns["data_wait"] * seconds)) / max(float(seconds.sum()), 1e-9)
    yield "data wait", f"{waited:.1%}", "of all time in steps"
    skipped = curves.total("skipped_steps")
    yield "skipped", f"{curves.total('skipped_samples'):,}", f"samples, and {skipped:,} steps"
    yield "time in steps", _duration(float(seconds.sum())), _device_hours(run, seconds)
    if isinstance(total, int) and total > run.last_step:
        left = (total - run.last_step) * _recent(columns["seconds"])
        yield "left", _duration(left), f"at {short(_recent(columns['seconds']))} s for a step"
    yield "memory", f"{np.nanmax(np.nan_to_num(columns['memory'])) / 2**30:.3g} GiB", "peak of rank 0"


def _device_hours(run: Run, seconds: np.ndarray) -> str:
    world = np.zeros(len(seconds))
    for start in run.starts:  # a later start has repeated the steps after its own
        if isinstance(start.get("step"), int) and isinstance(start.get("world_size"), int):
            world[run.curves.steps > start["step"]] = start["world_size"]
    hours = float((world * seconds).sum()) / 3600
    return f"{short(hours)} device hours" if world.all() else ""


def _recent(values: np.ndarray) -> float:
    recent = values[-RECENT:]
    recent = recent[np.isfinite(recent)]
    return float(np.median(recent)) if len(recent) else math.nan


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    start = run.starts[-1] if run.starts else {}
    yield "hardware", _hardware(start)
    yield "code", _code(start)
    sizes = {name: run.setting(f"parallel.{name}") for name in ("tensor", "pipeline", "context")}
    world, model = (
        start.get("world_size"),
        math.prod(size for size in sizes.values() if isinstance(size, int)),
    )
    layout = [f"{name} {size}" for name, size in sizes.items() if isinstance(size, int)]
    if layout and isinstance(world, int) and model:
        layout.append(f"data {world // model}")
    yield "parallel", ", ".join(layout)
    batch, micro = run.setting("training.global_batch_size"), run.setting("training.micro_batch_size")
    if batch is not None:
        precision = run.setting("training.precision", "")
        fp8 = run.setting("training.fp8.scaling", "off")
        more = f", fp8 by {fp8} scaling" if fp8 not in ("off", False) else ""
        yield "batch", f"{batch} samples, micro-batches of {micro}, {precision}{more}"
    frozen = run.setting("training.freeze", [])
    if isinstance(frozen, list):
        yield "frozen", ", ".join(map(str, frozen))


def _hardware(start: dict[str, Any]) -> str:
    devices, hosts = start.get("devices"), start.get("hosts")
    if not isinstance(devices, dict) or not isinstance(hosts, dict):
        return ""
    names = ", ".join(f"{count} x {name}" for name, count in devices.items())
    few = ", ".join(list(hosts)[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
    return f"{names} on {few}"


def _code(start: dict[str, Any]) -> str:
    git, versions = start.get("git"), start.get("versions")
    said = []
    if isinstance(git, dict):
        changed = " with changes that are not committed" if git.get("dirty") else ""
        said.append(f"revision {str(git.get('revision'))[:REVISION]}{changed}")
    if isinstance(versions, dict):
        known = ("megamm", "torch", "megatron-core", "transformer-engine", "python")
        said += [f"{name} {versions[name]}" for name in known if name in versions]
    return ", ".join(said)


def data_section(run: Run) -> Iterator[str]:
    """What was skipped, and the pictures that could not be read."""
    yield from _open("Skipped data", "data")
    if len(run.curves):
        samples, steps = run.curves.total("skipped_samples"), run.curves.total("skipped_steps")
        yield f"<p>{samples:,} samples were replaced because a picture was unreadable; "
        yield f"{steps:,} updates were left out because of their loss or gradient.</p>\n"
    if run.num_quarantined:
        yield f"<p>{run.num_quarantined:,} pictures in quarantine.jsonl"
        yield f"; the first {QUARANTINED}:</p>\n" if run.num_quarantined > QUARANTINED else ":</p>\n"
        rows = [[str(one.get(key, "")) for key in ("source", "key", "reason")] for one in run.quarantine]
        yield from _table(["folder or tar", "picture", "reason"], rows)
    else:
        yield '<p class="note">No picture is in quarantine.</p>\n'
    yield "</section>\n"


def incident_section(run: Run) -> Iterator[str]:
    """What went wrong and was survived."""
    if not run.incidents:
        return
    yield from _open("Incidents", "incidents")
    yield f"<p>{run.num_incidents:,} rows in incidents.jsonl"
    yield f"; the last {INCIDENTS}:</p>\n" if run.num_incidents > INCIDENTS else ":</p>\n"
    rows = [
        [_minute(one.get("time")), str(one.get("kind", "")).replace("_", " "), str(one.get("sentence", ""))]
        for one in run.incidents
    ]
    yield from _table(["time", "", "what happened"], rows)
    yield "</section>\n"


def checkpoint_section(run: Run) -> Iterator[str]:
    """The checkpoints that lie in the run directory."""
    yield from _open("Checkpoints", "checkpoints")
    if not run.checkpoints:
        yield '<p class="note">None yet.</p>\n'
    else:
        newest = next((one for one in run.checkpoints if not one.fault), None)
        rows = []
        for one in run.checkpoints:
            mark = "newest" if one is newest else ""
            layout = ", ".join(f"{name} {size}" for name, size in one.layout.items())
            state = one.fault or "complete"
            rows.append([f"{one.step:,}", mark, _bytes(one.size), f"{one.samples:,}", layout, state])
        yield from _table(["step", "", "size", "samples seen", "saved with", "manifest and sizes"], rows)
        yield '<p class="note">Contents are not compared here: megamm verify does that.</p>\n'
    yield "</section>\n"


def start_section(run: Run) -> Iterator[str]:
    """When, where and with what the run was started."""
    if not run.starts:
        return
    yield from _open("Starts", "starts")
    rows = []
    for number, start in enumerate(run.starts, start=1):
        variables = start.get("variables")
        job = str(variables.get("SLURM_JOB_ID", "")) if isinstance(variables, dict) else ""
        before = run.starts[number - 2] if number > 1 else start
        step = start.get("step", "")
        rows.append(
            [
                str(number),
                _minute(start.get("time")),
                f"{step:,}" if isinstance(step, int) else "",
                _hardware(start),
                _revision(start),
                job,
                _changes(before, start),
            ]
        )
    yield from _table(["", "time", "after step", "hardware", "revision", "job", "changed"], rows)
    yield "<details><summary>The last start in full</summary><dl>\n"
    for name, value in run.starts[-1].items():
        if isinstance(value, dict):
            value = "\n".join(f"{key} {text}" for key, text in value.items())
        elif isinstance(value, list):
            value = " ".join(map(str, value))
        lines = "<br>".join(escaped(line) for line in str(value).split("\n"))
        yield f"<dt>{escaped(name)}</dt><dd>{lines}</dd>\n"
    yield "</dl></details></section>\n"


def _revision(start: dict[str, Any]) -> str:
    git = start.get("git")
    return (
        f"{str(git.get('revision'))[:REVISION]}{'+' if git.get('dirty') else ''}"
        if isinstance(git, dict)
        else ""
    )


def _changes(before: dict[str, Any], start: dict[str, Any]) -> str:
    """Versions and variables that are not what they were at the start before."""
    changed = []
    for part in ("versions", "variables"):
        old, new = before.get(part), start.get(part)
        if isinstance(old, dict) and isinstance(new, dict):
            names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            changed += [f"{name} {new.get(name, 'gone')}" for name in names if not name.startswith("SLURM_")]
    return ", ".join(changed[:6]) + (f" and {len(changed) - 6} more" if len(changed) > 6 else "")


def event_section(run: Run) -> Iterator[str]:
    """log.txt without the lines about steps; warnings stand out."""
    yield from _open("Events", "events")
    if run.hidden_events:
        yield f'<p class="note">{run.hidden_events:,} older ones are in log.txt.</p>\n'
    yield '<ol class="events">\n'
    for event in run.events:
        kind = ' class="warning"' if event.is_warning else ""
        time = f"<time>{escaped(event.time.replace('T', ' ').rstrip('Z'))}</time> " if event.time else ""
        yield f"<li{kind}>{time}{escaped(event.text)}</li>\n"
    yield "</ol></section>\n"


def recipe_section(run: Run) -> Iterator[str]:
    """The resolved recipe."""
    yield from _open("Recipe", "recipe")
    if run.recipe_text:
        # line breaks and blanks are what YAML is made of, so only other things are spelled out
        lines = "\n".join(escaped(line) for line in run.recipe_text.rstrip("\n").split("\n"))
        yield f"<details><summary>recipe.yaml with every default</summary><pre>{lines}</pre></details>\n"
    else:
        yield '<p class="note">The run directory has no recipe.yaml.</p>\n'
    yield "</section>\n"


def _open(title: str, anchor: str) -> Iterator[str]:
    yield f'<section class="card" id="{anchor}">\n<h2>{title}</h2>\n'


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table without the columns that have nothing to tell."""
    used = [column for column in range(len(titles)) if any(row[column] for row in rows)]
    yield '<div class="scroll"><table><thead><tr>'
    yield "".join(f"<th>{titles[column]}</th>" for column in used) + "</tr></thead><tbody>\n"
    for row in rows:
        yield "<tr>" + "".join(f"<td>{escaped(row[column])}</td>" for column in used) + "</tr>\n"
    yield "</tbody></table></div>\n"


def _minute(time: object) -> str:
    """A time of environment.json as on the rest of the page."""
    text = str(time or "")
    return f"{text[:10]} {text[11:16]} UTC" if len(text) == 20 else text


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    return str(datetime.timedelta(seconds=round(seconds)))


def _ago(seconds: float) -> str:
    return f"{_duration(max(seconds, 0))} before this page"


def _bytes(size: int) -> str:
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 1024:.3g} KiB"
