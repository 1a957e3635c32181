"""The manifest of a prepared dataset: what it was made of, and size and hash of every file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megamm.errors import InputError

FILE_NAME = "manifest.json"
FORMAT = "megamm dataset"
VERSION = 1
CHUNK = 1 << 20


@dataclass
class FileEntry:
    """Size in bytes and sha256 of one file of a dataset."""

    size: int
    sha256: str


@dataclass
class Manifest:
    """What a dataset directory says of itself.

    Attributes:
        preparation: hash of everything that decided the contents; equal preparations, equal datasets.
        tokenizer_sha256, vocab_size, image_id: of the tokenizer that made the token ids.
        counts: samples, tokens, learnt_tokens, images, skipped.
        containers: [kind, path, size] of every folder and tar in which images lie.
        files: every file of the directory but this one.
    """

    preparation: str
    sources: list[str]
    source_format: str
    template: str
    tokenizer_sha256: str
    vocab_size: int
    image_id: int
    counts: dict[str, int]
    containers: list[list[Any]]
    files: dict[str, FileEntry] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Write the manifest into `directory`."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        (directory / FILE_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """The manifest of `directory`.

        Raises:
            InputError: missing, damaged, or of another version.
        """
        path = directory / FILE_NAME
        if not path.is_file():
            raise InputError(f"{directory}: is no prepared dataset; write one with `megamm prepare`")
        problem = InputError(f"{path}: the manifest is damaged; run `megamm prepare` again")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            raise problem from None
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise problem
        if content.pop("version", None) != VERSION:
            raise InputError(f"{path}: was written by another version of megamm; run `megamm prepare` again")
        try:
            files = {name: FileEntry(**entry) for name, entry in content.pop("files").items()}
            manifest = cls(files=files, **content)
        except (TypeError, KeyError, AttributeError):
            raise problem from None
        if not manifest._plausible():
            raise problem
        return manifest

    def check_files(self, directory: Path, hash_limit: int | None) -> None:
        """Compare the files of `directory` with their sizes and sha256.

        Args:
            hash_limit: files of more bytes are checked by their size alone; None means no limit.

        Raises:
            InputError: names the first file that differs.
        """
        for name, entry in self.files.items():
            path = directory / name
            if not path.is_file() or path.stat().st_size != entry.size:
                raise InputError(f"{path}: is missing or has changed its size; run `megamm prepare` again")
            if (hash_limit is None or entry.size <= hash_limit) and file_sha256(path) != entry.sha256:
                raise InputError(f"{path}: its content has changed; run `megamm prepare` again")

    def _plausible(self) -> bool:
        texts = [self.preparation, self.source_format, self.template, self.tokenizer_sha256]
        numbers = [self.vocab_size, self.image_id]
        return (
            all(isinstance(text, str) for text in texts)
            and isinstance(self.sources, list)
            and isinstance(self.counts, dict)
            and isinstance(self.containers, list)
            and all(type(number) is int for number in [*numbers, *self.counts.values()])
            and all(_is_container(container) for container in self.containers)
            and all(Path(name).name == name for name in self.files)
            and all(type(f.size) is int and isinstance(f.sha256, str) for f in self.files.values())
        )


def _is_container(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 3:
        return False
    return value[0] in ("folder", "tar") and isinstance(value[1], str) and type(value[2]) is int


def describe_files(directory: Path, names: list[str]) -> dict[str, FileEntry]:
    """Size and sha256 of the files `names` of `directory`."""
    return {
        name: FileEntry((directory / name).stat().st_size, file_sha256(directory / name)) for name in names
    }


def file_sha256(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
