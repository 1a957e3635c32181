"""Stages as Slurm jobs: when a job comes back, and what its tasks are."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megamm.engine.launcher import take_place_from_slurm
from megamm.errors import InputError
from megamm.parity.processes import free_port
from megamm.training.stopping import STOPPED
from tests.examples.stages import CLUSTER, environment, stage_script
from tests.training.runs import STEPS, assert_same_end, curve, kill, wait_for_step, write_recipe


class Job:
    """A Slurm job of two nodes with one task each."""

    def __init__(self, folder: Path, recipe: Path) -> None:
        self.srun_log, self.scontrol_log, self.log = (folder / name for name in ("srun", "scontrol", "log"))
        self.stage = stage_script(folder, recipe)
        self.environment = environment(
            SLURM_JOB_ID=4711,
            SLURM_NNODES=2,
            SLURM_NTASKS_PER_NODE=1,
            SLURM_JOB_NODELIST="node[1-2]",
            SLURM_SUBMIT_DIR=folder,
            SRUN_LOG=self.srun_log,
            SCONTROL_LOG=self.scontrol_log,
            MASTER_PORT=free_port(),
        )

    @property
    def losses(self) -> Path:
        """Where the job counts lost ranks."""
        return Path(self.environment["SLURM_SUBMIT_DIR"]) / ".megamm-losses-4711"

    @property
    def returns(self) -> int:
        """How often it went back into the queue."""
        return self.scontrol_log.read_text().count("requeue 4711") if self.scontrol_log.exists() else 0

    def attempt(self, commands: str, seconds: int = 0) -> int:
        """The exit code of the job with `commands` in place of a stage, begun so many seconds ago."""
        self.stage.write_text(f"{commands}\n")
        self.environment["SECONDS"] = str(seconds)  # which bash goes on counting from
        with self.started() as process:
            return process.wait(30)

    @contextlib.contextmanager
    def started(self, *overrides: str) -> Iterator[subprocess.Popen[bytes]]:
        command = ["bash", str(CLUSTER / "train.sbatch"), str(self.stage), *overrides]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            yield process
        finally:
            kill(process)


def test_a_slurm_job_of_two_nodes(
    tmp_path: Path, uninterrupted: Path, dataset_dir: Path, tokenizer_dir: Path
) -> None:
    """The time of the job is over (USR1) in the middle: the run saves, the job requeues itself, goes on, and
    ends as one that was never stopped."""
    job = Job(tmp_path, write_recipe(tmp_path, dataset_dir, tokenizer_dir))
    with job.started("--checkpoint.interval=0") as process:
        wait_for_step(tmp_path / "run", STEPS // 2, process)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == 0, job.log.read_text()
    assert "show hostnames node[1-2]" in job.scontrol_log.read_text()
    assert "requeue 4711" in job.scontrol_log.read_text()
    stopped_after = curve(tmp_path / "run")[-1][0]
    assert STEPS // 2 <= stopped_after < STEPS
    assert f"SIGUSR1: stopped after step {stopped_after}, saved" in (tmp_path / "run" / "log.txt").read_text()
    with job.started("--checkpoint.interval=0") as process:
        assert process.wait(120) == 0, job.log.read_text()
    assert f"resumed at step {stopped_after}" in (tmp_path / "run" / "log.txt").read_text()
    assert_same_end(uninterrupted, tmp_path / "run")
    calls = job.srun_log.read_text().splitlines()
    assert len(calls) == 2 and all("--kill-on-bad-exit=1" in call for call in calls)
    assert job.scontrol_log.read_text().count("requeue") == 1


def test_a_failed_job_stays_failed(tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path) -> None:
    job = Job(tmp_path, write_recipe(tmp_path, dataset_dir, tokenizer_dir))
    with job.started("--training.global_batch_size=9", "--training.micro_batch_size=9") as process:
        assert process.wait(60) == 2, job.log.read_text()
    assert "training.global_batch_size: 9 is not a multiple" in job.log.read_text()
    assert "requeue" not in job.scontrol_log.read_text()


@pytest.mark.parametrize(
    ("end", "returns"),
    [
        ("exit 69", True),
        ("exit 70", True),
        ("kill -9 $$", True),
        ("exit 139", True),
        ("exit 1", False),
        ("exit 2", False),
        ("exit 75", False),  # a signal that was not Slurm's
        ("exit 130", False),
        ("exit 0", False),
    ],
)
def test_jobs_come_back_after_what_that_cures(tmp_path: Path, end: str, returns: bool) -> None:
    job = Job(tmp_path, tmp_path / "recipe.yaml")
    code = job.attempt(end)
    assert job.returns == returns, job.log.read_text()
    assert code == (0 if returns else int(end.removeprefix("exit ")))
    assert (job.losses.read_text().strip() if job.losses.exists() else None) == ("1" if returns else None)


def test_a_job_that_always_fails_ends(tmp_path: Path) -> None:
    """After MAX_REQUEUES losses in a row; an attempt that lasts, or ends for time, begins a new row."""
    job = Job(tmp_path, tmp_path / "recipe.yaml")
    job.environment |= {"MAX_REQUEUES": "2", "SLURM_RESTART_COUNT": "99"}
    lost, stopped = "exit 69", "trap : USR1; kill -USR1 $PPID; sleep 0.5; exit 75"
    ends = [(lost, 0), (lost, 0), (stopped, 0), (lost, 0), (lost, 0), (stopped, 0), (lost, 0), (lost, 0)]
    for number, (end, seconds) in enumerate([*ends, (lost, 3600), (lost, 0)], 1):
        assert job.attempt(end, seconds) == 0, job.log.read_text()
        assert job.returns == number
    assert job.attempt(lost) == 69
    assert "3 times in a row (MAX_REQUEUES is 2)" in job.log.read_text()
    assert job.returns == number and not job.losses.exists()


def test_a_cancelled_job_does_not_come_back(tmp_path: Path) -> None:
    """Neither if its ranks saved, nor if they died of the signal."""
    for end in ("exit 75", "trap - TERM; kill -TERM $BASHPID"):
        folder = tmp_path / end[0]
        folder.mkdir()
        job = Job(folder, folder / "recipe.yaml")
        job.stage.write_text(f"trap '{end}' TERM\ntouch {folder}/ready\nwhile :; do sleep 0.1; done\n")
        with job.started() as process:
            while not (folder / "ready").exists():
                assert process.poll() is None, job.log.read_text()
            process.terminate()
            assert process.wait(30) in (STOPPED, 143)
        assert not job.scontrol_log.exists(), job.log.read_text()


@pytest.mark.faults
def test_a_job_whose_rank_is_killed_comes_back(
    tmp_path: Path, uninterrupted: Path, dataset_dir: Path, tokenizer_dir: Path
) -> None:
    job = Job(tmp_path, write_recipe(tmp_path, dataset_dir, tokenizer_dir))
    with job.started() as process:
        wait_for_step(tmp_path / "run", 5, process)
        tasks = [
            task for task in psutil.Process(process.pid).children(recursive=True) if "train" in task.cmdline()
        ]
        max(tasks, key=lambda task: task.pid).kill()
        assert process.wait(60) == 0, job.log.read_text()
    assert "requeue 4711" in job.scontrol_log.read_text(), job.log.read_text()
    with job.started() as process:
        assert process.wait(120) == 0, job.log.read_text()
    assert_same_end(uninterrupted, tmp_path / "run")


def test_the_job_script_passes_shellcheck() -> None:
    assert shutil.which("shellcheck"), "the extra [dev] brings it"
    subprocess.run(["shellcheck", CLUSTER / "train.sbatch"], check=True, timeout=60)
    assert os.access(CLUSTER / "train.sbatch", os.X_OK)


# --- places of Slurm's tasks --------------------------------------------------------------------------------

TASK = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
}


def test_a_task_takes_its_place() -> None:
    found = {**TASK, "MASTER_ADDR": "node1"}
    take_place_from_slurm(found)
    assert {name: found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")} == {
        "RANK": "11",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "3",
        "LOCAL_WORLD_SIZE": "8",
    }


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "16"},  # the batch script itself
        {**TASK, "SLURM_STEP_NUM_TASKS": "1"},
        {**TASK, "RANK": "2", "WORLD_SIZE": "4"},  # torchrun within a step
    ],
)
def test_others_keep_theirs(given: dict[str, str]) -> None:
    found = dict(given)
    take_place_from_slurm(found)
    assert found == given


def test_tasks_that_cannot_meet_say_so() -> None:
    with pytest.raises(InputError, match="MASTER_ADDR: not set"):
        take_place_from_slurm(dict(TASK))
