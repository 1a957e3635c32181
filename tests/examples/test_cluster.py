"""The scripts that start stages without Slurm, on one machine and on two; their settings."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megamm.parity.processes import free_port
from megamm.training.stopping import STOPPED
from tests.examples.stages import CLUSTER, ROOT, environment, stage_script
from tests.training.runs import assert_same_end, kill, run, start, wait_for_step, write_recipe


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
