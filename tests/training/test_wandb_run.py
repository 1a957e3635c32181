"""Weights & Biases, by a stand-in for its package: what it is given, and what happens when it fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megamm.errors import InputError
from megamm.training import wandb_run
from megamm.training.logging import RunLogger
from megamm.training.wandb_run import check_wandb
from tests.training.test_logging import recipe, stats


class Service:
    """What the package would have sent; `broken` names the calls that fail."""

    def __init__(self) -> None:
        self.starts: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.ends: list[int] = []
        self.axes: list[tuple[str, str | None]] = []
        self.broken: set[str] = set()

    def init(self, **options: Any) -> Any:
        self._fail("init")
        self.starts.append(options)
        return SimpleNamespace(log=self.log, finish=self.finish, define_metric=self.define_metric)

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes.append((name, step_metric))

    def log(self, row: dict[str, Any]) -> None:
        self._fail("log")
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.ends.append(exit_code)

    def _fail(self, call: str) -> None:
        if call in self.broken:
            raise OSError("no route to host\nand much more")


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    service, module = Service(), ModuleType("wandb")
    module.init = service.init  # type: ignore[attr-defined]
    module.Image = lambda path, caption: (Path(path).name, caption)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return service


def test_a_run_goes_on_under_its_id(service: Service, tmp_path: Path) -> None:
    r = recipe("log.wandb=pictures")
    with RunLogger(tmp_path, r, 9) as log:
        log.step(stats(1, loss=float("nan")))
    with pytest.raises(KeyError), RunLogger(tmp_path, r, 9, start_step=1) as log:
        log.step(stats(2, loss=1.5))
        panel = {"question": "What?", "answer": "A house.", "prediction": "A dog.", "images": ["a.png"]}
        (tmp_path / "samples.json").write_text(json.dumps([panel]))
        log.validation(2, 1.25, 0.1)
        log.panels(2, tmp_path)
        raise KeyError
    one, two = service.starts
    assert one["id"] == two["id"] == (tmp_path / "wandb_id").read_text().strip()
    assert one["project"] == "pictures" and one["resume"] == "allow" and one["dir"] == str(tmp_path)
    assert one["config"]["optimizer"]["lr"] == r.optimizer.lr
    assert ("*", "step") in service.axes
    first, second, validation, samples = service.rows
    assert first["step"] == 1 and "train/loss" not in first and first["train/lr"] == 1e-3
    assert second["train/loss"] == second["train/loss_smoothed"] == 1.5
    assert validation == {"step": 2, "validation/loss": 1.25}
    ((name, caption),) = samples["validation/samples"]
    assert name == "a.png" and "What?" in caption and "A dog." in caption and "A house." in caption
    assert service.ends == [0, 1]


def test_a_service_that_fails_stops_no_run_under_way(service: Service, tmp_path: Path) -> None:
    r = recipe("log.wandb=pictures")
    service.broken = {"init"}
    with pytest.raises(InputError, match=r"log\.wandb.*\(no route to host\); set WANDB_MODE=offline"):
        RunLogger(tmp_path, r, 9)
    with RunLogger(tmp_path, r, 9, start_step=1) as log:
        log.step(stats(2))
    service.broken = {"log"}
    with RunLogger(tmp_path, r, 9, start_step=2) as log:
        log.step(stats(3))
        log.step(stats(4))
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert sum("goes on without" in line for line in lines) == 2
    assert service.rows == []


def test_the_package_is_asked_for_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_run.importlib.util, "find_spec", lambda name: None)
    check_wandb(recipe())
    with pytest.raises(InputError, match=r"pip install 'megamm\[wandb\]'"):
        check_wandb(recipe("log.wandb=pictures"))
