"""megamm train from the outside: what it writes, and what it says to bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from megamm.engine.checkpoint import read_weights, resolve, write_weights
from megamm.engine.manifest import list_checkpoints, verify
from megamm.inference import load
from megamm.recipe import load_recipe
from megamm.training.environment import read_starts
from tests.training.runs import STEPS, curve, run, write_recipe


@pytest.mark.parametrize(
    "layout",
    [
        "--parallel.tensor=2 --parallel.sequence=true",
        "--parallel.pipeline=2",
        "--parallel.context=2",
        "--parallel.tensor=1",
    ],
    ids=["tensor", "pipeline", "context", "data"],
)
def test_layouts_train_alike(layout: str, tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path) -> None:
    """Two processes follow the curve of one."""
    recipe = write_recipe(tmp_path, dataset_dir, tokenizer_dir, "cross_attention")
    steps = "--training.steps=4"
    one, two = f"--run_dir={tmp_path / 'one'}", f"--run_dir={tmp_path / 'two'}"
    assert run(recipe, tmp_path / "log", steps, one) == 0, (tmp_path / "log").read_text()
    code = run(recipe, tmp_path / "log", steps, two, *layout.split(), processes=2, fresh="tensor=2" in layout)
    assert code == 0, (tmp_path / "log").read_text()
    for single, several in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert several == pytest.approx(single, rel=1e-4)


def test_a_run_leaves_what_it_promises(tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path) -> None:
    recipe = write_recipe(tmp_path, dataset_dir, tokenizer_dir)
    run_dir = tmp_path / "run"
    overrides = ["--checkpoint.keep=2", "--log.tensorboard=true", "--training.precision=bf16"]
    assert run(recipe, tmp_path / "log", *overrides, fresh=True) == 0, (tmp_path / "log").read_text()
    assert [c.name for c in list_checkpoints(run_dir / "checkpoints")] == ["step_00000012", "step_00000009"]
    manifest = verify(run_dir / "checkpoints" / "step_00000012")
    assert (manifest.step, manifest.consumed_samples) == (STEPS, STEPS * 8)
    assert curve(run_dir)[-1][2] < curve(run_dir)[0][2], "the loss must fall"
    assert list((run_dir / "tensorboard").iterdir()) and (run_dir / "recipe.yaml").exists()
    (started,) = read_starts(run_dir / "environment.json")
    assert started["step"] == 0 and "--checkpoint.keep=2" in started["command"]
    log = (tmp_path / "log").read_text()
    assert "Warning" not in log and "step 12/12" in log
    assert load(run_dir).recipe.training.precision == "bf16"


def test_a_stage_starts_from_the_weights_of_another(
    tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path
) -> None:
    """In bf16 the optimizer has fp32 copies of its own: they must come from the loaded weights too."""
    recipe = write_recipe(tmp_path, dataset_dir, tokenizer_dir)
    log, first, second = tmp_path / "log", tmp_path / "first", tmp_path / "second"
    bf16 = "--training.precision=bf16"
    assert run(recipe, log, bf16, "--training.steps=3", f"--run_dir={first}") == 0, log.read_text()
    # one step of warm-up, whose learning rate is 0
    stage = [f"--training.init_from={first}", "--training.steps=1", "--optimizer.warmup_steps=1", "--seed=9"]
    assert run(recipe, log, bf16, *stage, f"--run_dir={second}") == 0, log.read_text()
    before, after = (read_weights(resolve(run_dir)) for run_dir in (first, second))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name

    imported = tmp_path / "imported"
    weights_only = imported / "checkpoints" / "step_00000003"
    weights_only.parent.mkdir(parents=True)
    write_weights(weights_only, before, load_recipe(recipe), tokenizer_dir)
    assert run(recipe, log, bf16, f"--run_dir={imported}") == 2
    assert f"{weights_only}: holds weights without optimizer state" in log.read_text()

    assert run(recipe, log, bf16, "--resume.enabled=false", f"--run_dir={first}") == 2
    assert "has checkpoints of an earlier run" in log.read_text()


def test_samples_that_are_cut_are_counted(tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path) -> None:
    recipe = write_recipe(tmp_path, dataset_dir, tokenizer_dir)
    log = tmp_path / "log"
    overrides = ["--training.steps=2", "--data.sequence_length=60", "--preflight.data=warn"]
    assert run(recipe, log, *overrides) == 0, log.read_text()
    assert "nothing is learnt in any of" in log.read_text()  # but it is only a warning
    assert re.search(
        r"\d+ of \d+ samples read were cut, being longer than data.sequence_length 60", log.read_text()
    )


@pytest.mark.parametrize(
    "overrides, processes, words",
    [
        (["--training.stepz=3"], 1, ["training.stepz", "training.steps"]),
        (["--parallel.tensor=3"], 1, ["parallel.tensor", "3"]),
        (["--parallel.tensor=2"], 1, ["parallel.tensor"]),
        (["--data.train=/nowhere"], 2, ["/nowhere"]),
        (["--training.init_from=/nowhere"], 1, ["training.init_from: /nowhere: no checkpoint here"]),
        (["--model.language.vocab_size=100"], 1, ["model.language.vocab_size", "tokenizer"]),
    ],
)
def test_bad_recipes_get_one_sentence(
    overrides: list[str],
    processes: int,
    words: list[str],
    tmp_path: Path,
    dataset_dir: Path,
    tokenizer_dir: Path,
) -> None:
    recipe = write_recipe(tmp_path, dataset_dir, tokenizer_dir)
    code = run(recipe, tmp_path / "log", *overrides, processes=processes, timeout=100, fresh=processes > 1)
    log = (tmp_path / "log").read_text()
    said = [line for line in log.splitlines() if line.startswith("megamm: ")]
    assert len(said) == 1, log
    assert all(word in said[0] for word in words), said
    assert not (tmp_path / "run" / "checkpoints").exists()
    if processes == 1:  # torchrun has an exit code of its own
        assert code == 2 and "Traceback" not in log


def test_bad_images_are_replaced_counted_and_recorded(
    tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path, image_folder: Path
) -> None:
    from tests.data.helpers import conversations, prepared, write_images

    folder = tmp_path / "pictures"
    folder.mkdir()
    names = write_images(folder, 12)
    dataset = prepared(tmp_path / "data", conversations(names, 48), tokenizer_dir, [folder]).out
    broken = folder / names[3]
    broken.write_bytes(broken.read_bytes()[:60] + b"\0" * 40)  # after the index was made
    recipe = write_recipe(tmp_path, dataset, tokenizer_dir)
    assert run(recipe, tmp_path / "log", "--data.max_bad_images=0.5") == 0, (tmp_path / "log").read_text()
    rows = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert rows and all(names[3] in json.dumps(row) for row in rows)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["skipped_samples"] > 0 and len(metrics) == STEPS
    # judged after the first hundred samples, which are more than twelve steps
    more = [f"--run_dir={tmp_path / 'b'}", "--data.max_bad_images=0.01", "--training.steps=20"]
    assert run(recipe, tmp_path / "log", *more) == 1
    assert "data.max_bad_images" in (tmp_path / "log").read_text()
