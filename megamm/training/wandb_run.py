"""Weights & Biases beside the files of the run, where the recipe names a project (log.wandb).

The package is imported only then. WANDB_MODE=offline, WANDB_BASE_URL and the like work as that package
documents them.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megamm.config import Recipe
from megamm.errors import InputError

ID_FILE = "wandb_id"  # in the run directory: every start goes on with the same run


def check_wandb(recipe: Recipe) -> None:
    """Refuse a recipe that wants Weights & Biases where the package is not installed.

    Raises:
        InputError: naming the extra.
    """
    if recipe.log.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"log.wandb: {recipe.log.wandb!r} needs the package wandb, which is not installed; "
            "pip install 'megamm[wandb]' or set log.wandb=null"
        )


class WandbRun:
    """The run as Weights & Biases sees it. Nothing that goes wrong there stops a run that is under way.

    Args:
        recipe: of the run, shown as its configuration; log.wandb is set.
        run_dir: keeps the id.
        start_step: steps already done.
        report: takes a line when logging there has failed and is given up.
    Raises:
        InputError: it cannot start, at the first step (later the line is all).
    """

    def __init__(self, recipe: Recipe, run_dir: Path, start_step: int, report: Callable[[str], None]) -> None:
        self._report = report
        self._run: Any = None
        try:
            self._module: Any = importlib.import_module("wandb")
            self._run = self._module.init(
                project=recipe.log.wandb,
                name=recipe.name,
                job_type=recipe.stage,
                id=_run_id(run_dir),
                resume="allow",
                dir=str(run_dir),
                config=asdict(recipe),
            )
            # our own axis: a resumed run repeats steps, which the package's counter would refuse
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # no account, no network, no disk: all of them classes of the package
            remedy = "set WANDB_MODE=offline, log in by `wandb login`, or set log.wandb=null"
            if start_step == 0:
                raise InputError(
                    f"log.wandb: Weights & Biases cannot start ({_sentence(error)}); {remedy}"
                ) from None
            self._give_up(error)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers of an optimizer step."""
        self._try(lambda: self._run.log({"step": step, **values}))

    def panels(self, step: int, folder: Path) -> None:
        """Record the panels that samples.json in `folder` tells of: pictures with question and answers."""

        def send() -> None:
            images = []
            for panel in json.loads((folder / "samples.json").read_text(encoding="utf-8")):
                caption = "{question}\nmodel: {prediction}\nanswer: {answer}".format(**panel)
                images += [
                    self._module.Image(str(folder / name), caption=caption) for name in panel["images"]
                ]
            self._run.log({"step": step, "validation/samples": images})

        self._try(send)

    def close(self, failed: bool) -> None:
        """Send the rest; `failed` is shown as the end of the run. May be called again."""
        self._try(lambda: self._run.finish(exit_code=int(failed)))
        self._run = None

    def _try(self, action: Callable[[], object]) -> None:
        if self._run is None:
            return
        try:
            action()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        self._report(
            f"warning: log.wandb: Weights & Biases failed ({_sentence(error)}); the run goes on without"
        )


def _run_id(run_dir: Path) -> str:
    path = run_dir / ID_FILE
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()


def _sentence(error: Exception) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
