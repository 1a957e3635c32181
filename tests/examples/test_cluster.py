"""The scripts that start stages on clusters, run on this machine: Slurm's commands are stand-ins that start
the tasks of two "nodes" here, torchrun is the real one."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megamm.engine.launcher import take_place_from_slurm
from megamm.errors import InputError
from megamm.training.stopping import STOPPED
from tests.training.runs import STEPS, assert_same_end, curve, kill, run, start, wait_for_step, write_recipe

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "examples" / "cluster"
STAND_INS = Path(__file__).parent / "slurm"
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, dataset_dir: Path, tokenizer_dir: Path) -> Path:
    """Run directory of two processes that torchrun started."""
    folder = tmp_path_factory.mktemp("straight")
    recipe = write_recipe(folder, dataset_dir, tokenizer_dir)
    assert run(recipe, folder / "log", processes=2, fresh=True) == 0, (folder / "log").read_text()
    return folder / "run"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def environment(**more: object) -> dict[str, str]:
    """For a script: this Python's commands first on the PATH, no launcher around it."""
    own = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    path = os.pathsep.join([str(STAND_INS), str(Path(sys.executable).parent), own["PATH"]])
    own |= {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return own | {name: str(value) for name, value in more.items()}


def stage_script(folder: Path, recipe: Path) -> Path:
    """What examples/SYSTEM/STAGE.sh is, for a recipe of the test."""
    script = folder / "stage.sh"
    script.write_text(f'#!/usr/bin/env bash\nexec bash "{CLUSTER}/launch.sh" "{recipe}" "$@"\n')
    return script


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


def test_torchrun_ends_as_the_run_does(tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path) -> None:
    """Wrong input on two ranks: no traceback of torchrun's buries the sentence, and the exit code is kept."""
    stage = stage_script(tmp_path, write_recipe(tmp_path, dataset_dir, tokenizer_dir))
    done = subprocess.run(
        ["bash", stage, f"--training.init_from={tmp_path / 'none'}"],
        env=environment(PROCESSES_PER_NODE=2),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert f"megamm: training.init_from: {tmp_path / 'none'}: no checkpoint here" in done.stderr
    assert "Traceback" not in done.stderr and "FAILED" not in done.stderr


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([69, -9], 69),
        ([-9, -15], 69),
        ([75, -15], 75),
        ([69, 2], 2),
        ([-15, 1], 1),
        ([69, 70, -6], 70),
        ([0, -11], 69),
        ([-15, 130], 130),
    ],
)
def test_the_exit_code_of_many(codes: list[int], code: int) -> None:
    """What would end the same way again, or was asked for, decides; else that a rank was lost."""
    path = CLUSTER / "torchrun.py"
    spec = importlib.util.spec_from_file_location("cluster_torchrun", path)
    assert spec is not None and spec.loader is not None
    launcher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)
    assert launcher.verdict(codes) == code


def test_ctrl_c_ends_torchrun_and_its_ranks(tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path) -> None:
    stage = stage_script(tmp_path, write_recipe(tmp_path, dataset_dir, tokenizer_dir))
    variables = environment(PROCESSES_PER_NODE=2)
    with (tmp_path / "log").open("wb") as log:
        command = ["bash", stage, "--training.steps=100000"]
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for_step(tmp_path / "run", 2, process)
        ranks = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        assert process.wait(60) == 130, (tmp_path / "log").read_text()
        assert not psutil.wait_procs(ranks, timeout=10)[1]
    finally:
        kill(process)
    assert "Traceback" not in (tmp_path / "log").read_text()


@contextlib.contextmanager
def two_machines(folder: Path, recipe: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A launcher for each of two "machines" with one process each, which find each other."""
    stage = stage_script(folder, recipe)
    variables = environment(NNODES=2, PROCESSES_PER_NODE=1, RDZV_ENDPOINT=f"localhost:{free_port()}")
    with (folder / "log").open("wb") as log:
        machines = [
            subprocess.Popen(["bash", stage], env=variables, stdout=log, stderr=log, start_new_session=True)
            for _ in range(2)
        ]
    try:
        yield machines
    finally:
        for machine in machines:
            kill(machine)


def test_two_machines_without_slurm(
    tmp_path: Path, uninterrupted: Path, dataset_dir: Path, tokenizer_dir: Path
) -> None:
    with two_machines(tmp_path, write_recipe(tmp_path, dataset_dir, tokenizer_dir)) as machines:
        assert [machine.wait(120) for machine in machines] == [0, 0], (tmp_path / "log").read_text()
    assert_same_end(uninterrupted, tmp_path / "run")


@pytest.mark.faults
@pytest.mark.parametrize("machine", [0, 1])
def test_a_rank_of_two_machines_is_killed(
    tmp_path: Path, uninterrupted: Path, dataset_dir: Path, tokenizer_dir: Path, machine: int
) -> None:
    """The launchers need not count the same restarts."""
    with two_machines(tmp_path, write_recipe(tmp_path, dataset_dir, tokenizer_dir)) as machines:
        for step in (3, 7):
            wait_for_step(tmp_path / "run", step, machines[machine])
            children = psutil.Process(machines[machine].pid).children(recursive=True)
            (rank,) = [
                child for child in children if "train" in child.cmdline() and "RANK" in child.environ()
            ]
            rank.kill()
            psutil.wait_procs([rank], timeout=10)
        assert [one.wait(200) for one in machines] == [0, 0], (tmp_path / "log").read_text()[-5000:]
    assert_same_end(uninterrupted, tmp_path / "run")


def test_one_rank_is_told_and_all_stop(
    tmp_path: Path, uninterrupted: Path, dataset_dir: Path, tokenizer_dir: Path
) -> None:
    """SIGTERM to rank 1 alone: both ranks end after the same step, with one checkpoint."""
    recipe = write_recipe(tmp_path, dataset_dir, tokenizer_dir)
    process = start(recipe, tmp_path / "log", "--checkpoint.interval=0", processes=2, fresh=True)
    try:
        wait_for_step(tmp_path / "run", 3, process)
        ranks = [child for child in psutil.Process(process.pid).children() if child.environ()["RANK"] == "1"]
        ranks[0].terminate()
        assert process.wait(60) != 0  # torchrun's own code for workers that did not finish
    finally:
        kill(process)
    assert "SIGTERM: stopped after step" in (tmp_path / "run" / "log.txt").read_text()
    assert len(list((tmp_path / "run" / "checkpoints").glob("step_*"))) == 1
    assert run(recipe, tmp_path / "log", processes=2, fresh=True) == 0, (tmp_path / "log").read_text()
    assert_same_end(uninterrupted, tmp_path / "run")


def test_one_process_says_that_it_was_stopped(tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path) -> None:
    recipe = write_recipe(tmp_path, dataset_dir, tokenizer_dir)
    process = start(
        recipe, tmp_path / "log", "--training.steps=100000", "--checkpoint.interval=0", fresh=True
    )
    try:
        wait_for_step(tmp_path / "run", 2, process)
        process.terminate()
        assert process.wait(60) == STOPPED
    finally:
        kill(process)


@pytest.mark.parametrize(
    ("arguments", "variables", "sentence"),
    [
        ([], {}, "launch.sh RECIPE"),
        (["no.yaml"], {}, "no.yaml: no such recipe"),
        (["RECIPE"], {}, "no GPU is here; add --preset tiny"),
        (["RECIPE"], {"NNODES": 2, "PROCESSES_PER_NODE": 1}, "RDZV_ENDPOINT: not set"),
        (["RECIPE"], {"CLUSTER_ENV": "env_x.sh"}, "CLUSTER_ENV: env_x.sh is not a file"),
    ],
)
def test_what_cannot_start_says_why(
    tmp_path: Path, arguments: list[str], variables: dict[str, object], sentence: str
) -> None:
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")  # a machine without a GPU
    (tmp_path / "nvidia-smi").chmod(0o755)
    given = [str(tmp_path / "recipe.yaml") if a == "RECIPE" else a for a in arguments]
    blank = environment(**variables)
    blank["PATH"] = f"{tmp_path}{os.pathsep}{blank['PATH']}"
    done = subprocess.run(
        ["bash", CLUSTER / "launch.sh", *given], env=blank, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and sentence in done.stderr


@pytest.mark.parametrize("gpu", ["a100", "h100"])
def test_settings_can_be_read_and_yours_win(gpu: str) -> None:
    script = f'set -eu; . "{CLUSTER}/env_{gpu}.sh"; env'
    done = subprocess.run(
        ["bash", "-c", script],
        env={"PATH": os.environ["PATH"], "NCCL_DEBUG": "INFO", "CLUSTER_IB_HCA": "=mlx5_0"},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    values = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert (values["NCCL_DEBUG"], values["NCCL_IB_HCA"], values["NCCL_IB_TIMEOUT"]) == (
        "INFO",
        "=mlx5_0",
        "22",
    )
    assert ("NCCL_NVLS_ENABLE" in values) == (gpu == "h100")


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


# --- tools/install_gpu.sh -----------------------------------------------------------------------------------


def test_gpu_packages_come_in_order(tmp_path: Path) -> None:
    """With stand-ins for a Python whose torch has CUDA 13, and for its compiler."""
    python, nvcc = tmp_path / "python", tmp_path / "nvcc"
    python.write_text('#!/bin/sh\ncase "$2" in *version.cuda*) echo 13.0 ;; *) echo 2.11.0+cu130 ;; esac\n')
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    for stand_in in (python, nvcc):
        stand_in.chmod(0o755)
    command = ["bash", str(ROOT / "tools" / "install_gpu.sh"), "--apex", "--dry-run"]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    variables = {"PATH": path, "PYTHON": str(python)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=True)
    installs = done.stdout.splitlines()
    order = ["ninja", "flash-attn", "transformer-engine[core_cu13,pytorch]", "github.com/NVIDIA/apex"]
    assert len(installs) == 4 and all(name in line for name, line in zip(order, installs, strict=True))
    # what is compiled sees the torch that is there, and cannot replace it
    assert all("--no-build-isolation torch==2.11.0+cu130" in line for line in installs[1:])
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.1'\n")
    other = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    assert other.returncode == 2 and "nvcc is of CUDA 12.8 and torch of CUDA 13.0" in other.stderr
