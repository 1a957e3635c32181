"""Every system through all its stages on the CPU, by the scripts that a user starts, and exported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megamm.cli.entry import main as megamm
from megamm.config import Recipe
from megamm.engine.manifest import resolve
from megamm.engine.weight_files import WeightFiles
from megamm.models.freezing import part_of
from megamm.models.initialization import weight_drawer
from megamm.recipe import load_recipe
from megamm.recipe_checks import trainable_parts
from megamm.training.logging import read_metrics

ROOT = Path(__file__).parents[2]
# system: stages in their order, and the family of the model that comes out
SYSTEMS = {
    "xcomposer_7b": (["pretrain", "instruct"], "xcomposer"),
    "flamingo_65b": (["pretrain", "finetune"], "idefics"),
    "infimm_zephyr_7b": (["pretrain", "multitask", "instruct"], "infimm"),
    "infimm_llama2_13b": (["pretrain", "multitask", "instruct"], "infimm"),
    "infimm_vicuna_13b": (["pretrain", "multitask", "instruct"], "infimm"),
    "llava15_13b": (["pretrain", "instruct"], "llava"),
}
# A few steps at the preset's peak rate, without what takes a while to start.
FAST = [
    *["--training.steps=16", "--optimizer.warmup_steps=1", "--optimizer.decay_steps=40"],
    *["--checkpoint.interval=0", "--validation.interval=0"],
    *["--log.tensorboard=false", "--data.image.loader=pillow"],
]


def workplace(folder: Path) -> Path:
    """A repository whose `runs` is its own, and whose environment is the one that is running."""
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "tools").mkdir()
    (folder / "tools" / "bootstrap.sh").write_text("")
    return folder


def by_script(folder: Path, system: str, stage: str) -> None:
    """As a user starts a stage, in two processes."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PROCESSES_PER_NODE": "2",
    }
    command = ["bash", f"examples/{system}/{stage}.sh", "--preset", "tiny"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def in_this_process(folder: Path, system: str, stage: str) -> None:
    """The same without starting Python each time, with a few steps in one process."""
    assert megamm(["train", f"examples/{system}/{stage}.yaml", "--preset", "tiny", *FAST]) == 0


def is_frozen(recipe: Recipe, name: str) -> bool:
    """Whether a weight lies in a part that the stage freezes, and not in blocks that are trained still."""
    part, unfreeze = part_of(name), recipe.training.unfreeze
    if part not in recipe.training.freeze:
        return False
    first = {"vision": unfreeze.vision, "language": unfreeze.language}.get(part)
    if first is None:
        return True
    block = re.search(r"\.(?:blocks|layers)\.(\d+)\.", name)
    return int(block[1]) < first if block else "norm" not in name and "output_layer" not in name


def check_weights(
    recipe: Recipe, before: Callable[[str, tuple[int, ...]], torch.Tensor], after: WeightFiles
) -> None:
    """Frozen weights are what they were, bit for bit; something was learnt in every part that is trained."""
    added = recipe.model.language.added_vocab if recipe.training.unfreeze.new_tokens else 0
    changed, num_frozen = set(), 0
    for name in after:
        old, new = before(name, after.shape(name)), after[name]
        if is_frozen(recipe, name):
            if added and name.endswith(("word_embeddings.weight", "output_layer.weight")):
                old, new = old[:-added], new[:-added]
            assert torch.equal(old, new), name
            num_frozen += 1
        elif not torch.equal(old, new):
            changed.add(part_of(name))
    assert num_frozen > 10
    assert changed == set(trainable_parts(recipe))


def check_export(system: str, family: str, folder: Path) -> None:
    """The run becomes a directory of its family, and that the same weights again."""
    run, exported, imported = folder / "runs/tiny" / system, folder / "exported", folder / "imported"
    last = sorted(run.iterdir(), key=lambda path: path.stat().st_mtime)[-1]
    main = ["convert", "export", "--checkpoint", str(last), "--out", str(exported), "--family", family]
    assert megamm(main) == 0
    assert megamm(["convert", "import", "--from", str(exported), "--out", str(imported)]) == 0
    ours, theirs = weights(last), weights(imported)
    assert set(ours) == set(theirs)
    for name in ours:
        old, new = ours[name], theirs[name]
        if family == "xcomposer" and name.endswith(("word_embeddings.weight", "output_layer.weight")):
            old, new = old[:-1], new[:-1]  # it has no place for `<image>`
        assert torch.equal(old, new), name


def weights(run: Path) -> WeightFiles:
    return WeightFiles(resolve(run) / "shards")


def run_system(folder: Path, system: str, run_stage: Callable[[Path, str, str], None], share: float) -> None:
    """All stages, each from the weights of the one before; the loss falls below `share` of the first one."""
    stages, family = SYSTEMS[system]
    workplace(folder)
    before = None
    for stage in stages:
        run_stage(folder, system, stage)
        run = folder / "runs/tiny" / system / stage
        recipe = load_recipe(run / "recipe.yaml")
        assert recipe.stage == stage and recipe.run_dir == f"runs/tiny/{system}/{stage}"
        losses = [row["loss"] for row in read_metrics(run / "metrics.jsonl")]
        quarter = len(losses) // 4
        assert len(losses) == recipe.training.steps
        assert sum(losses[-quarter:]) / quarter < share * losses[0], losses
        log = (run / "log.txt").read_text()
        if before is None:
            assert "weights from" not in log
            drawn = weight_drawer(recipe.model, recipe.seed)
        else:
            assert f"weights from runs/tiny/{system}/{before}/checkpoints/" in log
            earlier = weights(run.parent / before)
            drawn = lambda name, shape, earlier=earlier: earlier[name]  # noqa: E731
        check_weights(recipe, drawn, weights(run))
        before = stage
    check_export(system, family, folder)


def test_these_are_all_systems() -> None:
    found = {path.name for path in (ROOT / "examples").iterdir() if (path / "pretrain.sh").is_file()}
    assert found == set(SYSTEMS)
    for system, (stages, _) in SYSTEMS.items():
        assert {path.stem for path in (ROOT / "examples" / system).glob("*.yaml")} == set(stages)


# InfiMM on Vicuna differs from that on LLaMA 2 in the chat template alone, which is also that of llava15_13b.
@pytest.mark.parametrize(
    "system",
    [
        pytest.param(system, marks=pytest.mark.slow if system == "infimm_vicuna_13b" else ())
        for system in SYSTEMS
    ],
)
def test_stages_hand_over(system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    make = [sys.executable, str(ROOT / "examples/tiny/make.py"), system]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(make, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=200)
    monkeypatch.chdir(tmp_path)
    run_system(tmp_path, system, in_this_process, share=0.97)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("system", SYSTEMS)
def test_systems_learn(system: str, tmp_path: Path) -> None:
    """The preset as it stands, in two processes."""
    pytest.importorskip("sklearn")
    run_system(tmp_path, system, by_script, share=0.85)
