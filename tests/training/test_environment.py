"""environment.json: one entry for each start, the state of the checkout, and nothing secret."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megamm.training import environment
from megamm.training.environment import FILE, describe_start, git_state, read_starts, record_start
from tests.dist.harness import run_distributed


def record(folder: str) -> None:
    dist.init_process_group("gloo")
    for step in (0, 30):
        record_start(folder, step, torch.device("cpu"))


def test_every_start_is_added_once_for_all_ranks(tmp_path: Path) -> None:
    run_distributed(2, "tests.training.test_environment:record", {"folder": str(tmp_path)})
    starts = read_starts(tmp_path / FILE)
    assert [start["step"] for start in starts] == [0, 30]
    assert starts[0]["world_size"] == 2
    assert starts[0]["devices"] == {"cpu": 2} and sum(starts[0]["hosts"].values()) == 2
    assert starts[0]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert starts[0]["versions"]["megatron-core"] and starts[0]["command"][0] == sys.executable
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_damaged_file_is_begun_anew(tmp_path: Path) -> None:
    for text in ("[{", '{"a": 1}', "", "[[1], null]"):
        (tmp_path / FILE).write_text(text)
        assert read_starts(tmp_path / FILE) == []


def test_variables_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {
        "NCCL_DEBUG": "INFO",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "n[1-4]",
        "OMP_NUM_THREADS": "3",
    }
    secret = {
        "WANDB_API_KEY": "x",
        "NCCL_AUTH_TOKEN": "x",
        "HF_TOKEN": "x",
        "HOME_OMP_X": "x",
        "SLURM_JWT": "x",
    }
    for name, value in (wanted | secret).items():
        monkeypatch.setenv(name, value)
    variables = describe_start(0, ["here"], ["cpu"])["variables"]
    assert wanted.items() <= variables.items()
    assert not secret.keys() & variables.keys()
    json.dumps(variables)


def test_the_state_of_a_checkout(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e@e"]
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    package = tmp_path / "megamm"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert git_state(package) is None
    git("init", "-q")
    assert git_state(package) is None, "lies in a checkout without being part of it"
    git("add", "megamm")
    git("commit", "-qm", "first")
    (tmp_path / "notes.txt").write_text("none of the code")
    assert git_state(package) == {"revision": git("rev-parse", "HEAD"), "dirty": False}
    (package / "new.py").write_text("")
    assert git_state(package) == {"revision": git("rev-parse", "HEAD"), "dirty": True}


def test_no_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(Path(environment.__file__).parents[1]) is None
