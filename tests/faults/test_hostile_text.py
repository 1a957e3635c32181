"""Recipes, conversations and tars written by somebody who means harm (F12): one sentence, in little time and
memory, and nothing written anywhere but where it belongs.

tests/data and tests/training have random damage. The short form draws some of each table."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.helpers import encode, entry, picture
from tests.faults.commands import Ground
from tests.faults.run_command import Outcome, run_command


def lines(count: int, make: Callable[[int], str]) -> bytes:
    return "\n".join(map(make, range(count))).encode()


def bomb(key: str) -> Callable[[int], str]:
    """Each line stands for ten of the one before."""
    return lambda n: f"a{n}: &a{n} " + ("{x: 1}" if n == 0 else key.format(", ".join([f"*a{n - 1}"] * 10)))


RECIPES: dict[str, bytes] = {
    "aliases": lines(30, bomb("[{}]")),
    "merged keys": lines(30, bomb("{{<<: [{}]}}")),
    "tagged merged keys": lines(30, bomb("{{!!merge m: [{}]}}")),
    "aliases in a value": b"name: &a [x]\n" + lines(9, lambda n: f"b{n}: [" + "*a, " * 9 + "]"),
    "itself": b"name: &a [*a]",
    "itself as a section": b"model: &a\n  language: *a\n",
    "sources that are themselves": b"name: x\nrun_dir: y\ndata: {train: &t [*t, *t]}",
    "depth": b"[" * 100_000,
    "depth of mappings": b"{a: " * 50_000,
    "object": b"name: !!python/object/apply:os.system ['touch canary']",
    "module": b"name: !!python/module:os",
    "name": b"!!python/name:os.system ''",
    "large": b"name: " + b"x" * (2 << 20),
    "many digits": b"seed: " + b"9" * 400,
    "very many digits": b"seed: " + b"9" * 100_000,
    "a large exponent": b"seed: 1e400",
    "zero byte": b'name: "a\\0b"',
    "surrogate": b'run_dir: "\\ud800"',
    "utf-16": "name: x".encode("utf-16"),
    "two documents": b"name: x\n---\nname: y",
    "date": b"name: 2001-99-99",
    "binary": b"name: !!binary aGVsbG8=",
    "set": b"? name\n? run_dir",
    "directives": b"%YAML 9.9\n---\nname: x",
    "control": b"name: \x07\x1b[2J",
    "complex key": b"? [a, b]\n: c",
}


# the same cases in all workers of a test run, others in the next
DRAW = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid())))
SOME = 4


def some(table: dict[str, bytes]) -> list[object]:
    """All cases, of which but a few are for the long form."""
    always = DRAW.sample(list(table), SOME)
    return [case if case in always else pytest.param(case, marks=pytest.mark.faults) for case in table]


def assert_refused(outcome: Outcome) -> None:
    assert outcome.code in (1, 2) and len(outcome.said) == 1, outcome
    assert "Traceback" not in outcome.text and len(outcome.said[0]) < 2000, outcome


@pytest.mark.parametrize("case", some(RECIPES))
def test_recipes(case: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(RECIPES[case])
    outcome = run_command(["train", str(tmp_path / "recipe.yaml"), "--print-config"], tmp_path / "log", 20)
    assert_refused(outcome)
    assert str(tmp_path / "recipe.yaml") in outcome.said[0]


def conversation(**keys: object) -> str:
    return json.dumps(entry(0, None, "What?", "This.") | keys)


GOOD = conversation()
SOURCES: dict[str, bytes] = {
    "depth": b"[" * 200_000,
    "depth below a key": b'[{"id": ' + b"[" * 100_000,
    "digits": f'[{GOOD}, {{"id": {"9" * 100_000}}}]'.encode(),
    "not a number": f'[{GOOD}, {{"id": NaN, "conversations": Infinity}}]'.encode(),
    "no end": b'[{"id": "' + b"x" * (1 << 20),
    "a long name": f"[{conversation(image='x' * 100_000)}]".encode(),
    "zero byte in a name": f"[{conversation(image='a' + chr(0) + 'b')}]".encode(),
    "surrogate in a name": rf"[{conversation(image='X')}]".replace('"X"', r'"\ud800.jpg"').encode(),
    "name of a device": f"[{conversation(image='/dev/zero')}]".encode(),
    "a name that leaves": f"[{conversation(image='../../../../etc/passwd')}]".encode(),
    "a list as a name": f"[{conversation(image=[['a'], {'b': 1}])}]".encode(),
    "surrogate in the text": f"[{GOOD}]".replace("What?", r"\ud800 \udfff").encode(),
    "zero byte in the text": f"[{GOOD}]".replace("What?", r"a\u0000b").encode(),
    "the same key twice": b'[{"id": 1, "id": 2, "conversations": [], "conversations": 7}]',
    "utf-16": f"[{GOOD}]".encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + f"[{GOOD}]".encode(),
    "bad utf-8": f"[{GOOD}]".encode().replace(b"What", b"\xc3\x28"),
    "zeros": bytes(1 << 16),
    "a turn of a million words": f"[{GOOD}]".replace("What?", "word " * 1_000_000).encode(),
    "one conversation of many turns": json.dumps(
        [{"id": 1, "conversations": entry(0, None, "a", "b")["conversations"] * 20_000}]
    ).encode(),
}


def below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.name != "log"}


def prepare(source: Path, form: str, ground: Ground, out: Path) -> Outcome:
    line = ["prepare", str(source), "--format", form, "--images", str(ground.images), "--out", str(out)]
    template = ["--template", "plain"] if form == "webdataset" else []
    return run_command([*line, *template, "--tokenizer", str(ground.tokenizer)], out.parent / "log", 60)


@pytest.mark.parametrize("case", some(SOURCES))
def test_conversations(case: str, ground: Ground, tmp_path: Path) -> None:
    source = tmp_path / "source.json"
    source.write_bytes(SOURCES[case])
    before = below(tmp_path)
    outcome = prepare(source, "llava", ground, tmp_path / "out")
    made = below(tmp_path) - before
    if outcome.code:
        assert_refused(outcome)
        assert str(source) in outcome.said[0]
    assert all(path.is_relative_to(tmp_path / "out") for path in made if ".out.partial" not in path.parts)
    assert all(".out.partial" in path.parts or outcome.code == 0 for path in made), made


def tar_of(*members: tuple[str, bytes], **fields: object) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


JPEG = encode(picture(1), "JPEG")
TARS: dict[str, bytes] = {
    "names that leave": tar_of(("../../evil.jpg", JPEG), ("../../evil.txt", b"words")),
    "absolute names": tar_of(("/tmp/evil.jpg", JPEG), ("/tmp/evil.txt", b"words")),
    "links": tar_of(("0.jpg", b""), ("0.txt", b""), type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "devices": tar_of(("0.jpg", b""), ("0.txt", b""), type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    "pipes": tar_of(("0.jpg", b""), ("0.txt", b""), type=tarfile.FIFOTYPE),
    "the same key often": tar_of(*[("0.jpg", JPEG), ("0.txt", b"words")] * 50),
    "a long name": tar_of(("a" * 100_000 + ".jpg", JPEG), ("a" * 100_000 + ".txt", b"words")),
    "pickles": tar_of(("0.pkl", b"\x80\x04."), ("0.pyd", b"x"), ("0.jpg", JPEG), ("0.txt", b"words")),
    "deep json": tar_of(("0.jpg", JPEG), ("0.json", b"[" * 100_000), ("0.txt", b"words")),
    "surrogates": tar_of(("0.jpg", JPEG), ("0.json", rb'{"caption": "\ud800"}'), ("0.txt", b"\xff\xfe")),
    "a sheet of text": tar_of(("0.jpg", JPEG), ("0.txt", b"word " * 1_000_000)),
}


@pytest.mark.parametrize("case", some(TARS))
def test_tars(case: str, ground: Ground, tmp_path: Path) -> None:
    source = tmp_path / "source.tar"
    source.write_bytes(TARS[case])
    before, outside = below(tmp_path), below(tmp_path.parent)
    outcome = prepare(source, "webdataset", ground, tmp_path / "out")
    if outcome.code:
        assert_refused(outcome)
        assert str(source) in outcome.said[0]
    made = below(tmp_path) - before
    assert all({"out", ".out.partial"} & set(path.relative_to(tmp_path).parts) for path in made), made
    assert below(tmp_path.parent) - outside == made and not Path("/tmp/evil.jpg").exists()
