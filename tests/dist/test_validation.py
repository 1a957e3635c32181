"""Held-out loss and answers are the same in every layout, and training does not notice them in any."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megamm.data.questions import iter_questions
from megamm.engine import groups
from megamm.inference import load
from tests.data.helpers import entry, write_images
from tests.dist.harness import run_distributed
from tests.training.runs import curve, newest_state, write_recipe

KINDS = ("merged", "cross_attention")
PACKED = ["data.pack=true", "data.sequence_length=256", "training.micro_batch_size=2"]
# Three micro-batches do not divide by two data-parallel ranks, nor by two pipeline stages; of three
# ranks, two read two of four micro-batches each.
LAYOUTS = {
    "DP3": ["validation.batches=4", "training.global_batch_size=12"],
    "TP2-SP": ["parallel.tensor=2", "parallel.sequence=true"],
    "PP2xVPP2": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
}
MORE_LAYOUTS = {
    "DP2": [],
    "DP2-packed": PACKED,
    "PP2": ["parallel.pipeline=2"],
    "CP2": ["parallel.context=2"],
}


def look(recipes: dict[str, str], overrides: list[str]) -> dict[str, Any]:
    """For each kind, the held-out loss and what the model answers, twice: nothing may be left of a look."""
    from megamm.engine.weights import initialize
    from megamm.recipe import load_recipe
    from megamm.training.setup import build_session
    from megamm.training.validation import Validation, evaluation_mode
    from tests.dist.tiny import draw_visible

    found: dict[str, Any] = {}
    for kind, path in recipes.items():
        recipe = load_recipe(Path(path), overrides)
        session = build_session(recipe, lambda _: None)
        initialize(session.models, draw_visible(recipe))
        validation = Validation(session, None)
        held_out, panels = validation._held_out, validation._panels
        assert held_out is not None and panels is not None
        with evaluation_mode(session.wrapped), torch.no_grad():
            found[kind] = [(held_out.loss(session.wrapped), panels._answers()) for _ in range(2)]
    groups.shutdown()
    return found


@pytest.fixture(scope="module")
def recipes(
    tmp_path_factory: pytest.TempPathFactory, dataset_dir: Path, tokenizer_dir: Path
) -> dict[str, str]:
    """A recipe of each kind with adapters that drop out, and three questions."""
    root = tmp_path_factory.mktemp("looks")
    names = write_images(root, 2)
    shown = {"What is it?": names[0], "Which?": names, "Why?": None}
    asked = [entry(i, images, text, ".") for i, (text, images) in enumerate(shown.items())]
    (root / "questions.json").write_text(json.dumps(asked))
    found = {}
    for kind in KINDS:
        (root / kind).mkdir()
        path = write_recipe(root / kind, dataset_dir, tokenizer_dir, kind)
        recipe = yaml.safe_load(path.read_text())
        recipe["model"]["language"] |= {"num_layers": 4, "init_std": 0.3}
        recipe["model"]["lora"] = {"rank": 4, "alpha": 6, "dropout": 0.5, "targets": ["q", "v", "up"]}
        recipe["training"]["freeze"] = ["vision", "language"]
        recipe["data"]["max_images"] = 2
        recipe["validation"] = {
            "interval": 1,
            "data": str(dataset_dir),
            "batches": 3,
            "questions": str(root / "questions.json"),
            "max_new_tokens": 5,
        }
        path.write_text(yaml.safe_dump(recipe))
        found[kind] = str(path)
    return found


@pytest.fixture(scope="module")
def alone(recipes: dict[str, str]) -> Any:
    """What one process finds, by overrides that are not of the layout."""
    return cache(lambda *overrides: look(recipes, list(overrides)))


@pytest.mark.parametrize(
    "overrides",
    [
        *(pytest.param(found, id=name) for name, found in LAYOUTS.items()),
        *(pytest.param(found, id=name, marks=pytest.mark.slow) for name, found in MORE_LAYOUTS.items()),
    ],
)
def test_every_layout_finds_the_same(overrides: list[str], recipes: dict[str, str], alone: Any) -> None:
    reference = alone(*(o for o in overrides if not o.startswith("parallel.")))
    args = {"recipes": recipes, "overrides": overrides}
    processes = 3 if "training.global_batch_size=12" in overrides else 2
    ranks = run_distributed(processes, "tests.dist.test_validation:look", args)
    for kind in KINDS:
        (wanted, answers), _ = reference[kind]
        assert len(answers) == 3 and len(set(answers.values())) == 3 and all(answers.values())
        for rank, found in enumerate(ranks):
            for loss, said in found[kind]:
                assert loss == pytest.approx(wanted, abs=1e-6), (kind, rank)
                assert said == (answers if rank == 0 else None), kind


def test_dropout_is_off(recipes: dict[str, str], alone: Any) -> None:
    assert alone() == alone("model.lora.dropout=0.0")


def train_twice(recipe: str, overrides: list[str], folder: str) -> None:
    """With looks and without."""
    from megamm.recipe import load_recipe
    from megamm.training.train import train

    shutdown, groups.shutdown = groups.shutdown, lambda: None  # both runs are in the same groups
    for name, interval in (("with", 1), ("without", 0)):
        changes = [*overrides, f"run_dir={folder}/{name}", f"validation.interval={interval}"]
        train(load_recipe(Path(recipe), changes))
    shutdown()


@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.pipeline=2"])
@pytest.mark.parametrize("kind", ["cross_attention", pytest.param("merged", marks=pytest.mark.slow)])
def test_training_does_not_notice(layout: str, kind: str, recipes: dict[str, str], tmp_path: Path) -> None:
    """Weights, optimizer and curve are bitwise the same, and the panels say what one process says that
    loads the checkpoint of that step."""
    overrides = [layout, "training.steps=3", "optimizer.lr=0.02"]
    args = {"recipe": recipes[kind], "overrides": overrides, "folder": str(tmp_path)}
    run_distributed(2, "tests.dist.test_validation:train_twice", args)
    one, other = newest_state(tmp_path / "with"), newest_state(tmp_path / "without")
    assert one.keys() == other.keys() and any("optimizer" in name for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert curve(tmp_path / "with") == curve(tmp_path / "without")
    samples = tmp_path / "with" / "samples"
    first, _, last = (json.loads((p / "samples.json").read_text()) for p in sorted(samples.iterdir()))
    questions = Path(recipes[kind]).parents[1] / "questions.json"
    asked = list(iter_questions(questions, questions.parent))
    model = load(tmp_path / "with", "cpu")
    wanted = model.generate([q.turns for q in asked], [q.images for q in asked], max_new_tokens=5)
    groups.shutdown()
    assert [row["prediction"] for row in last] == wanted != [row["prediction"] for row in first]
