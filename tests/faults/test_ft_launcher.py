"""NVIDIA's ft_launcher: a rank that hangs gives no sign of life; all are started again and end as if nothing
were.

The package is no part of the ordinary environment; MEGAMM_FT_SITE names a folder that has it
(pip install --target FOLDER nvidia-resiliency-ext==0.4.1 defusedxml pynvml nvidia-ml-py --no-deps)."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import sys
import time
import types
from pathlib import Path

import pytest

from megamm.errors import InputError
from megamm.training import heartbeat
from megamm.training.heartbeat import Heartbeats
from tests.faults.launches import ROOT, Launch
from tests.training.runs import STEPS, assert_same_end, run, write_recipe

PACKAGE = "nvidia_resiliency_ext"
SITE = os.environ.get("MEGAMM_FT_SITE", "")
FT_LAUNCHER = ("-m", f"{PACKAGE}.fault_tolerance.launcher")
OPTIONS = (
    *("--standalone", "--max-restarts=3", "--ft-workload-check-interval=0.5"),
    *("--ft-initial-rank-heartbeat-timeout=90", "--ft-rank-heartbeat-timeout=5"),
)


@pytest.mark.faults
@pytest.mark.skipif(
    not SITE and importlib.util.find_spec(PACKAGE) is None,
    reason="nvidia-resiliency-ext is not installed (pip install 'megamm[ft]', or MEGAMM_FT_SITE)",
)
def test_hanging_ranks_are_found_and_started_again(
    tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path
) -> None:
    """Two ranks are stopped, one after the other: the watch goes on after a restart. Validation takes a
    while in every third step."""
    recipe = write_recipe(tmp_path, dataset_dir, tokenizer_dir)
    (tmp_path / "straight").mkdir()
    other = write_recipe(tmp_path / "straight", dataset_dir, tokenizer_dir)
    assert run(other, tmp_path / "log", processes=2) == 0
    paths = os.pathsep.join(filter(None, [str(ROOT), SITE]))
    validation = ("--validation.interval=3", f"--validation.data={dataset_dir}")
    with Launch(
        recipe,
        tmp_path / "log",
        *validation,
        launcher=FT_LAUNCHER,
        options=OPTIONS,
        variables={"PYTHONPATH": paths},
    ) as launch:
        for step in (3, 7):
            launch.wait_for_step(tmp_path / "run", step)
            ranks = launch.ranks()
            rank = random.SystemRandom().choice([0, 1])
            os.kill(ranks[rank].pid, signal.SIGSTOP)
            ranks[rank].wait(60)  # SIGKILL by the monitor
        assert launch.wait(150) == 0, launch.output()[-5000:]
    assert launch.output().count("FT timeout elapsed") >= 2
    assert_same_end(tmp_path / "straight" / "run", tmp_path / "run")
    assert f"step {STEPS}/{STEPS}" in (tmp_path / "run" / "log.txt").read_text()


class Client:
    """What is used of RankMonitorClient."""

    def __init__(self) -> None:
        self.hb_timeouts = types.SimpleNamespace(initial=9.0, subsequent=0.2)
        self.log: list[str] = []
        self.fails = False

    def init_workload_monitoring(self) -> None:
        self.log.append("begin")

    def send_heartbeat(self) -> None:
        if self.fails:
            raise Gone
        self.log.append("beat")

    def shutdown_workload_monitoring(self) -> None:
        self.log.append("end")


class Gone(Exception):
    """RankMonitorClientError."""


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    """The package, with a client that keeps what is said to it."""
    found = Client()
    package = types.ModuleType(f"{PACKAGE}.fault_tolerance")
    package.RankMonitorClient, package.RankMonitorClientError = lambda: found, Gone  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, PACKAGE, types.ModuleType(PACKAGE))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    return found


def test_beats_go_on_while_there_are_no_steps(client: Client) -> None:
    with Heartbeats({heartbeat.SOCKET: "x"}) as heartbeats:
        with heartbeats.paused():  # before the first step: the time of the start counts
            time.sleep(0.3)
        assert client.log == ["begin"]
        heartbeats.beat()
        with heartbeats.paused():
            time.sleep(0.5)
        count = client.log.count("beat")
        assert count >= 4
        time.sleep(0.2)
        assert client.log.count("beat") == count
    assert client.log[-1] == "end" and client.log.count("begin") == client.log.count("end") == 1


def test_a_monitor_that_has_gone_ends_no_run(client: Client) -> None:
    with Heartbeats({heartbeat.SOCKET: "x"}) as heartbeats:
        client.fails = True
        heartbeats.beat()
        client.fails = False
        heartbeats.beat()
        with heartbeats.paused():
            pass
    assert client.log == ["begin", "end"]


def test_without_the_launcher_there_is_no_link(client: Client) -> None:
    with Heartbeats({}) as heartbeats, heartbeats.paused():
        heartbeats.beat()
    assert client.log == []


def test_a_launcher_of_another_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGE, None)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, f"{PACKAGE}.fault_tolerance", None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="ft_launcher: its package nvidia-resiliency-ext cannot be imported"):
        Heartbeats({heartbeat.SOCKET: "x"})
