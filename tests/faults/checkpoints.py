"""What the tests do to checkpoints."""

from __future__ import annotations

import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megamm.engine import manifest as manifests

STEPS = (9, 6, 3)  # of the checkpoints of a finished run, newest first


def files_of(checkpoint: Path) -> list[str]:
    """Paths below a checkpoint; of every kind."""
    names = [manifests.MANIFEST, *manifests.files_below(checkpoint)]
    assert {"recipe.yaml", "shards/.metadata", "shards/common.pt", "shards/metadata.json"} < set(names)
    assert any(name.startswith("tokenizer/") for name in names)
    assert any(name.startswith("frozen/") and name.endswith(".distcp") for name in names)
    return names


class Copy:
    """A copy of the finished run, to be damaged and repaired again."""

    def __init__(self, trained: Path, folder: Path) -> None:
        self.source, self.run_dir = trained / "run", folder / "run"
        self.directory = self.run_dir / "checkpoints"
        shutil.copytree(self.source, self.run_dir)  # hard links become files of their own
        self.newest, self.older, self.oldest = (self.directory / f"step_{step:08d}" for step in STEPS)

    def repair(self) -> None:
        shutil.rmtree(self.directory)
        shutil.copytree(self.source / "checkpoints", self.directory)


def remake_manifest(checkpoint: Path) -> None:
    """What an attacker does: describe the files as they are now."""
    files = {name: manifests.hash_file(checkpoint / name) for name in manifests.files_below(checkpoint)}
    changed = replace(manifests.read_manifest(checkpoint), files=files)
    (checkpoint / manifests.MANIFEST).write_text(changed.to_json())


class Canary:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def _index(path: Path, change: Any) -> None:
    """Change an index, which is the test's own."""
    index = pickle.loads(path.read_bytes())
    path.unlink()  # other checkpoints may have the file, too
    path.write_bytes(pickle.dumps(change(index) or index))


def _archive(content: Any, path: Path) -> int:
    torch.save(content, path)
    return path.stat().st_size


def whole_index(checkpoint: Path, canary: Path) -> Path:
    """The index is something else altogether."""
    _index(checkpoint / "shards/.metadata", lambda index: Canary(canary))
    return checkpoint / "shards/.metadata"


def within_index(checkpoint: Path, canary: Path) -> Path:
    """A good index, with one thing more in it."""

    def change(index: Any) -> None:
        index.planner_data = {"x": Canary(canary)}

    _index(checkpoint / "shards/.metadata", change)
    return checkpoint / "shards/.metadata"


def index_of_frozen(checkpoint: Path, canary: Path) -> Path:
    """The index beside the frozen weights."""
    _index(checkpoint / "frozen/.metadata", lambda index: Canary(canary))
    return checkpoint / "frozen/.metadata"


def common(checkpoint: Path, canary: Path) -> Path:
    """What lies in no shard."""
    path = checkpoint / "shards/common.pt"
    content = torch.load(path, weights_only=True)
    _archive({**content, "x": Canary(canary)}, path)
    return path


def tensor(checkpoint: Path, canary: Path) -> Path:
    """An object where a tensor should be."""
    _place(checkpoint, "connector.linear_1.weight", Canary(canary))
    return checkpoint / "shards/__9_9.distcp"


def frozen_tensor(checkpoint: Path, canary: Path) -> Path:
    """An object where a frozen tensor should be."""
    _place(checkpoint, "vision.class_embedding", Canary(canary), "../frozen/")
    return checkpoint / "frozen/__9_9.distcp"


def tensor_called_object(checkpoint: Path, canary: Path) -> Path:
    """An index that calls a tensor an object, which torch would load by plain pickle."""
    name = "connector.linear_1.weight"
    _place(checkpoint, name, Canary(canary))

    def change(index: Any) -> None:
        info = index.storage_data.pop(next(key for key in index.storage_data if key.fqn == name))
        index.state_dict_metadata[name] = BytesStorageMetadata()
        index.storage_data[MetadataIndex(name)] = info

    _index(checkpoint / "shards/.metadata", change)
    return checkpoint / "shards"


def extra_state(checkpoint: Path, canary: Path) -> Path:
    """A module's state that is no tensor."""
    name = "language.decoder.layers.0.self_attention.linear_proj._extra_state/shard_0_1"
    _place(checkpoint, name, [Canary(canary)])
    return checkpoint / "shards/__9_9.distcp"


def pickle_in_extra_state(checkpoint: Path, canary: Path) -> Path:
    """A tensor of bytes that Transformer Engine would unpickle."""
    name = "language.decoder.layers.0.self_attention.linear_proj._extra_state/shard_0_1"
    inner = torch.frombuffer(bytearray(pickle.dumps(Canary(canary))), dtype=torch.uint8)
    _place(checkpoint, name, [inner])
    return checkpoint / "shards/__9_9.distcp"


def other_file(checkpoint: Path, canary: Path) -> Path:
    """An index that names a file which is none of the checkpoint's."""
    outside = checkpoint.parents[2] / "outside.distcp"
    length = _archive(torch.zeros(2), outside)

    def change(index: Any) -> None:
        for key in index.storage_data:
            index.storage_data[key] = _StorageInfo(os.path.relpath(outside, checkpoint / "shards"), 0, length)

    _index(checkpoint / "shards/.metadata", change)
    return checkpoint / "shards/.metadata"


def _place(checkpoint: Path, name: str, content: Any, folder: str = "") -> None:
    """Put something where the index has the tensor or object `name`."""
    path = checkpoint / "shards" / folder / "__9_9.distcp"
    length = _archive(content, path)

    def change(index: Any) -> None:
        for key in index.storage_data:
            if key.fqn == name:
                index.storage_data[key] = _StorageInfo(f"{folder}{path.name}", 0, length)

    _index(checkpoint / "shards/.metadata", change)


PLACES = {
    place.__name__: place
    for place in (
        *(whole_index, within_index, index_of_frozen, common, tensor, frozen_tensor, tensor_called_object),
        *(extra_state, pickle_in_extra_state, other_file),
    )
}


# --- damage ---------------------------------------------------------------------------------------------


def flip(path: Path, draw: Random) -> None:
    """One bit."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, draw: Random) -> None:
    """The end is missing, or all of it."""
    content = path.read_bytes()
    path.write_bytes(content[: draw.choice([0, len(content) - 1, draw.randrange(len(content))])])


def delete(path: Path, draw: Random) -> None:
    """The file is not there."""
    path.unlink()


def zero_fill(path: Path, draw: Random) -> None:
    """Zeros where something was: what is left of a file when the power fails."""
    content = bytearray(path.read_bytes())
    begin = draw.choice([0, draw.randrange(len(content))])
    while not any(content[begin:]):
        begin = draw.randrange(len(content))
    content[begin:] = bytes(len(content) - begin)
    path.write_bytes(content)


def lengthen(path: Path, draw: Random) -> None:
    """Something more behind its end."""
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.choice([1, 4096])))


def swap(one: Path, other: Path) -> None:
    """Each has the other's content."""
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def swap_in_checkpoint(path: Path, draw: Random) -> None:
    """Two files of one checkpoint."""
    files = [each for each in path.parents[_depth(path)].rglob("*") if each.is_file()]
    others = [
        each for each in files if each.name != manifests.MANIFEST and each.read_bytes() != path.read_bytes()
    ]
    swap(path, draw.choice(sorted(others)))


def _depth(path: Path) -> int:
    return next(i for i, parent in enumerate(path.parents) if parent.name.startswith("step_"))


DAMAGES = (flip, truncate, delete, zero_fill, lengthen, swap_in_checkpoint)
