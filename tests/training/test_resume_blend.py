"""The training command over several datasets whose rows have different lengths: killed, resumed, reported."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import yaml

from megamm.engine.manifest import list_checkpoints, read_manifest
from megamm.training.metrics import read_metrics
from tests.data.helpers import entry, prepared
from tests.training.runs import STEPS, curve, kill, newest_state, run, start, wait_for_step, write_recipe


def blend_recipe(folder: Path, mixed: Path, text: Path, tokenizer: Path) -> Path:
    """Mixed samples in rows of 128 and text in rows of 64; the samples of one step are of one kind."""
    path = write_recipe(folder, mixed, tokenizer, "cross_attention")
    recipe = yaml.safe_load(path.read_text())
    sources = [{"path": str(mixed), "weight": 2}, {"path": str(text), "weight": 1, "sequence_length": 64}]
    for source, name in zip(sources, ("mixed", "text"), strict=True):
        source["name"] = name
    recipe["data"] |= {"train": sources, "pure_batches": True}
    recipe["preflight"] = {"data": "warn"}  # in 64 positions little more than the system message fits
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def text_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    entries = [entry(i, None, f"Number {i}?", "It is. " * (1 + i % 4)) for i in range(30)]
    return prepared(tmp_path_factory.mktemp("text"), entries, tokenizer_dir, []).out


def test_a_killed_run_over_two_lengths_ends_bitwise_equal(
    tmp_path: Path, dataset_dir: Path, text_dir: Path, tokenizer_dir: Path
) -> None:
    recipes = []
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
        recipes.append(blend_recipe(tmp_path / name, dataset_dir, text_dir, tokenizer_dir))
    one, two = tmp_path / "straight" / "run", tmp_path / "killed" / "run"
    log = tmp_path / "log"
    assert run(recipes[0], log) == 0, log.read_text()
    process = start(recipes[1], log)
    try:
        wait_for_step(two, random.SystemRandom().randint(1, STEPS - 1), process)
    finally:
        kill(process)
    assert run(recipes[1], log) == 0, log.read_text()

    a, b = newest_state(one), newest_state(two)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert curve(one) == curve(two)
    rows = list(read_metrics(one / "metrics.jsonl"))
    assert {row["sequence_length"] for row in rows} == {64, 128}
    assert all(row["num_tokens"] == 8 * row["sequence_length"] for row in rows)
    assert any(row["num_images"] == 0 for row in rows if row["sequence_length"] == 128), "text of mixed"
    manifest = read_manifest(list_checkpoints(two / "checkpoints")[0])
    assert sum(manifest.data_position) == manifest.consumed_samples == 8 * STEPS
    assert [source["source"] for source in manifest.data_sources] == ["mixed", "mixed", "text"]
    text = log.read_text()
    assert "data: text: 30 samples of text alone, at most 64 positions, 33.3% of what is trained on" in text
    assert "about 1.07 epochs, in steps of group 2 of 3" in text  # 12 steps x 8 / 3 of 30

    more = ["--training.steps=20", f"--run_dir={two}"]
    other = json.dumps([{"path": str(dataset_dir), "name": "mixed"}])
    assert run(recipes[0], tmp_path / "other", *more, f"--data.train={other}") == 2
    assert "data.train: the run was trained on text too" in (tmp_path / "other").read_text()


def test_a_packed_run_over_two_lengths_goes_on_in_a_pipeline(
    tmp_path: Path, dataset_dir: Path, text_dir: Path, tokenizer_dir: Path
) -> None:
    """Tensors between the stages have the length of the step; so have those that only one rank reads."""
    recipe = blend_recipe(tmp_path, dataset_dir, text_dir, tokenizer_dir)
    log, one, two = tmp_path / "log", tmp_path / "one", tmp_path / "two"
    packed = ["--data.pack=true", f"--optimizer.decay_steps={STEPS}"]
    assert run(recipe, log, *packed, f"--run_dir={one}") == 0, log.read_text()
    packed += [f"--run_dir={two}"]
    assert run(recipe, log, *packed, "--training.steps=5") == 0, log.read_text()
    assert run(recipe, log, *packed, "--parallel.pipeline=2", processes=2) == 0, log.read_text()
    for straight, resumed in zip(curve(one), curve(two), strict=True):
        assert straight[:2] == resumed[:2] and resumed == pytest.approx(straight, rel=1e-4)
    assert {row["sequence_length"] for row in read_metrics(two / "metrics.jsonl")} == {64, 128}
