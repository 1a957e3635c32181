"""The quick start's data and helpers: deterministic, split by picture, balanced, answers right."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", QUICKSTART / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def make(out: Path) -> Path:
    pytest.importorskip("sklearn")
    command = [sys.executable, str(QUICKSTART / "make_data.py"), "--out", str(out), "--size", "16"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("data") / "one")


def entries(data: Path, side: str) -> list[dict[str, Any]]:
    return json.loads((data / f"{side}.json").read_text())


def pictures(entry: dict[str, Any]) -> list[str]:
    return entry["image"] if isinstance(entry["image"], list) else [entry["image"]]


def digit_of(picture: str) -> int:
    """Which digit of scikit-learn's a picture shows: images/train/NNNN-D.png, images/heldout/NNNN.png."""
    return int(Path(picture).stem.split("-")[0])


def test_same_seed_same_bytes(data: Path) -> None:
    again = make(data.parent / "two")
    files = sorted(p.relative_to(data) for p in data.rglob("*") if p.is_file())
    assert len(files) == 3 * 1438 + 359 + 2
    assert all((data / f).read_bytes() == (again / f).read_bytes() for f in files)


def test_no_picture_is_on_both_sides(data: Path) -> None:
    used = {side: {p for e in entries(data, side) for p in pictures(e)} for side in ("train", "heldout")}
    assert all(name.startswith("images/train/") for name in used["train"])
    assert all(name.startswith("images/heldout/") for name in used["heldout"])
    digits = {side: {digit_of(name) for name in names} for side, names in used.items()}
    assert not digits["train"] & digits["heldout"]
    written = {
        side: Counter(digit_of(p.name) for p in (data / "images" / side).iterdir())
        for side in ("train", "heldout")
    }
    assert len(written["train"]) == 1438 and set(written["train"].values()) == {3}
    assert len(written["heldout"]) == 359 and set(written["heldout"].values()) == {1}
    assert sorted(written["train"] + written["heldout"]) == list(range(1797))
    assert len(used["train"]) == 3 * 1438  # every drawing is used


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """Correlation of two pictures: brightness, contrast and tint of the paper hardly matter."""
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def darkness(path: Path) -> np.ndarray:
    return 255 - np.asarray(Image.open(path).convert("L"), dtype=np.float64)


def test_training_drawings_are_turned_and_moved_and_heldout_ones_are_not(data: Path) -> None:
    """Measured by their likeness to the strokes, enlarged in the middle of the picture."""
    from sklearn.datasets import load_digits

    strokes = load_digits().images
    found: dict[str, list[float]] = {"train": [], "heldout": []}
    for side, values in found.items():
        for path in sorted((data / "images" / side).iterdir())[:300]:
            low = Image.fromarray(np.pad(strokes[digit_of(path.name)], 1).astype(np.float32))
            straight = np.asarray(low.resize((16, 16), Image.Resampling.BICUBIC))
            values.append(likeness(straight, darkness(path)))
    assert min(found["heldout"]) > 0.95
    assert 0.7 < np.median(found["train"]) < min(found["heldout"])  # still that digit


def test_the_three_drawings_of_a_digit_differ(data: Path) -> None:
    found = []
    for first in sorted((data / "images/train").glob("*-0.png"))[:100]:
        one, two, three = (darkness(first.with_name(first.name.replace("-0", f"-{d}"))) for d in range(3))
        found += [likeness(one, two), likeness(two, three), likeness(one, three)]
    assert np.median(found) < 0.95  # drawn alike, but for light and colours, they have 0.99
    assert max(found) < 1


def test_four_conversations_for_each_training_digit(data: Path) -> None:
    """At least half of them about this digit alone; two pictures of one digit are never compared."""
    train = entries(data, "train")
    assert set(Counter(digit_of(pictures(e)[0]) for e in train).values()) == {4}
    alone = Counter(digit_of(pictures(e)[0]) for e in train if len(pictures(e)) == 1)
    assert len(alone) == 1438 and min(alone.values()) >= 2
    pairs = [[digit_of(p) for p in pictures(e)] for e in train if len(pictures(e)) == 2]
    assert len(pairs) > 1.8 * 1438 and all(first != second for first, second in pairs)


def test_answers_are_true(data: Path) -> None:
    """Against the labels of scikit-learn; file names are its row numbers."""
    from sklearn.datasets import load_digits

    labels = load_digits().target
    words = "zero one two three four five six seven eight nine".split()  # noqa: SIM905
    checked: Counter[str] = Counter()
    for entry in entries(data, "train") + entries(data, "heldout"):
        digits = [int(labels[digit_of(p)]) for p in pictures(entry)]
        turns = entry["conversations"]
        for asked, answered in zip(turns[::2], turns[1::2], strict=True):
            question, answer = asked["value"].lower(), answered["value"]
            if len(digits) == 2 and "larger" in question:
                kind, truth = "compare", ("equal", "first", "second")[int(np.sign(digits[0] - digits[1]))]
            elif "even" in question:
                kind, truth = "even", "no" if digits[0] % 2 else "yes"
            elif "five" in question:
                kind, truth = "larger", "yes" if digits[0] > 5 else "no"
            else:
                kind, truth = "digit", words[digits["second" in question]]
            assert answer == truth, entry
            checked[kind] += 1
    assert min(checked[kind] for kind in ("compare", "even", "larger", "digit")) > 1000


def test_heldout_is_balanced_single_questions(data: Path) -> None:
    counts: dict[str, Counter[str]] = {}
    for entry in entries(data, "heldout"):
        assert len(entry["conversations"]) == 2
        counts.setdefault(entry["kind"], Counter())[entry["conversations"][1]["value"]] += 1
    assert {kind: sum(c.values()) for kind, c in counts.items()} == dict.fromkeys(counts, 250)
    assert sorted(counts) == ["compare", "digit", "even", "larger"]
    for kind, counter in counts.items():
        assert max(counter.values()) - min(counter.values()) <= 1, kind


def test_every_kind_also_comes_first_in_training(data: Path) -> None:
    first = Counter(e["conversations"][0]["value"].replace("<image>\n", "") for e in entries(data, "train"))
    for question in (
        "What digit is this?",
        "Is it even?",
        "Is it larger than five?",
        "Which of the two is larger?",
    ):
        assert first[question] > 50


def test_pairs_are_compared_before_their_digits_are_named(data: Path) -> None:
    """Otherwise the comparison could be answered from the text alone."""
    pairs = [e["conversations"] for e in entries(data, "train") if len(pictures(e)) == 2]
    seconds = set()
    for turns in pairs:
        questions = [turn["value"].replace("<image>\n", "").lower() for turn in turns[::2]]
        assert ["larger" in question for question in questions] == [True, False, False], questions
        seconds.add("second" in questions[1])
    assert seconds == {True, False}  # which digit is named first varies


def test_megamm_reads_it(data: Path) -> None:
    from megamm.data.questions import read_questions

    assert len(read_questions([data / "heldout.json"], None)) == 1000


def test_panel_and_letters(data: Path, tmp_path: Path) -> None:
    show = script("show")
    rows = [
        {
            "id": e["id"],
            "prediction": "yes",
            "answer": e["conversations"][1]["value"],
            "question": e["conversations"][0]["value"],
            "kind": e["kind"],
            "correct": e["conversations"][1]["value"] == "yes",
        }
        for e in entries(data, "heldout")
    ]
    predictions = tmp_path / "p.jsonl"
    predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = show.by_kind(show.pair_up(data, predictions), show.ROWS)
    assert [len(column) for column in columns] == [3, 3, 3, 3]
    assert len(columns[3][0]["images"]) == 2
    sheet = show.panel(columns)
    assert sheet.size == (4 * show.CELL[0], 3 * show.CELL[1])
    letters = show.in_letters(columns[0][0]["images"][0]).splitlines()
    assert len(letters) == 16 and {len(line) for line in letters} == {32}
    assert {"@", " "} <= set("".join(letters))  # full contrast


def test_interrupt_kills_the_whole_family_at_the_right_time(tmp_path: Path) -> None:
    """A parent with a child in a session of its own, as torchrun starts its workers."""
    from megamm.recipe import load_recipe, recipe_to_yaml

    recipe = load_recipe(QUICKSTART / "llava.yaml", ["training.steps=8", "optimizer.warmup_steps=1"])
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    child = "import time; time.sleep(100)"
    parent = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    )
    family = subprocess.Popen([sys.executable, "-c", parent])
    while not (members := psutil.Process(family.pid).children()):
        time.sleep(0.02)
    command = [sys.executable, str(QUICKSTART / "interrupt.py"), str(family.pid), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    watcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    rows = tmp_path / "metrics.jsonl"
    try:
        rows.write_text('{"step": 4}\n')  # half way, but no checkpoint yet
        time.sleep(0.6)
        (tmp_path / "checkpoints" / "step_00000004").mkdir(parents=True)  # nothing would be lost
        time.sleep(0.6)
        assert watcher.poll() is None and family.poll() is None
        rows.write_text('{"step": 4}\n{"step": 5}\n')
        out, _ = watcher.communicate(timeout=20)
    finally:
        watcher.kill()
        family.kill()
    assert out == "killed 2 processes after step 5; checkpoint of step 4\n"
    assert family.wait(timeout=10) == -9
    psutil.wait_procs(members, timeout=10)
    assert not any(member.is_running() for member in members)


def test_interrupt_says_when_there_is_nothing_to_kill(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    time.sleep(0.5)  # it stays a zombie, as a child of a shell does
    command = [sys.executable, str(QUICKSTART / "interrupt.py"), str(ended.pid), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=30)
    assert result.returncode == 1 and "training ended before" in result.stderr
    ended.wait()


@pytest.mark.parametrize("arguments", [["banana"], ["--seed"], ["--seed", "x"]])
def test_run_refuses_wrong_usage(arguments: list[str]) -> None:
    result = subprocess.run(
        ["bash", str(QUICKSTART / "run.sh"), *arguments], capture_output=True, text=True, timeout=30
    )
    assert result.returncode != 0 and result.stdout == ""
    assert "--seed" in result.stderr


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("system, least", [("llava", 0.95), ("flamingo", 0.90)])
def test_the_whole_quick_start(system: str, least: float) -> None:
    """As a user runs it, with a seed of its own: trained, killed, resumed, asked, exported."""
    command = ["bash", str(QUICKSTART / "run.sh"), system, "--seed", "4"]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=1400).stdout
    assert "resumed at step" in output
    last = output.strip().splitlines()[-1]
    found = re.fullmatch(r"held-out accuracy: (0\.\d\d) \(n=1000\)", last)
    assert found is not None and float(found.group(1)) >= least, last
