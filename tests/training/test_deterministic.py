"""training.deterministic: nothing that a run computes is left to chance, or the run says so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megamm import device
from megamm.engine.transformer_config import decoder_config
from megamm.errors import InputError
from tests.dist.tiny import tiny_recipe
from tests.training.runs import assert_same_end, run, write_recipe

NAMES = ("CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO", "NCCL_ALGO")
ON = "--training.deterministic=true"


@pytest.fixture
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's switches and the environment, put back afterwards."""
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = cudnn


def test_what_is_not_deterministic_raises(as_before: None) -> None:
    torch.backends.cudnn.benchmark = True
    device.require_determinism()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.backends.cudnn.benchmark
    assert [os.environ[name] for name in NAMES] == [":4096:8", "0", "Ring"]
    with pytest.raises(RuntimeError, match="deterministic"):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1), accumulate=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [("CUBLAS_WORKSPACE_CONFIG", ":0:0"), ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1"), ("NCCL_ALGO", "NVLS")],
)
def test_an_environment_that_forbids_it_is_an_error(
    name: str, value: str, as_before: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"training.deterministic: {name}={value} is set"):
        device.require_determinism()
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_deterministic_settings_stay(as_before: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    device.require_determinism()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize("wanted", [False, True])
def test_megatron_is_told(wanted: bool) -> None:
    assert (
        decoder_config(tiny_recipe("merged", {"training.deterministic": wanted})).deterministic_mode is wanted
    )


@pytest.mark.parametrize(
    ("assembly", "more"),
    [("merged", ["--data.pack=true"]), ("cross_attention", ["--training.recompute.language=full"])],
)
def test_two_runs_are_equal(
    tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path, assembly: str, more: list[str]
) -> None:
    """Every operation of a run has a deterministic form, also those of packed rows and of the backward
    pass."""
    for name in ("one", "other"):
        folder = tmp_path / name
        folder.mkdir()
        recipe = write_recipe(folder, dataset_dir, tokenizer_dir, assembly)
        assert run(recipe, folder / "log", ON, *more, processes=2) == 0, (folder / "log").read_text()
    assert_same_end(tmp_path / "one" / "run", tmp_path / "other" / "run")
