"""Every subcommand with good arguments, and what may stand in the place of each path instead."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from tests.training.runs import run, write_recipe

Kind = Literal["file", "directory", "new file", "new directory"]


class PathArgument(NamedTuple):
    """A path on a command line: where it stands among the arguments, and what it is the path of."""

    index: int
    kind: Kind


@dataclass(frozen=True)
class Ground:
    """What good arguments name; nothing may change it.

    Attributes:
        out: a folder for what the commands write.
    """

    recipe: Path
    dataset: Path
    tokenizer: Path
    source: Path
    images: Path
    picture: Path
    run: Path
    hugging_face: Path
    out: Path


def lay(folder: Path, dataset: Path, tokenizer: Path, images: Path) -> Ground:
    """A trained and exported tiny model, and a source of two entries."""
    picture = sorted(images.iterdir())[0]
    source = folder / "source.json"
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "It is a dog."}]
    source.write_text(json.dumps([{"id": i, "image": picture.name, "conversations": turns} for i in (1, 2)]))
    for name, key in (("given", "prediction"), ("wanted", "label")):
        (folder / f"{name}.jsonl").write_text(json.dumps({"id": 1, key: "dog"}) + "\n")
    recipe, log = write_recipe(folder, dataset, tokenizer), folder / "log"
    assert run(recipe, log, "--training.steps=1") == 0, log.read_text()
    ground = Ground(
        recipe, dataset, tokenizer, source, images, picture, folder / "run", folder / "hf", folder / "out"
    )
    ground.out.mkdir()
    return ground


# Subcommand -> its arguments: text, or a path with its kind. `None` stands for a name below Ground.out.
Words = Callable[[Ground], list[str | tuple[Path | str, Kind]]]
COMMANDS: dict[str, Words] = {
    "doctor": lambda g: ["doctor"],
    "prepare": lambda g: [
        *("prepare", (g.source, "file"), "--format", "llava", "--images", (g.images, "directory")),
        *("--tokenizer", (g.tokenizer, "directory"), "--out", (g.out / "data", "new directory")),
    ],
    "prepare tokenizer": lambda g: [
        *("prepare", "tokenizer", "--from", (g.tokenizer, "directory"), "--add-token", "<|x|>"),
        *("--out", (g.out / "tokenizer", "new directory")),
    ],
    "data check": lambda g: [
        *("data", "check", (g.dataset, "directory"), "--recipe", (g.recipe, "file")),
        *("--list", (g.out / "list.jsonl", "new file"), "--workers", "0"),
    ],
    "data stats": lambda g: [
        *("data", "stats", (g.dataset, "directory"), "--recipe", (g.recipe, "file")),
        *("--plot", (g.out / "plot.svg", "new file")),
    ],
    "data preview": lambda g: [
        *("data", "preview", (g.dataset, "directory"), "--recipe", (g.recipe, "file")),
        *("--out", (g.out / "page.html", "new file")),
    ],
    "convert import": lambda g: [
        *("convert", "import", "--from", (g.hugging_face, "directory")),
        *("--tokenizer", (g.tokenizer, "directory"), "--out", (g.out / "imported", "new directory")),
    ],
    "convert export": lambda g: [
        *("convert", "export", "--checkpoint", (g.run, "directory")),
        *("--out", (g.out / "hf", "new directory")),
    ],
    "convert verify": lambda g: [
        *("convert", "verify", "--checkpoint", (g.run, "directory")),
        *("--against", (g.hugging_face, "directory")),
    ],
    "verify": lambda g: ["verify", (g.run, "directory")],
    "train": lambda g: [
        *("train", (g.recipe, "file"), "--training.steps=1"),
        *("--tokenizer=", (g.tokenizer, "directory"), "--data.train=", (g.dataset, "directory")),
        *("--training.init_from=", (g.run, "directory"), "--run_dir=", (g.out / "run", "new directory")),
        *("--validation.interval=1", "--validation.data=", (g.dataset, "directory")),
        *("--validation.questions=", (g.source, "file"), "--validation.images=", (g.images, "directory")),
    ],
    "report": lambda g: ["report", (g.run, "directory"), "--out", (g.out / "report.html", "new file")],
    "plan": lambda g: ["plan", (g.recipe, "file"), "--gpus", "2", "--gpu", "a100-80gb"],
    "parity": lambda g: ["parity", (g.recipe, "file"), "--layouts", "tp2"],
    "generate": lambda g: [
        *("generate", "--checkpoint", (g.run, "directory"), "--image", (g.picture, "file")),
        *("--prompt", "What?", "--max-new-tokens", "1"),
    ],
    "chat": lambda g: [
        *("chat", "--checkpoint", (g.run, "directory"), "--image", (g.picture, "file")),
        *("--max-new-tokens", "1"),
    ],
    "score": lambda g: [
        *("score", "--metric", "gqa", "--predictions", (g.source.with_name("given.jsonl"), "file")),
        *("--references", (g.source.with_name("wanted.jsonl"), "file")),
    ],
    "evaluate": lambda g: [
        *("evaluate", (g.recipe, "file"), "--checkpoint", (g.run, "directory"), "--task", "exact_match"),
        *("--data", (g.source, "file"), "--images", (g.images, "directory")),
        *("--max-new-tokens", "1", "--out", (g.out / "predictions.jsonl", "new file")),
    ],
}


def words(name: str, ground: Ground) -> tuple[list[str], list[PathArgument]]:
    """The command line of a subcommand, and where its paths stand."""
    found: list[str] = []
    places: list[PathArgument] = []
    for part in COMMANDS[name](ground):
        text = part if isinstance(part, str) else str(part[0])
        if found and found[-1].startswith("--") and found[-1].endswith("="):
            found[-1] += text
        else:
            found.append(text)
        if not isinstance(part, str):
            places.append(PathArgument(len(found) - 1, part[1]))
    return found, places


def replaced(line: list[str], place: PathArgument, path: Path | str) -> list[str]:
    """The command line with another path at `place`."""
    key, equals, _ = line[place.index].rpartition("=") if line[place.index].startswith("--") else ("", "", "")
    return [*line[: place.index], f"{key}{equals}{path}", *line[place.index + 1 :]]


# --- what may stand there instead ---------------------------------------------------------------------


def _file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _directory(path: Path) -> Path:
    path.mkdir()
    return path


def _fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _link(path: Path, target: str) -> Path:
    path.symlink_to(target)
    return path


INSTEAD: dict[str, Callable[[Path], Path | str]] = {
    "missing": lambda folder: folder / "nowhere" / "at" / "all",
    "empty file": lambda folder: _file(folder / "empty", b""),
    "empty directory": lambda folder: _directory(folder / "directory"),
    "text": lambda folder: _file(folder / "text", b"hello\n" * 99),
    "binary": lambda folder: _file(folder / "binary", bytes(range(256)) * 20),
    "zip": lambda folder: _file(folder / "zip", b"PK\x03\x04" + bytes(200)),
    "pipe": lambda folder: _fifo(folder / "pipe"),
    "endless device": lambda folder: "/dev/zero",
    "empty device": lambda folder: "/dev/null",
    "dangling link": lambda folder: _link(folder / "dangling", "nowhere"),
    "link to itself": lambda folder: _link(folder / "loop", "loop"),
    "long name": lambda folder: folder / ("n" * 300),
    "below a file": lambda folder: _file(folder / "file", b"x") / "below",
    "empty name": lambda folder: "",
    "surrogate": lambda folder: os.fsdecode(bytes(folder) + b"/\xff\xfe"),
}
