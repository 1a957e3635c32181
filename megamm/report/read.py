"""What a run directory holds, however the run ended: files that are missing, cut or damaged cost what they
would have told."""

from __future__ import annotations

import json
import re
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megamm.config import LogConfig
from megamm.engine.manifest import Manifest, list_checkpoints, read_manifest
from megamm.errors import InputError
from megamm.recipe import parse_yaml
from megamm.report.curves import Curves, read_curves
from megamm.training.environment import FILE as ENVIRONMENT
from megamm.training.environment import read_starts
from megamm.training.incidents import FILE as INCIDENT_FILE
from megamm.training.metrics import read_metrics

MAX_RECIPE = 1 << 20  # characters of a recipe that is read
EVENTS, QUARANTINED, INCIDENTS = 300, 50, 50  # how many are shown
_STEP_LINE = re.compile(r"step +\d+/\d+ \|")
_LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ) (.*)")


class Event(NamedTuple):
    """A line of log.txt that is not about a step."""

    time: str
    text: str

    @property
    def is_warning(self) -> bool:
        return self.text.startswith(("warning", "Warning", "WARNING"))


class Validation(NamedTuple):
    """Mean loss of the validation data after a step."""

    step: int
    loss: float


class CheckpointFacts(NamedTuple):
    """A checkpoint, by its manifest; `fault` says why it cannot be used (contents are not compared)."""

    name: str
    step: int
    size: int
    samples: int
    layout: dict[str, int]
    fault: str


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        recipe, recipe_text: recipe.yaml, parsed and as it is.
        events: the newest EVENTS; hidden_events: how many came before them.
        quarantine: the first QUARANTINED entries; num_quarantined: all.
        incidents: the newest INCIDENTS rows of incidents.jsonl; num_incidents: all.
        checkpoints: newest first.
        written: when the last step was logged, seconds since the epoch; None: there is none.
    """

    directory: Path
    recipe: dict[str, Any]
    recipe_text: str
    curves: Curves
    validations: list[Validation]
    starts: list[dict[str, Any]]
    events: list[Event]
    hidden_events: int
    quarantine: list[dict[str, Any]]
    num_quarantined: int
    incidents: list[dict[str, Any]]
    num_incidents: int
    checkpoints: list[CheckpointFacts]
    written: float | None

    def setting(self, key: str, otherwise: Any = None) -> Any:
        """A value of the recipe by its dotted key."""
        found: Any = self.recipe
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return otherwise if found is None else found

    @property
    def last_step(self) -> int:
        return int(self.curves.steps[-1]) if len(self.curves) else 0


def read_run(directory: Path) -> Run:
    """Read a run directory.

    Raises:
        InputError: it is none.
    """
    metrics, recipe_file = directory / "metrics.jsonl", directory / "recipe.yaml"
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; give the run_dir of a recipe")
    if not metrics.is_file() and not (recipe_file.is_file() and (directory / "log.txt").is_file()):
        raise InputError(
            f"{directory}: no run has written here (there is no metrics.jsonl); give the run_dir of a recipe"
        )
    recipe_text = _text(recipe_file)
    recipe = _parsed(recipe_text)
    log = recipe.get("log")
    half_life = log.get("loss_half_life") if isinstance(log, dict) else None
    if not isinstance(half_life, (int, float)) or half_life <= 0:
        half_life = LogConfig().loss_half_life
    curves = read_curves(metrics, half_life)
    events, hidden = _events(directory / "log.txt")
    quarantine = list(_json_lines(directory / "quarantine.jsonl"))
    incidents = list(_json_lines(directory / INCIDENT_FILE))
    return Run(
        directory=directory,
        recipe=recipe,
        recipe_text=recipe_text,
        curves=curves,
        validations=[
            Validation(row["step"], float(row["validation_loss"]))
            for row in read_metrics(directory / "validation.jsonl")
            if isinstance(row.get("validation_loss"), (int, float))
        ],
        starts=read_starts(directory / ENVIRONMENT),
        events=events,
        hidden_events=hidden,
        quarantine=quarantine[:QUARANTINED],
        num_quarantined=len(quarantine),
        incidents=incidents[-INCIDENTS:],
        num_incidents=len(incidents),
        checkpoints=[_checkpoint(path) for path in list_checkpoints(directory / "checkpoints")],
        written=metrics.stat().st_mtime if len(curves) else None,
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _parsed(text: str) -> dict[str, Any]:
    try:
        recipe = parse_yaml(text, "recipe.yaml") if len(text) <= MAX_RECIPE else None
    except InputError:
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _events(path: Path) -> tuple[list[Event], int]:
    """The newest events, and how many came before them."""
    events, count = deque[Event](maxlen=EVENTS), 0
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                match = _LOG_LINE.fullmatch(line.rstrip("\n"))
                if match is None or not _STEP_LINE.match(match[2]):
                    events.append(Event(*match.groups()) if match else Event("", line.rstrip("\n")))
                    count += 1
    return list(events), count - len(events)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in _text(path).split("\n"):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            yield entry


def _checkpoint(path: Path) -> CheckpointFacts:
    step = int(path.name.removeprefix("step_"))
    try:
        manifest = read_manifest(path)
    except InputError as error:
        return CheckpointFacts(path.name, step, 0, 0, {}, str(error).removeprefix(f"{path}/"))
    size = sum(entry.size for entry in manifest.files.values())
    fault = _wrong_sizes(path, manifest)
    return CheckpointFacts(path.name, step, size, manifest.consumed_samples, manifest.layout, fault)


def _wrong_sizes(path: Path, manifest: Manifest) -> str:
    wrong = []
    for name, entry in manifest.files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry.size:
            wrong.append(name)
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"{wrong[0]}{more}: missing or not of the size that was saved" if wrong else ""


def utc(seconds: float) -> str:
    """A time as in the log, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
