"""Looking at a model while it is trained: what is written, what training notices, resuming, bad input."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from megamm.config import ImageConfig, Recipe
from megamm.data.questions import iter_questions
from megamm.engine import groups
from megamm.engine.checkpoint import Checkpoints
from megamm.errors import InputError
from megamm.inference import load
from megamm.recipe import load_recipe, validate
from megamm.training.held_out import held_out_recipe
from megamm.training.logging import RunLogger, read_metrics
from megamm.training.setup import build_session
from megamm.training.stopping import STOPPED
from megamm.training.train import train
from megamm.training.validation import Validation, evaluation_mode
from tests.data.helpers import entry, write_images
from tests.training.runs import curve, newest_state, write_recipe

ADAPTERS = [
    "model.lora.rank=4",
    "model.lora.alpha=64",
    "model.lora.dropout=0.5",
    "model.lora.targets=[q, v, up]",
    "training.freeze=[language, vision]",
]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Five questions: about one picture, two, none, one that cannot be read; and one that is too long."""
    folder = tmp_path / "questions"
    one, two = write_images(folder, 2)
    Image.new("RGB", (700, 350), "red").save(folder / "wide.png")
    (folder / "broken.png").write_bytes(b"no picture")
    entries = [
        entry(0, "wide.png", "What is it?", "A thing."),
        entry(1, [one, two], "Which one?", "The other."),
        entry(2, "broken.png", "What?", "Nothing."),
        entry(3, None, "Why? " * 800, "Because."),
        entry(4, None, "How?", "So."),
    ]
    path = folder / "questions.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture
def make(tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path, questions: Path) -> Callable[..., Recipe]:
    """The recipe of a run that looks after every second of its five steps, in the directory `name`."""
    path = write_recipe(tmp_path, dataset_dir, tokenizer_dir)
    fixed = [
        "training.steps=5",
        "model.language.init_std=0.3",
        "validation.interval=2",
        f"validation.data={dataset_dir}",
        "validation.batches=3",
        f"validation.questions={questions}",
        "validation.num_questions=5",
        "validation.max_new_tokens=4",
        "data.image.random_crop_scale=0.5",
        "data.image.random_flip=true",
        "training.precision=fp32",
    ]

    def recipe(name: str = "run", *overrides: str) -> Recipe:
        return load_recipe(path, [*fixed, f"run_dir={tmp_path / name}", *overrides])

    return recipe


def losses(recipe: Recipe) -> list[tuple[int, float]]:
    rows = read_metrics(Path(recipe.run_dir) / "validation.jsonl")
    return [(row["step"], row["validation_loss"]) for row in rows]


def panels(recipe: Recipe) -> list[str]:
    return sorted(path.name for path in (Path(recipe.run_dir) / "samples").iterdir())


def test_training_does_not_notice(make: Callable[..., Recipe], questions: Path) -> None:
    """Weights, optimizer state and curve are bitwise those of a run without; the panels say what the
    checkpoint of that step says."""
    with_looks, without = make("with", *ADAPTERS), make("without", *ADAPTERS, "validation.interval=0")
    assert train(with_looks) == train(without) == 0
    one, other = (newest_state(Path(recipe.run_dir)) for recipe in (with_looks, without))
    assert one.keys() == other.keys() and any("optimizer" in name for name in one)
    for name in one:
        assert torch.equal(one[name], other[name]), name
    assert curve(Path(with_looks.run_dir)) == curve(Path(without.run_dir))
    assert not (Path(without.run_dir) / "samples").exists() and losses(without) == []

    assert [step for step, _ in losses(with_looks)] == [2, 4, 5]
    assert len({loss for _, loss in losses(with_looks)}) == 3
    assert panels(with_looks) == ["step-00000002", "step-00000004", "step-00000005"]
    model = load(with_looks.run_dir, "cpu")
    asked = [q for q in iter_questions(questions, questions.parent) if q.id in ("id0", "id1", "id4")]
    wanted = model.generate([q.turns for q in asked], [q.images for q in asked], max_new_tokens=4)
    groups.shutdown()
    folder = Path(with_looks.run_dir) / "samples" / "step-00000005"
    rows = json.loads((folder / "samples.json").read_text())
    assert [row["prediction"] for row in rows] == wanted and len(set(wanted)) == 3 and all(wanted)
    assert [(row["question"], row["answer"]) for row in rows] == [(q.text, q.answer) for q in asked]
    assert [row["images"] for row in rows] == [["1-1.jpg"], ["2-1.jpg", "2-2.jpg"], []]
    assert sorted(path.name for path in folder.iterdir()) == ["1-1.jpg", "2-1.jpg", "2-2.jpg", "samples.json"]
    assert Image.open(folder / "1-1.jpg").size == (256, 128)


def test_what_cannot_be_asked_is_said_before_the_first_step(make: Callable[..., Recipe]) -> None:
    recipe = make()
    train(recipe)
    log = (Path(recipe.run_dir) / "log.txt").read_text()
    start = log[: log.index("step 1/5")]
    assert "loss over 12 samples of" in start
    assert start.count("left out") == 2 and "question 'id2': " in start and "broken.png" in start
    assert "question 'id3': a prompt of " in start and "lower validation.max_new_tokens" in start
    assert "step 2/5 | validation loss " in log


def test_a_run_that_died_while_it_looked(
    make: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, broken = (make(name, "checkpoint.interval=2") for name in ("straight", "broken"))
    train(straight)
    real = Validation.run

    def dying(self: Validation, step: int) -> None:
        if step == 4:
            raise KeyboardInterrupt
        real(self, step)

    monkeypatch.setattr(Validation, "run", dying)
    with pytest.raises(KeyboardInterrupt):
        train(replace(broken, checkpoint=replace(broken.checkpoint, asynchronous=False)))
    monkeypatch.undo()
    samples = Path(broken.run_dir) / "samples"
    good = (samples / "step-00000002" / "samples.json").stat()
    (samples / "step-00000007").mkdir()  # of a step that the checkpoints do not reach
    (samples / ".step-00000007.new").mkdir()
    with (Path(broken.run_dir) / "validation.jsonl").open("a") as file:
        file.write('{"step": 5, "validation_loss": 1.0, "seconds": 1.0}\n')
    train(broken)
    assert losses(broken) == losses(straight) and panels(broken) == panels(straight)
    assert (samples / "step-00000002" / "samples.json").stat() == good
    for name in panels(broken):
        answers = [(Path(r.run_dir) / "samples" / name / "samples.json") for r in (broken, straight)]
        assert answers[0].read_text() == answers[1].read_text()
    train(broken)  # nothing to do, nothing to catch up with
    assert losses(broken) == losses(straight)


def test_signals_between_steps(make: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    """One during a look ends the run after the next step. One during the save before the last step changes
    nothing: the run ends with its last look."""
    straight, stopped = (make(name, "checkpoint.interval=4") for name in ("straight", "stopped"))
    train(straight)

    def signalled(owner: type, method: str) -> None:
        real = getattr(owner, method)

        def first(*args: Any, **options: Any) -> None:
            monkeypatch.setattr(owner, method, real)
            signal.raise_signal(signal.SIGTERM)
            real(*args, **options)

        monkeypatch.setattr(owner, method, first)

    signalled(Validation, "run")
    assert train(stopped) == STOPPED
    assert [row[0] for row in curve(Path(stopped.run_dir))] == [1, 2, 3]
    signalled(Checkpoints, "save")
    assert train(stopped) == 0
    assert "SIGTERM: came with the last step" in (Path(stopped.run_dir) / "log.txt").read_text()
    assert losses(stopped) == losses(straight) and panels(stopped) == panels(straight)
    assert curve(Path(stopped.run_dir)) == curve(Path(straight.run_dir))


def test_a_full_disk_stops_no_training(make: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megamm.training.panels.write_folder", full)
    recipe = make("run", "training.steps=2")
    assert train(recipe) == 0
    assert (
        "step-00000002: cannot be written (No space left on device)"
        in (Path(recipe.run_dir) / "log.txt").read_text()
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("validation.data=/nowhere", "/nowhere"),
        ("validation.questions=/nowhere.json", r"validation\.questions: /nowhere\.json does not exist"),
    ],
)
def test_missing_files_stop_the_run_before_it_starts(
    override: str, message: str, make: Callable[..., Recipe]
) -> None:
    recipe = make("run", override)
    with pytest.raises(InputError, match=message):
        train(recipe)
    assert curve(Path(recipe.run_dir)) == []


def test_pixels_are_those_of_evaluation(make: Callable[..., Recipe]) -> None:
    """Neither cropped nor flipped at random, nor decoded small; the same in every look and stage."""
    recipe = make()
    session = build_session(recipe, print)
    validation = Validation(session, None)
    assert validation._held_out is not None
    batches, _ = validation._held_out._read()
    again, _ = validation._held_out._read()
    other = replace(recipe, seed=77, stage="other", data=replace(recipe.data, image=ImageConfig()))
    groups.shutdown()
    assert held_out_recipe(other).data.image == held_out_recipe(recipe).data.image
    assert (held_out_recipe(other).seed, held_out_recipe(other).stage) == (1, "validation")

    from megamm.data.concatenated import ConcatenatedDataset
    from megamm.inference.asking import evaluation_loader

    dataset, loader = ConcatenatedDataset.open(recipe.data), evaluation_loader(recipe)
    checked = 0
    for batch, twin in zip(batches, again, strict=True):
        assert torch.equal(batch.input_ids, twin.input_ids) and torch.equal(batch.images, twin.images)
        records = [image for row in batch.sample_ids.tolist() for image in dataset[row].images]
        wanted = loader.load([dataset.read_image(image) for image in records], [0] * len(records))
        for pixels, image in zip(batch.images, wanted, strict=True):
            assert torch.equal(pixels, image)
            checked += 1
    assert checked >= 6


def test_every_module_gets_its_own_mode_back() -> None:
    frozen, trained = torch.nn.Dropout().eval(), torch.nn.Dropout()
    model = torch.nn.Sequential(frozen, trained)
    with pytest.raises(RuntimeError), evaluation_mode([model]):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert model.training and trained.training and not frozen.training


def test_few_samples_and_unreadable_ones_are_said(
    make: Callable[..., Recipe], tmp_path: Path, tokenizer_dir: Path
) -> None:
    from tests.data.helpers import conversations, prepared

    folder = tmp_path / "held out"
    names = write_images(folder, 4)
    data = prepared(tmp_path / "few", conversations(names, 6), tokenizer_dir, [folder]).out
    broken = folder / names[0]
    broken.write_bytes(broken.read_bytes()[:60] + b"\0" * 40)
    session = build_session(make("run", f"validation.data={data}"), print)
    said: Any = Validation(session, None)._held_out
    groups.shutdown()
    assert "loss over 12 samples of" in said.description and "which has 6, so some count" in said.description
    assert " stand in for samples with unreadable pictures" in said.description


def test_the_log_of_a_resumed_run_has_no_folds(make: Callable[..., Recipe]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = make("run", "log.tensorboard=true")
    for start, steps in ((0, (1, 2, 3)), (1, (2, 3))):
        with RunLogger(recipe.run_dir, recipe, 3, start_step=start) as log:
            for step in steps:
                log.validation(step, float("nan") if step == 3 else step + start, 0.5)
    assert losses(recipe) == [(1, 1.0), (2, 3.0), (3, None)]
    events = EventAccumulator(str(Path(recipe.run_dir) / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("validation/loss")][:2] == [(1, 1.0), (2, 3.0)]


def test_what_a_recipe_may_say(make: Callable[..., Recipe]) -> None:
    with pytest.raises(InputError, match=r"validation\.interval: 2, but there is neither"):
        make("run", "validation.data=null", "validation.questions=null")
    idle = make("run", "validation.interval=0")
    assert any(w.startswith("validation.data and validation.questions: not looked") for w in validate(idle))
    lost = make("run", "validation.questions=null", "validation.images=somewhere")
    assert any(w.startswith("validation.images:") for w in validate(lost))
    assert not any("validation" in w for w in validate(make()))
