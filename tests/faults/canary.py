"""Pickles that leave a mark when they are loaded, in all the forms in which files of them go round."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Canary:
    """Unpickling this makes the directory `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.path, 0o755, True, True)


@contextmanager
def silent(path: Path) -> Iterator[Path]:
    """The mark that must not be there at the end."""
    assert not path.exists()
    yield path
    assert not path.exists(), "code of a file was run"


def raw(mark: Path) -> bytes:
    return pickle.dumps(Canary(mark))


def archive(mark: Path) -> bytes:
    """As torch.save writes it."""
    stream = io.BytesIO()
    torch.save({"weight": torch.ones(2), "extra": Canary(mark)}, stream)
    return stream.getvalue()


def legacy(mark: Path) -> bytes:
    """As torch.save wrote it before release 1.6."""
    stream = io.BytesIO()
    torch.save({"weight": torch.ones(2), "extra": Canary(mark)}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def array(mark: Path) -> bytes:
    """A .npy of objects."""
    stream = io.BytesIO()
    np.save(stream, np.array([Canary(mark)], dtype=object), allow_pickle=True)
    return stream.getvalue()


def arrays(mark: Path) -> bytes:
    """A .npz of them."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("a.npy", array(mark))
    return stream.getvalue()


def yaml_tag(mark: Path) -> bytes:
    return f"run_dir: !!python/object/apply:os.mkdir ['{mark}']\nname: x\n".encode()


def json_pickle(mark: Path) -> bytes:
    """As jsonpickle writes an object that is made by a call."""
    return f'{{"py/reduce": [{{"py/function": "os.mkdir"}}, {{"py/tuple": ["{mark}"]}}]}}'.encode()


def program(mark: Path) -> bytes:
    return f"import os\nos.mkdir({str(mark)!r})\n".encode()


def tar(mark: Path) -> bytes:
    """A shard whose members webdataset would unpickle or run."""
    members = {
        **{f"0.{suffix}": raw(mark) for suffix in ("pkl", "pyd", "pickle")},
        **{f"0.{suffix}": archive(mark) for suffix in ("pth", "pt")},
        **{"0.npy": array(mark), "0.npz": arrays(mark), "0.jpg": raw(mark), "0.json": json_pickle(mark)},
        **{
            "0.txt": b"words",
            "0.cls": raw(mark),
            "__init__.py": program(mark),
        },
    }
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return stream.getvalue()


FILES: dict[str, Callable[[Path], bytes]] = {
    **{"raw": raw, "archive": archive, "legacy": legacy, "array": array, "arrays": arrays},
    **{"yaml": yaml_tag, "json": json_pickle, "tar": tar},
}

# Names under which directories of models, adapters, datasets and runs hold what is loaded.
_NAMES = {
    "raw": (
        *("tokenizer.model", "spiece.model", "training_args.bin", "optimizer.bin", "scaler.pt", "rng.pth"),
        *("tokens.idx", "tokens.bin", "images.bin", "samples.pkl", "metrics.jsonl", "environment.json"),
    ),
    "json": (
        *("config.json", "tokenizer_config.json", "tokenizer.json", "manifest.json"),
        *("adapter_config.json", "preprocessor_config.json", "special_tokens_map.json"),
    ),
    "yaml": ("recipe.yaml", "config.yaml"),
    "array": ("tokens.npy", "index.npy"),
}
WEIGHTS = (
    "pytorch_model.bin",
    "adapter_model.bin",
    "mm_projector.bin",
    "checkpoint.pt",
    "consolidated.00.pth",
)


def directory(path: Path, mark: Path, weights: str) -> Path:
    """A directory in which everything is a canary; `weights` is its one file of weights."""
    path.mkdir()
    for form, names in _NAMES.items():
        for name in names:
            (path / name).write_bytes(FILES[form](mark))
    (path / weights).write_bytes(archive(mark))
    for name in ("modeling_x.py", "__init__.py", "conftest.py", "sitecustomize.py", "tokenization_x.py"):
        (path / name).write_bytes(program(mark))
    return path
