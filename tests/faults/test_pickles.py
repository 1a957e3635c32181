"""Files that would run code when they are loaded, at every place that loads something (F13)."""

from __future__ import annotations

import io
import json
import pickle
import random
import re
import resource
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

from megamm.convert import import_checkpoint
from megamm.convert.files import SourceFiles
from megamm.errors import InputError
from tests.faults import canary
from tests.faults.commands import COMMANDS, Ground, replaced, words
from tests.faults.run_command import Outcome, run_command

DRAWN = 8  # of some hundred cases, in the short form


@pytest.mark.parametrize("form", sorted(canary.FILES))
def test_the_canaries_sing(form: str, tmp_path: Path) -> None:
    """Each file does leave its mark where it is loaded as one should not."""
    mark = tmp_path / "mark"
    data = canary.FILES[form](mark)
    if form in ("raw", "tar", "json"):
        pickle.loads(canary.raw(mark))
    elif form in ("archive", "legacy"):
        torch.load(io.BytesIO(data), weights_only=False)
    elif form in ("array", "arrays"):
        loaded = np.load(io.BytesIO(data), allow_pickle=True)
        _ = loaded["a"] if form == "arrays" else loaded
    else:
        yaml.unsafe_load(data)
    assert mark.is_dir()


def assert_refused(outcome: Outcome, line: list[str]) -> None:
    assert outcome.code in (1, 2), f"{line}: {outcome}"
    assert len(outcome.said) == 1 and "Traceback" not in outcome.text, f"{line}: {outcome}"


def cases() -> list[tuple[str, int, str]]:
    """Subcommand, number of the path, what stands there: a file of some form, or a directory with weights."""
    found = []
    for name in COMMANDS:
        _, places = words(name, Ground(*[Path("x")] * 9))
        for number, place in enumerate(places):
            if place.kind in ("file", "directory"):
                found += [(name, number, form) for form in (*canary.FILES, *canary.WEIGHTS)]
    return found


def check(cases: list[tuple[str, int, str]], ground: Ground, folder: Path) -> None:
    for number, (name, place, form) in enumerate(cases):
        own, mark = folder / str(number), folder / f"mark{number}"
        if form in canary.FILES:
            own.write_bytes(canary.FILES[form](mark))
        else:
            canary.directory(own, mark, form)
        line, places = words(name, ground)
        line = replaced(line, places[place], own)
        try:
            with canary.silent(mark):
                outcome = run_command(line, folder / "log")
            # pictures that are missing are only a remark, and a report tells what it can
            if outcome.code or name not in ("train", "report"):
                assert_refused(outcome, line)
        finally:
            shutil.rmtree(ground.out)
            ground.out.mkdir()


def test_some_places(ground: Ground, tmp_path: Path) -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    check(random.Random(seed).sample(cases(), DRAWN), ground, tmp_path)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_every_place(ground: Ground, tmp_path: Path) -> None:
    check(cases(), ground, tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "mm_projector.bin", "checkpoint.pt"])
@pytest.mark.parametrize("form", ["raw", "archive", "legacy"])
def test_weights_with_code(name: str, form: str, ground: Ground, tmp_path: Path) -> None:
    """In an otherwise good directory, and alone; the error names the file and the way to safetensors."""
    mark, source = tmp_path / "mark", Path(shutil.copytree(ground.hugging_face, tmp_path / "source"))
    (source / "model.safetensors").unlink()
    (source / name).write_bytes(canary.FILES[form](mark))
    for given in (source, source / name):
        message = rf"{name}: .*convert it to safetensors: .*{name}"
        with canary.silent(mark), pytest.raises(InputError, match=message):
            import_checkpoint([given], tmp_path / "imported" / "here")
        assert not (tmp_path / "imported").exists() or not list((tmp_path / "imported").iterdir())


def test_adapters_with_code(ground: Ground, tmp_path: Path) -> None:
    mark, adapter = tmp_path / "mark", tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.bin").write_bytes(canary.archive(mark))
    line = ["convert", "import", "--from", str(ground.hugging_face), "--from", str(adapter)]
    line += ["--out", str(ground.out / "imported")]
    with canary.silent(mark):
        outcome = run_command(line, tmp_path / "log")
    assert_refused(outcome, line)
    assert "adapter_model.bin: " in outcome.text and "convert it to safetensors" in outcome.text


def test_a_reference_with_code(ground: Ground, tmp_path: Path) -> None:
    """transformers reads the other side of `convert verify`."""
    mark, source = tmp_path / "mark", Path(shutil.copytree(ground.hugging_face, tmp_path / "source"))
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(canary.archive(mark))
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_x.X", "AutoConfig": "modeling_x.C"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "modeling_x.py").write_bytes(canary.program(mark))
    line = ["convert", "verify", "--checkpoint", str(ground.run), "--against", str(source)]
    with canary.silent(mark):
        outcome = run_command(line, tmp_path / "log")
    assert_refused(outcome, line)
    assert str(source) in outcome.text


def test_the_advice_works(tmp_path: Path) -> None:
    """What the error says to do makes a file that is read."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(3.0)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError) as refused:
        SourceFiles(path)
    advice = re.search(r"(safetensors\.torch\.save_file\(.*\))", str(refused.value))
    assert advice is not None
    code = advice[1].replace("'pytorch_model.bin'", repr(str(path)))
    code = code.replace("'model.safetensors'", repr(str(tmp_path / "model.safetensors")))
    exec(code, {"torch": torch, "safetensors": safetensors})
    assert safetensors.torch.load_file(tmp_path / "model.safetensors")["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", ["nested", "bytearray", "compressed", "cycle"])
def test_pickles_that_name_more_than_they_hold(kind: str, tmp_path: Path) -> None:
    """Few bytes that would become very many values, or fill the memory."""
    path, content = tmp_path / "pytorch_model.bin", {}
    if kind == "nested":
        content = {"a": torch.ones(1)}
        for _ in range(40):
            content = {"a": content, "b": content}
    elif kind == "cycle":
        content["model"] = content
    elif kind == "bytearray":
        content["a"] = _Bytes(1 << 40)
    torch.save(content, path)
    if kind == "compressed":
        with (
            zipfile.ZipFile(path) as old,
            zipfile.ZipFile(tmp_path / "new", "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for member in old.infolist():
                new.writestr(member.filename, old.read(member))
            new.writestr("archive/data/9", bytes(1 << 26))
        (tmp_path / "new").rename(path)
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"pytorch_model\.bin: "):
        SourceFiles(path)
    assert time.process_time() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


class _Bytes:
    """Unpickled, zeros of any number."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __reduce__(self) -> tuple[object, ...]:
        return bytearray, (self.size,)
