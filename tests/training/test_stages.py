"""Stages one after another, as a user runs them: frozen, partly frozen, new tokens, rates of their own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megamm.config import EMBEDDING, OUTPUT, part_of
from megamm.data.tokenizer import train_tokenizer
from megamm.engine.checkpoint import read_weights, resolve
from megamm.training.logging import read_metrics
from tests.conftest import TEXTS
from tests.data.helpers import VOCAB_SIZE
from tests.training.runs import curve, newest_state, run, write_recipe

FIRST = ["--training.freeze=[vision, language]", "--training.steps=3", "--optimizer.warmup_steps=30"]
SECOND = [
    "--training.freeze=[vision, language]",
    "--training.unfreeze.vision=0",
    "--training.unfreeze.new_tokens=true",
    f"--model.language.vocab_size={VOCAB_SIZE + 2}",
    "--model.language.added_vocab=2",
    "--optimizer.parts=[{part: vision, lr: 0.0002}]",
    "--optimizer.lr=0.002",
    "--training.steps=6",
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, dataset_dir: Path, tokenizer_dir: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), dataset_dir, tokenizer_dir)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> tuple[Path, Path, str]:
    """The run directories of two stages, and what they said."""
    folder = tmp_path_factory.mktemp("stages")
    first, second, log = folder / "first", folder / "second", folder / "log"
    assert run(recipe, log, *FIRST, f"--run_dir={first}") == 0, log.read_text()
    options = [*SECOND, f"--training.init_from={first}", f"--run_dir={second}"]
    assert run(recipe, log, *options) == 0, log.read_text()
    return first, second, log.read_text()


def test_a_warm_up_longer_than_the_run_warns(stages: tuple[Path, Path, str]) -> None:
    first, _, said = stages
    assert "the 30 steps of warm-up do not end before training.steps 3" in said
    rates = [row["lr"] for row in read_metrics(first / "metrics.jsonl")]
    assert rates == pytest.approx([0.001 * step / 30 for step in range(3)])


def test_a_stage_trains_what_it_says_and_says_what_it_does(stages: tuple[Path, Path, str]) -> None:
    first, second, said = stages
    before, after = (read_weights(resolve(run_dir)) for run_dir in (first, second))
    changed = {n for n in before if not torch.equal(before[n], after[n][: len(before[n])])}
    assert {part_of(name) for name in changed} == {"vision", "connector"}
    assert all(".blocks.0." in name for name in changed if part_of(name) == "vision")
    for name in (EMBEDDING, OUTPUT):
        mean = before[name].mean(0)
        assert all(0 < (after[name][row] - mean).abs().max() < 0.02 for row in (VOCAB_SIZE, VOCAB_SIZE + 1))
    for words in (
        f"vocabulary grown from {VOCAB_SIZE} to {VOCAB_SIZE + 2} tokens",
        "trained there: connector; trained here: vision from block 0, connector, language (new tokens)",
        "optimizer: vision: lr 0.0002 to 0; everything else: lr 0.002 to 0, weight decay 0.1",
    ):
        assert words in said, words
    assert [row[0] for row in curve(second)] == list(range(1, 7))
    rates = [row["lr"] for row in read_metrics(second / "metrics.jsonl")]
    assert rates[2] == pytest.approx(0.002)  # behind the warm-up; that of what has none of its own


def test_a_second_stage_goes_on_with_its_own_checkpoints(
    stages: tuple[Path, Path, str], recipe: Path, tmp_path: Path
) -> None:
    """Bit for bit, although the first stage is still named."""
    first, second, _ = stages
    again, log = tmp_path / "again", tmp_path / "log"
    (again / "checkpoints").mkdir(parents=True)
    checkpoint = second / "checkpoints" / "step_00000003"
    shutil.copytree(checkpoint, again / "checkpoints" / checkpoint.name)
    options = [*SECOND, f"--training.init_from={first}", f"--run_dir={again}"]
    assert run(recipe, log, *options) == 0, log.read_text()
    assert "resumed at step 3" in log.read_text() and "weights from" not in log.read_text()
    assert curve(again) == curve(second)[3:]
    wanted, got = newest_state(second), newest_state(again)
    assert [name for name in wanted if not torch.equal(wanted[name], got[name])] == []


def test_keeping_the_optimizer(stages: tuple[Path, Path, str], recipe: Path, tmp_path: Path) -> None:
    """Its moments come along, one step on; a weight that has none is named."""
    second = stages[1]
    log, third = tmp_path / "log", tmp_path / "third"
    keep = [*SECOND, f"--training.init_from={second}", "--training.init_optimizer=keep"]
    # one step of warm-up, whose learning rate is 0: weights stay, moments move by one step
    one = ["--training.steps=1", "--optimizer.warmup_steps=1", "--optimizer.beta2=0.5", "--optimizer.beta1=0"]
    assert run(recipe, log, *keep, *one, f"--run_dir={third}") == 0, log.read_text()
    before, after = newest_state(second), newest_state(third)
    moments = [name for name in before if name.startswith("optimizer.state.exp_avg_sq.")]
    assert moments
    for name in moments:
        gradient = after[name.replace("exp_avg_sq", "exp_avg")]  # beta1 is 0
        torch.testing.assert_close(after[name], 0.5 * before[name] + 0.5 * gradient**2)
    assert "optimizer state of" in log.read_text()
    common = torch.load(resolve(third) / "shards" / "common.pt", weights_only=False)
    assert {group["step"] for group in common["optimizer"]["optimizer"]["param_groups"]} == {7}

    keep[0] = "--training.freeze=[language]"
    del keep[1]
    assert run(recipe, log, *keep, f"--run_dir={tmp_path / 'more'}") == 2
    said = log.read_text().splitlines()
    assert any(
        "its optimizer state does not fit; set training.init_optimizer to reset" in line for line in said
    )
    assert "  vision.class_embedding: there not trained, here trained" in said


def test_another_tokenizer_is_refused(stages: tuple[Path, Path, str], recipe: Path, tmp_path: Path) -> None:
    other = tmp_path / "tokenizer"
    train_tokenizer([text[::-1] for text in TEXTS] * 4, other, 400)
    options = [f"--training.init_from={stages[0]}", f"--tokenizer={other}", f"--run_dir={tmp_path / 'run'}"]
    # (the data of the first stage are none of this tokenizer either, which is noticed earlier)
    assert run(recipe, tmp_path / "log", *FIRST, *options, "--preflight.data=off") == 2
    assert "  token 259: there " in (tmp_path / "log").read_text()
