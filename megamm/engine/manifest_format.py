"""What a manifest says, and its one valid spelling.

A manifest is found altered by its own hash, and by being written out again: white space and the order of keys
carry no meaning, but a byte that changed in them shows that something writes to files which nobody should
write to.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any, Literal

FORMAT_VERSION = 2  # 1 had SHA-256 as the hash of files
_READABLE = (1, 2)
Algorithm = Literal["xxh3_128", "sha256"]
_LARGEST = 2**63  # numbers stay below


@dataclass(frozen=True)
class Progress:
    """How far a stage has come.

    Attributes:
        data_position, data_sources: see Manifest; nothing where only the number of samples is known.
        anomalies: see Manifest.
    """

    step: int = 0
    consumed_samples: int = 0
    data_position: list[int] = field(default_factory=list)
    data_sources: list[dict[str, Any]] = field(default_factory=list)
    anomalies: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and hash of one file.

    Attributes:
        hash: hexadecimal.
        algorithm: what it was made by, XXH3 of 128 bits or, in older checkpoints, SHA-256.
    """

    size: int
    hash: str
    algorithm: Algorithm = "xxh3_128"


@dataclass(frozen=True)
class Manifest:
    """The commit record of a checkpoint.

    Attributes:
        step: optimizer steps done.
        consumed_samples: samples of the stage seen so far.
        data_position: of them, those of each group of sources that share their steps; where the data stream
            goes on. Older checkpoints, of one group, have none.
        data_sources: what the groups consist of, as the data path describes it.
        anomalies: updates left out so far, as the training loop counts them.
        layout: parallel sizes it was saved with (any other can load it).
        recipe_sha256: of the recipe it was trained with.
        has_optimizer: whether training can go on from it.
        files: path below the checkpoint -> size and hash.
    """

    step: int
    consumed_samples: int
    layout: dict[str, int]
    recipe_sha256: str
    has_optimizer: bool
    files: dict[str, FileEntry] = field(default_factory=dict)
    data_position: list[int] = field(default_factory=list)
    data_sources: list[dict[str, Any]] = field(default_factory=list)
    anomalies: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def progress(self) -> Progress:
        """Where training goes on."""
        return Progress(
            self.step, self.consumed_samples, self.data_position, self.data_sources, self.anomalies
        )

    def to_json(self) -> str:
        """The text of the file."""
        files = {name: {"size": e.size, e.algorithm: e.hash} for name, e in self.files.items()}
        return spelled({**asdict(self), "files": files})


def spelled(content: dict[str, Any]) -> str:
    """The only text that is a manifest of this content."""
    whole = {**content, "self_sha256": _hash_of(content)}
    return json.dumps(whole, indent=1, sort_keys=True) + "\n"


def _hash_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class ManifestError(ValueError):
    """What is wrong with the text of a manifest, in a phrase."""


def parse(text: bytes) -> Manifest:
    """The manifest that a file holds.

    Raises:
        ManifestError: it is none, was altered, or is of another format.
    """
    try:
        content = json.loads(text)
        del content["self_sha256"]
        version = content["format_version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ManifestError("not a readable manifest") from None
    if type(version) is int and version not in _READABLE:
        raise ManifestError(f"format version {version}, this megamm reads up to {FORMAT_VERSION}")
    if spelled(content).encode() != text:
        raise ManifestError("altered since it was written (its hash does not match)")
    try:
        return _typed(content)
    except ManifestError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ManifestError("not a readable manifest") from None


def _typed(content: dict[str, Any]) -> Manifest:
    """The manifest, if all values are of the kind that they have to be."""
    if not content.keys() <= {f.name for f in fields(Manifest)}:
        raise ValueError
    files = {_inner_path(name): _entry(**entry) for name, entry in content["files"].items()}
    sources = _of(list, content.get("data_sources", []))
    return Manifest(
        step=_count(content["step"]),
        consumed_samples=_count(content["consumed_samples"]),
        layout={name: _count(size) for name, size in content["layout"].items()},
        recipe_sha256=_of(str, content["recipe_sha256"]),
        has_optimizer=_of(bool, content["has_optimizer"]),
        files=files,
        data_position=[_count(number) for number in _of(list, content.get("data_position", []))],
        data_sources=[_of(dict, source) for source in sources],
        anomalies=_of(dict, content.get("anomalies", {})),
        format_version=_count(content["format_version"]),
    )


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError
    return value


def _count(value: Any) -> int:
    number: int = _of(int, value)
    if not 0 <= number < _LARGEST:
        raise ValueError
    return number


def _entry(size: Any, xxh3_128: Any = None, sha256: Any = None) -> FileEntry:
    if sha256 is not None and xxh3_128 is None:
        return FileEntry(_count(size), _of(str, sha256), "sha256")
    return FileEntry(_count(size), _of(str, xxh3_128))


def _inner_path(name: str) -> str:
    """A path that stays below the checkpoint, in its shortest form."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or name == "." or "\0" in name:
        raise ManifestError(f"names a file outside of the checkpoint ({name[:100]!r})")
    return name
