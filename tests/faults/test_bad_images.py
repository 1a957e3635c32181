"""One sample in twenty has a picture that cannot be used, of every kind: whole runs with each loader (F11).

tests/data/test_bad_images.py has the same for the loader alone, and what decoders make of changed bytes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megamm.data.image_header import ImageError
from megamm.data.image_store import ImageStore, Location, describe, index_tar
from megamm.training.metrics import read_metrics
from tests.data.bad_images import MAX_PIXELS, unusable, unusual
from tests.data.helpers import encode, entry, picture, prepared
from tests.training.runs import run, write_recipe

EVERY = 20
GLOBAL_BATCH = 4
SHORT = 220  # samples of the short form, of which one in twenty is bad


class Planted(NamedTuple):
    """A dataset, and the names of the pictures that cannot be used, with the folder or tar they lie in."""

    dataset: Path
    count: int
    bad: dict[str, Path]


def fifo(path: Path, data: bytes) -> None:
    os.mkfifo(path)


def folder(path: Path, data: bytes) -> None:
    path.mkdir()


def unix_socket(path: Path, data: bytes) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def link_to(target: str) -> Callable[[Path, bytes], None]:
    return lambda path, data: path.symlink_to(target)


def nothing(path: Path, data: bytes) -> None:
    """The file is gone."""


def longer(path: Path, data: bytes) -> None:
    path.write_bytes(data + b"\0" * 100)


def html(path: Path, data: bytes) -> None:
    path.write_bytes(b"<html>404</html>")


def cut(path: Path, data: bytes) -> None:
    path.write_bytes(data[: len(data) // 2])


def empty(path: Path, data: bytes) -> None:
    path.write_bytes(b"")


# What happens to a picture between `megamm prepare` and training.
LATER: dict[str, Callable[[Path, bytes], None]] = {
    **{"pipe": fifo, "folder": folder, "socket": unix_socket, "gone": nothing, "longer": longer},
    **{"html": html, "cut": cut, "empty": empty},
    **{"dangling link": link_to("nowhere"), "link to itself": link_to("loop.jpg")},
    **{"endless device": link_to("/dev/zero"), "empty device": link_to("/dev/null")},
    **{
        "terminal": link_to("/dev/tty"),
        "outward link": link_to("/etc/passwd"),
        "kernel": link_to("/proc/kmsg"),
    },
}


def plant(root: Path, tokenizer: Path, count: int, draw: random.Random) -> Planted:
    """`count` samples with a picture each. Those that are bad from the start are indexed unread
    (--image-checks none), the others spoilt afterwards; a third lies in a tar."""
    images, members = root / "images", root / "members"
    images.mkdir(parents=True)
    members.mkdir()
    names = [f"{i}.jpg" for i in range(count)]
    odd, bad_bytes = list(unusual().values()), list(unusable().items())
    draw.shuffle(bad_bytes)
    kinds: list[Any] = [value for pair in zip(LATER.items(), bad_bytes, strict=False) for value in pair]
    kinds += bad_bytes[len(LATER) :]
    rows = sorted(draw.sample(range(count), count // EVERY))
    planted = {row: kinds[number % len(kinds)] for number, row in enumerate(rows)}
    bad: dict[str, Path] = {}
    for i, name in enumerate(names):
        where = members if i % 3 == 0 and (i not in planted or isinstance(planted[i][1], bytes)) else images
        data = encode(picture(i % 7, 60, 50), ("JPEG", "PNG")[i % 2]) if i % 10 else odd[i % len(odd)]
        if i in planted and isinstance(planted[i][1], bytes):
            data = planted[i][1] or b" "  # an empty file is not even indexed
        (where / name).write_bytes(data)
        if i in planted:
            bad[name] = root / "members.tar" if where == members else images
    with tarfile.open(root / "members.tar", "w") as tar:
        for file in sorted(members.iterdir()):
            tar.add(file, file.name)
    shutil.rmtree(members)
    entries = [entry(i, names[i], f"Which {i}?", f"This {i}.") for i in range(count)]
    sources = [images, root / "members.tar"]
    dataset = prepared(root, entries, tokenizer, sources, image_checks="none").out
    for i, (_kind, change) in planted.items():
        if not isinstance(change, bytes):
            good = (images / names[i]).read_bytes()
            (images / names[i]).unlink()
            change(images / names[i], good)
    return Planted(dataset, count, bad)


def train(planted: Planted, loader: str, folder: Path, tokenizer: Path, *overrides: str) -> tuple[int, str]:
    folder.mkdir(exist_ok=True)
    recipe, log = write_recipe(folder, planted.dataset, tokenizer), folder / "log"
    steps = planted.count // GLOBAL_BATCH
    more = [f"--training.steps={steps}", f"--training.global_batch_size={GLOBAL_BATCH}"]
    more += [
        f"--data.image.loader={loader}",
        f"--data.image.max_pixels={MAX_PIXELS}",
        "--preflight.data=warn",
    ]
    more += ["--checkpoint.interval=0", "--data.max_bad_images=0.5", *overrides]
    return run(recipe, log, *more, timeout=250), log.read_text()


def skipped(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "quarantine.jsonl").read_text().splitlines()]


def check_both_loaders(count: int, workers: int, root: Path, tokenizer: Path, seed: int) -> None:
    print(f"seed {seed}")
    planted = plant(root / "data", tokenizer, count, random.Random(seed))
    told: dict[str, set[str]] = {}
    for loader in ("pillow", "dali"):
        code, text = train(planted, loader, root / loader, tokenizer, f"--data.workers={workers}")
        assert code == 0 and "Traceback" not in text, text
        rows = list(read_metrics(root / loader / "run" / "metrics.jsonl"))
        lines = skipped(root / loader / "run")
        assert len(rows) == count // GLOBAL_BATCH
        assert {line["key"]: Path(line["source"]) for line in lines} == planted.bad
        assert len(lines) == len({line["key"] for line in lines}), "one line each"
        assert all(line["reason"] for line in lines)
        assert all(row["num_images"] == GLOBAL_BATCH for row in rows), "full batches"
        assert rows[-1]["skipped_samples"] >= len(lines)
        told[loader] = {line["key"] for line in lines}
    assert told["pillow"] == told["dali"]


def test_a_short_run_skips_what_was_planted(tmp_path: Path, tokenizer_dir: Path) -> None:
    pytest.importorskip("nvidia.dali")
    seed = random.SystemRandom().getrandbits(32)
    check_both_loaders(SHORT, 0, tmp_path, tokenizer_dir, seed)


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_skips_what_was_planted(workers: int, tmp_path: Path, tokenizer_dir: Path) -> None:
    """1,200 samples, 60 bad pictures of more than forty kinds."""
    pytest.importorskip("nvidia.dali")
    seed = random.SystemRandom().getrandbits(32)
    check_both_loaders(1200, workers, tmp_path, tokenizer_dir, seed)


def test_too_many_stop_the_run(tmp_path: Path, tokenizer_dir: Path) -> None:
    planted = plant(tmp_path / "data", tokenizer_dir, 200, random.Random(1))
    limit = "--data.max_bad_images=0.005"
    code, text = train(planted, "pillow", tmp_path / "run", tokenizer_dir, limit)
    said = [line for line in text.splitlines() if line.startswith("megamm: ")]
    assert code == 1 and len(said) == 1 and "data.max_bad_images = 0.005" in said[0], text


@pytest.fixture
def spoilt(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """A folder with everything that is no picture but has a name of one."""
    found = {}
    for kind, make in LATER.items():
        found[kind] = tmp_path / f"{kind}.jpg"
        make(found[kind], b"x" * 5000)
    yield found


@pytest.mark.timeout(20)
def test_what_is_no_file_blocks_no_reader_and_costs_no_descriptor(spoilt: dict[str, Path]) -> None:
    store = ImageStore([describe(next(iter(spoilt.values())).parent)])
    before = len(os.listdir("/proc/self/fd"))
    for path in spoilt.values():
        for length in (1, 4096, 5000):
            for _ in range(3):
                with pytest.raises(ImageError) as told:
                    store.read(Location(0, path.name, 0, length))
                assert str(told.value)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_tar_that_becomes_something_else(tmp_path: Path) -> None:
    """While it is read from: what stands there later is met when its descriptor was given up."""
    (tmp_path / "0.jpg").write_bytes(b"x" * 3000)
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(tmp_path / "0.jpg", "0.jpg")
    location, container = Location(0, "0.jpg", *index_tar(path)["0.jpg"]), describe(path)
    good = path.read_bytes()
    for change in (fifo, folder, nothing, link_to("/dev/zero"), link_to("nowhere"), cut, empty):
        store = ImageStore([container])
        assert store.read(location) == b"x" * 3000
        store.close()
        path.unlink()
        change(path, good[:2000])
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(ImageError) as told:
            store.read(location)
        store.close()
        assert str(told.value) and len(os.listdir("/proc/self/fd")) == before
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(good)
