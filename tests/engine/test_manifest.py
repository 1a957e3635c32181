"""The manifest finds every altered byte, and a checkpoint exists whole or not at all."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megamm.engine import manifest as manifests
from megamm.engine.manifest import MANIFEST, Manifest, Progress
from megamm.engine.manifest_format import spelled
from megamm.errors import InputError

CONTENT = {"recipe.yaml": b"name: x\n", "shards/a.distcp": bytes(range(256)) * 40, "shards/empty": b""}


def write_files(directory: Path) -> Path:
    for name, data in CONTENT.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return directory


def manifest_of(directory: Path, step: int = 7) -> Manifest:
    files = {name: manifests.hash_file(directory / name) for name in manifests.files_below(directory)}
    layout = {"tensor": 2, "pipeline": 1, "data": 3}
    return Manifest(step, 8 * step, layout, "abc", True, files)


def make_checkpoint(directory: Path, step: int = 7) -> Path:
    """A committed checkpoint below a `checkpoints` directory."""
    temporary = write_files(directory / f".incomplete-{step}")
    final = directory / manifests.step_directory(step)
    manifests.commit(temporary, final, manifest_of(temporary, step))
    return final


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A committed checkpoint. Not to be changed."""
    return make_checkpoint(tmp_path_factory.mktemp("good"))


def test_round_trip(good: Path) -> None:
    found = manifests.verify(good)
    assert found == manifest_of(good) == manifests.read_manifest(good)
    assert sorted(found.files) == sorted(CONTENT)
    assert found.files["shards/empty"].size == 0


# --- damage ---------------------------------------------------------------------------------------------


def damage(kind: str, path: Path) -> None:
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(data[:-1])
    elif kind == "longer":
        path.write_bytes(data + b"\0")
    else:
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])


@pytest.mark.parametrize("name", ["recipe.yaml", "shards/a.distcp"])
@pytest.mark.parametrize(
    ("kind", "phrase"),
    [
        ("missing", "missing"),
        ("truncated", "bytes instead of"),
        ("longer", "bytes instead of"),
        ("flipped", "xxh3_128 differs"),
    ],
)
def test_a_damaged_file_is_named(name: str, kind: str, phrase: str, good: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(good, copy)
    damage(kind, copy / name)
    with pytest.raises(InputError) as caught:
        manifests.verify(copy)
    assert f"{copy / name}: " in str(caught.value) and phrase in str(caught.value)
    assert str(caught.value).count(str(copy)) == 1  # the others are not blamed


def test_all_damaged_files_are_named(good: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(good, copy)
    damage("missing", copy / "shards/empty")
    damage("flipped", copy / "recipe.yaml")
    with pytest.raises(InputError, match=r"recipe\.yaml: content changed.*shards/empty: missing"):
        manifests.verify(copy)


def test_a_file_that_nobody_listed_does_no_harm(good: Path, tmp_path: Path) -> None:
    """Notes of a user or leftovers of a file system are no reason to lose a checkpoint."""
    copy = tmp_path / "copy"
    shutil.copytree(good, copy)
    (copy / "notes.txt").write_text("the good one")
    assert manifests.verify(copy) == manifests.verify(good)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), flip=st.integers(1, 255))
def test_any_altered_byte_of_a_file_is_found(data: st.DataObject, flip: int, good: Path) -> None:
    name = data.draw(st.sampled_from(["recipe.yaml", "shards/a.distcp"]))
    path, content = good / name, bytearray(CONTENT[name])
    content[data.draw(st.integers(0, len(content) - 1))] ^= flip
    try:
        path.write_bytes(content)
        with pytest.raises(InputError, match="xxh3_128 differs"):
            manifests.verify(good)
    finally:
        path.write_bytes(CONTENT[name])


@settings(max_examples=200, deadline=None)
@given(data=st.data(), value=st.integers(0, 255))
def test_an_altered_byte_of_the_manifest_is_found(data: st.DataObject, value: int, good: Path) -> None:
    path = good / MANIFEST
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[data.draw(st.integers(0, len(whole) - 1))] = value
    try:
        path.write_bytes(changed)
        if changed == whole:
            manifests.read_manifest(good)
        else:
            with pytest.raises(InputError, match=str(path)):
                manifests.read_manifest(good)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b"\n ", b"\n  ", 1),
        lambda text: text + b"\n",
        lambda text: text[:-1],
        lambda text: text.decode().encode("utf-16"),
        lambda text: text.replace(b'"step": 7', b'"step": 9,\n "step": 7'),
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: text.replace(b'"abc"', b'"\\u0061bc"'),
    ],
)
def test_the_same_content_in_other_words_is_found(change: Any, good: Path, tmp_path: Path) -> None:
    text = (good / MANIFEST).read_bytes()
    assert change(text) != text
    (tmp_path / MANIFEST).write_bytes(change(text))
    with pytest.raises(InputError, match=r"altered since it was written \(its hash"):
        manifests.read_manifest(tmp_path)


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("step", -1, "not a readable manifest"),
        ("step", 1.0, "not a readable manifest"),
        ("step", True, "not a readable manifest"),
        ("step", 10**30, "not a readable manifest"),
        ("consumed_samples", "7", "not a readable manifest"),
        ("consumed_samples", float("nan"), "not a readable manifest"),
        ("layout", [], "not a readable manifest"),
        ("layout", {"tensor": None}, "not a readable manifest"),
        ("has_optimizer", 1, "not a readable manifest"),
        ("recipe_sha256", None, "not a readable manifest"),
        ("data_position", [2, "x"], "not a readable manifest"),
        ("data_sources", {"a": 1}, "not a readable manifest"),
        ("format_version", "1", "not a readable manifest"),
        ("format_version", 10**40, "format version 1000"),
        ("more", 1, "not a readable manifest"),
        ("files", {"a": 1}, "not a readable manifest"),
        ("files", {"a": {"size": 1}}, "not a readable manifest"),
        ("files", {"a": {"size": -1, "xxh3_128": ""}}, "not a readable manifest"),
        *(
            ("files", {path: {"size": 1, "sha256": ""}}, "names a file outside of the checkpoint")
            for path in ("../x", "/etc/passwd", "a/../../x", "..", ".", "", "a//b", "./a", "a/", "a\0b")
        ),
    ],
)
def test_a_manifest_of_other_kinds_of_values_is_refused(
    name: str, value: Any, words: str, good: Path, tmp_path: Path
) -> None:
    content = json.loads((good / MANIFEST).read_text())
    del content["self_sha256"]
    (tmp_path / MANIFEST).write_text(spelled({**content, name: value}))
    with pytest.raises(InputError, match=words) as caught:
        manifests.read_manifest(tmp_path)
    assert len(str(caught.value)) < 400


def test_numbers_that_are_too_long_to_read_are_refused(good: Path, tmp_path: Path) -> None:
    text = (good / MANIFEST).read_text()
    (tmp_path / MANIFEST).write_text(text.replace('"step": 7', f'"step": {"9" * 5000}'))
    with pytest.raises(InputError, match="not a readable manifest"):
        manifests.read_manifest(tmp_path)


@pytest.mark.parametrize("what", ["file", "folder", "itself"])
def test_links_to_somewhere_else_are_refused(what: str, good: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(good, tmp_path / "copy"))
    path = copy / ("shards" if what == "folder" else "recipe.yaml")
    if what == "itself":
        path.unlink()
        path.symlink_to(path)
    else:
        path.symlink_to(path.rename(tmp_path / "elsewhere"))
    words = "cannot be read" if what == "itself" else "is a link to somewhere outside of the checkpoint"
    with pytest.raises(InputError, match=rf"{path}\S*: {words}"):
        manifests.verify(copy)


def test_a_link_to_a_checkpoint_is_one(good: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(good)
    assert manifests.verify(tmp_path / "link") == manifests.verify(good)


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{}", '"x"', '{"self_sha256": 1}', "[" * 100_000, '{"files": [], "self_sha256": ""}'],
)
def test_what_is_no_manifest_is_refused(text: str, good: Path, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(InputError, match="not a readable manifest"):
        manifests.read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_bytes(b"\xff" + (good / MANIFEST).read_bytes())
    with pytest.raises(InputError, match="not a readable manifest"):
        manifests.read_manifest(tmp_path)


def test_no_manifest_means_never_completed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="never completed"):
        manifests.read_manifest(tmp_path)


def test_another_format_version_is_refused(good: Path, tmp_path: Path) -> None:
    newer = replace(manifests.read_manifest(good), format_version=3)
    (tmp_path / MANIFEST).write_text(newer.to_json())
    with pytest.raises(InputError, match="format version 3, this megamm reads up to 2"):
        manifests.read_manifest(tmp_path)


def test_checkpoints_with_the_first_format_are_verified(good: Path, tmp_path: Path) -> None:
    """Which has SHA-256 as hashes."""
    copy = Path(shutil.copytree(good, tmp_path / "copy"))
    files = {name: manifests.hash_file(copy / name, "sha256") for name in manifests.files_below(copy)}
    older = replace(manifests.read_manifest(good), format_version=1, files=files)
    (copy / MANIFEST).write_text(older.to_json())
    entry = json.loads((copy / MANIFEST).read_text())["files"]["recipe.yaml"]
    assert entry["sha256"] == hashlib.sha256((copy / "recipe.yaml").read_bytes()).hexdigest()
    assert manifests.verify(copy) == older
    data = bytearray((copy / "recipe.yaml").read_bytes())
    data[3] ^= 1
    (copy / "recipe.yaml").write_bytes(data)
    with pytest.raises(InputError, match=r"recipe.yaml: content changed .* \(sha256 differs\)"):
        manifests.verify(copy)


# --- committing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["open", "fsync", "rename"])
def test_a_commit_that_fails_leaves_nothing_under_the_name(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary, final = write_files(tmp_path / ".incomplete"), tmp_path / "step_00000007"
    manifest = manifest_of(temporary)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    owner = manifests.os if failing == "fsync" else Path
    with monkeypatch.context() as patch:
        patch.setattr(owner, failing, fail)
        with pytest.raises(OSError, match="No space"):
            manifests.commit(temporary, final, manifest)
    assert not final.exists() and manifests.list_checkpoints(tmp_path) == []
    manifests.commit(temporary, final, manifest)
    assert manifests.verify(final) == manifest and not temporary.exists()


def test_the_name_appears_after_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary, final = write_files(tmp_path / ".incomplete"), tmp_path / "step_00000007"
    seen = []
    rename = Path.rename

    def watched(self: Path, target: Path) -> Path:
        assert manifests.verify(self) and not final.exists()
        seen.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    manifests.commit(temporary, final, manifest_of(temporary))
    assert seen == [final]


def test_the_same_step_may_be_committed_again(tmp_path: Path) -> None:
    first = make_checkpoint(tmp_path)
    (first / "shards/a.distcp").write_bytes(b"damaged")
    assert make_checkpoint(tmp_path) == first
    manifests.verify(first)


def test_replacing_never_leaves_less_than_there_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two renames, the next start finds the old one again; or after them, the new."""
    final, rename = make_checkpoint(tmp_path), Path.rename
    old = manifests.read_manifest(final)
    for killed_after, step in ((1, "old"), (2, "new")):
        temporary = write_files(tmp_path / f".incomplete-{step}")
        renamed = []

        def killed(self: Path, target: Path, last: int = killed_after, done: list[Path] = renamed) -> Path:
            done.append(rename(self, target))
            if len(done) == last:
                raise KeyboardInterrupt
            return done[-1]

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", killed)
            with pytest.raises(KeyboardInterrupt):
                manifests.commit(temporary, final, replace(manifest_of(temporary), recipe_sha256=step))
        manifests.tidy(tmp_path)
        found = manifests.verify(final)
        assert found == old if step == "old" else found.recipe_sha256 == "new"
        assert list(tmp_path.iterdir()) == [final]


# --- finding --------------------------------------------------------------------------------------------


def test_resolve(tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    old, new = (make_checkpoint(checkpoints, step) for step in (90_000_000, 100_000_000))
    write_files(checkpoints / ".incomplete-step_00000999")
    (checkpoints / "step_x").mkdir()
    (checkpoints / "step_999999999").write_text("a file")
    assert manifests.list_checkpoints(checkpoints) == [new, old]  # by number: the names differ in length
    for path in (tmp_path / "run", checkpoints, new, str(new)):
        assert manifests.resolve(path) == new
    assert manifests.resolve(old) == old


@pytest.mark.parametrize("path", ["", "nowhere", "empty", "empty/checkpoints", "file"])
def test_nothing_to_resolve(path: str, tmp_path: Path) -> None:
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=f"{tmp_path / path}: no checkpoint here"):
        manifests.resolve(tmp_path / path)


def test_remove_old_keeps_the_newest(tmp_path: Path) -> None:
    made = [make_checkpoint(tmp_path, step) for step in (5, 30, 200)]
    assert manifests.remove_old(tmp_path, 5) == []
    assert manifests.remove_old(tmp_path, 2) == [made[0]]
    assert manifests.list_checkpoints(tmp_path) == [made[2], made[1]]
    assert manifests.remove_old(tmp_path, 1) == [made[1]]
    manifests.verify(made[2])


def break_manifest(checkpoint: Path, how: str) -> Path:
    """A directory with the name of a checkpoint and no valid manifest."""
    checkpoint.mkdir(exist_ok=True)
    if how == "empty":
        (checkpoint / MANIFEST).unlink(missing_ok=True)
    elif how == "garbage":
        (checkpoint / MANIFEST).write_bytes(random.SystemRandom().randbytes(1000))
    elif how == "future":
        (checkpoint / MANIFEST).write_text(spelled({"format_version": 7, "of": "a newer release"}))
    else:  # that of another step
        shutil.copytree(next(checkpoint.parent.glob("step_*0005")), checkpoint, dirs_exist_ok=True)
    return checkpoint


@pytest.mark.parametrize("how", ["empty", "garbage", "future", "other"])
def test_what_has_no_valid_manifest_does_not_count_as_kept(how: str, tmp_path: Path) -> None:
    made = [make_checkpoint(tmp_path, step) for step in (5, 30, 200)]
    newest = break_manifest(tmp_path / "step_99999999", how)
    older = break_manifest(tmp_path / "step_00000020", how)
    assert manifests.remove_old(tmp_path, 1) == [made[1], older, made[0]]
    assert manifests.list_checkpoints(tmp_path) == [newest, made[2]] and manifests.verify(made[2])
    for path in (made[2], newest):
        break_manifest(path, "garbage")
    assert manifests.remove_old(tmp_path, 1) == [] and made[2].exists()


def test_some_are_kept_for_good(tmp_path: Path) -> None:
    made = {step: make_checkpoint(tmp_path, step) for step in (5, 10, 15, 20, 25, 30)}
    broken = break_manifest(made[10], "garbage")
    assert manifests.remove_old(tmp_path, 2, keep_every=10) == [made[15], broken, made[5]]
    assert manifests.list_checkpoints(tmp_path) == [made[30], made[25], made[20]]


def test_a_run_knows_its_checkpoints_by_their_steps(tmp_path: Path) -> None:
    one, other = (make_checkpoint(tmp_path, step) for step in (5, 30))
    one.rename(tmp_path / "aside")
    other.rename(one)
    (tmp_path / "aside").rename(other)
    with pytest.raises(InputError, match=rf"{one}/manifest.json: is that of step 30, so the directory was"):
        manifests.read_committed(one)
    assert manifests.verify(one).step == 30  # whole by itself, wherever it lies


def test_a_run_means_its_newest_complete_checkpoint(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, 5)
    (tmp_path / "step_99999999").mkdir()
    assert manifests.resolve(tmp_path) == made
    (made / MANIFEST).unlink()
    assert manifests.resolve(tmp_path) == tmp_path / "step_99999999"


def test_removing_takes_the_manifest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed half-way, it leaves nothing that could be taken for a checkpoint."""
    old, _ = (make_checkpoint(tmp_path, step) for step in (5, 30))

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(manifests.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        manifests.remove_old(tmp_path, 1)
    assert old.exists()
    with pytest.raises(InputError, match="never completed"):
        manifests.verify(old)


def test_an_older_manifest_knows_the_number_of_samples_alone(tmp_path: Path) -> None:
    sources = [{"group": 0, "source": "a"}, {"group": 1, "source": "b"}]
    manifest = replace(manifest_of(tmp_path, 3), data_position=[16, 8], data_sources=sources)
    (tmp_path / MANIFEST).write_text(manifest.to_json())
    assert manifests.read_manifest(tmp_path).progress == Progress(3, 24, [16, 8], sources)
    content = json.loads(manifest.to_json())
    for key in ("data_position", "data_sources", "self_sha256"):
        del content[key]
    (tmp_path / MANIFEST).write_text(spelled(content))
    assert manifests.read_manifest(tmp_path).progress == Progress(3, 24)
