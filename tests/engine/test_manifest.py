"""The manifest finds every altered byte, and a checkpoint exists whole or not at all."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megamm.engine import manifest as manifests
from megamm.engine.manifest import MANIFEST, Manifest, Progress
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
        ("flipped", "sha256 differs"),
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
        with pytest.raises(InputError, match="sha256 differs"):
            manifests.verify(good)
    finally:
        path.write_bytes(CONTENT[name])


@settings(max_examples=200, deadline=None)
@given(data=st.data(), value=st.integers(0, 255))
def test_an_altered_byte_of_the_manifest_is_found_or_means_the_same(
    data: st.DataObject, value: int, good: Path
) -> None:
    path = good / MANIFEST
    whole = path.read_bytes()
    wanted = manifests.read_manifest(good)
    changed = bytearray(whole)
    changed[data.draw(st.integers(0, len(whole) - 1))] = value
    try:
        path.write_bytes(changed)
        if json_or_none(changed) == json.loads(whole):  # other white space
            assert manifests.read_manifest(good) == wanted
        else:
            with pytest.raises(InputError, match=str(path)):
                manifests.read_manifest(good)
    finally:
        path.write_bytes(whole)


def json_or_none(data: bytes | bytearray) -> object:
    try:
        return json.loads(data.decode())
    except ValueError:
        return None


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
    newer = replace(manifests.read_manifest(good), format_version=2)
    (tmp_path / MANIFEST).write_text(newer.to_json())
    with pytest.raises(InputError, match="format version 2, this megamm reads 1"):
        manifests.read_manifest(tmp_path)


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
    written = {**content, "self_sha256": manifests._hash_of(content)}
    (tmp_path / MANIFEST).write_text(json.dumps(written))
    assert manifests.read_manifest(tmp_path).progress == Progress(3, 24)
