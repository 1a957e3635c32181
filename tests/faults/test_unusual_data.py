"""Whole runs over data in which something is missing (F14): no hang in any layout, no number that is none."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from megamm.training.metrics import read_metrics
from tests.data.helpers import entry, prepared
from tests.training.runs import run, write_recipe

LAYOUTS = {
    "one": ([], 1),
    "tp2": (["--parallel.tensor=2", "--parallel.sequence=true"], 2),
    "pp2": (["--parallel.pipeline=2"], 2),
    "dp2": ([], 2),
}


def text_only(root: Path, names: list[str]) -> list[dict[str, object]]:
    return [entry(i, None, f"Number {i}?", f"It is {i}.") for i in range(40)]


def few_images(root: Path, names: list[str]) -> list[dict[str, object]]:
    """Most micro-batches have none, and ranks differ in that."""
    return [entry(i, names[0] if i % 13 == 0 else None, f"Number {i}?", f"It is {i}.") for i in range(40)]


def many_images(root: Path, names: list[str]) -> list[dict[str, object]]:
    return [entry(i, names[:6], f"Number {i}?", f"It is {i}.") for i in range(40)]


def images_late(root: Path, names: list[str]) -> list[dict[str, object]]:
    """Six images behind a first answer: the rows are cut somewhere in them."""
    found = []
    for i in range(40):
        late = entry(i, names[:6], "And these?", "They are six.")
        first = entry(i, None, "Hi?", f"It is {i}.")
        found.append(late | {"conversations": first["conversations"] + late["conversations"]})
    return found


# Name -> entries, overrides, what has to stand in the log.
CASES = {
    "text only": (text_only, [], ""),
    "few images": (few_images, [], ""),
    "nothing is learnt": (many_images, ["--data.sequence_length=16"], "without any token that carries loss"),
    "the span of an image is cut": (images_late, [], "were cut"),
    "packed, text only": (text_only, ["--data.pack=true"], ""),
    "no image is allowed": (images_late, ["--data.max_images=0"], "were cut"),
}
# Sequence lengths that end among the images, behind the first answer.
WHERE = {"merged": (118, 134), "cross_attention": (106, 116)}
# In the short form one layout of each case is drawn.
SHORT = ("text only", "nothing is learnt", "the span of an image is cut")


def check(
    case: str, layout: str, assembly: str, tmp_path: Path, image_folder: Path, tokenizer_dir: Path
) -> None:
    make, overrides, told = CASES[case]
    names = sorted(path.name for path in image_folder.iterdir())
    dataset = prepared(tmp_path / "data", make(tmp_path, names), tokenizer_dir, [image_folder]).out
    recipe, log = write_recipe(tmp_path, dataset, tokenizer_dir, assembly), tmp_path / "log"
    arguments, processes = LAYOUTS[layout]
    if case == "the span of an image is cut":
        overrides = [f"--data.sequence_length={random.SystemRandom().randrange(*WHERE[assembly], 2)}"]
        print(overrides)
    more = ["--training.steps=3", "--preflight.data=warn", "--training.micro_batch_size=2"]
    code = run(recipe, log, *arguments, *overrides, *more, processes=processes, timeout=100)
    text = log.read_text()
    assert code == 0 and "Traceback" not in text, text
    rows = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert len(rows) == 3 and all(math.isfinite(row["loss"]) for row in rows)
    assert all(math.isfinite(row["grad_norm"]) for row in rows)
    assert told in text
    if case == "nothing is learnt":
        assert [(row["loss"], row["grad_norm"]) for row in rows] == [(0.0, 0.0)] * 3
    else:
        assert all(row["loss"] > 0 for row in rows)


@pytest.mark.parametrize("case", SHORT)
def test_in_some_layout(case: str, tmp_path: Path, image_folder: Path, tokenizer_dir: Path) -> None:
    draw = random.SystemRandom()
    layout, assembly = draw.choice(list(LAYOUTS)), draw.choice(["merged", "cross_attention"])
    print(f"{layout}, {assembly}")
    check(case, layout, assembly, tmp_path, image_folder, tokenizer_dir)


@pytest.mark.faults
@pytest.mark.parametrize("assembly", ["merged", "cross_attention"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_in_every_layout(
    case: str, layout: str, assembly: str, tmp_path: Path, image_folder: Path, tokenizer_dir: Path
) -> None:
    check(case, layout, assembly, tmp_path, image_folder, tokenizer_dir)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--data.sequence_length=3", "data.sequence_length"),
        ("--training.init_from=", "training.init_from: is empty"),
        ("--run_dir=", "run_dir: is empty"),
    ],
)
def test_found_before_the_first_step(
    override: str, words: str, tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path
) -> None:
    """An image that fits nowhere, a shell's variable that was not set."""
    recipe, log = write_recipe(tmp_path, dataset_dir, tokenizer_dir), tmp_path / "log"
    assert run(recipe, log, override, timeout=60) == 2, log.read_text()
    said = [line for line in log.read_text().splitlines() if line.startswith("megamm: ")]
    assert len(said) == 1 and words in said[0], said
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").rglob("metrics.jsonl"))
