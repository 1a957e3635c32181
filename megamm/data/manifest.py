"""The manifest of a prepared dataset: what it was made of, and size and hash of every file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from megamm.errors import InputError
from megamm.whole_files import read_whole

FILE_NAME = "manifest.json"
FORMAT = "megamm dataset"
VERSION = 2
CHUNK = 1 << 20
MAX_SIZE = 1 << 28  # bytes of a manifest; it names every source and every tar
TOKENIZER_FOLDER = "tokenizer"
CONTAINER_KINDS = ("folder", "tar", "base64")
SIGNATURE = "sha256_of_the_rest"  # key of the manifest's hash of itself


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
        created_by: the version of megamm.
        options: of the source format.
        image_checks: how much of each image was read ("full", "header", "none").
        tokenizer_sha256, vocab_size, image_id: of the tokenizer that made the token ids.
        counts: samples, text_only_samples, tokens, learnt_tokens, images, dropped_images (of documents
            that were kept without them), skipped.
        containers: [kind, path, size] of every folder and tar in which images lie.
        files: every file of the directory but this one, the tokenizer's as "tokenizer/NAME".
    """

    preparation: str
    created_by: str
    sources: list[str]
    source_format: str
    options: dict[str, Any]
    instructions: str
    template: str
    image_checks: str
    tokenizer_sha256: str
    vocab_size: int
    image_id: int
    counts: dict[str, int]
    containers: list[list[Any]]
    files: dict[str, FileEntry] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Write the manifest into `directory`."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        content[SIGNATURE] = hash_of(content)
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
            content = json.loads(read_whole(path, MAX_SIZE).decode("utf-8"))
        except (OSError, ValueError, RecursionError):
            raise problem from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise problem
        if content.get("version") != VERSION:
            raise InputError(f"{path}: was written by another version of megamm; run `megamm prepare` again")
        if content.pop(SIGNATURE, None) != hash_of(content):
            raise problem
        try:
            del content["format"], content["version"]
            files = {name: FileEntry(**entry) for name, entry in content.pop("files").items()}
            manifest = cls(files=files, **content)
        except (TypeError, KeyError, AttributeError):
            raise problem from None
        if not manifest._plausible():
            raise problem
        return manifest

    def check_sizes(self, directory: Path) -> None:
        """Compare the sizes of the files of `directory`; raises InputError for the first that differs."""
        for name, entry in self.files.items():
            path = directory / name
            if not path.is_file() or path.stat().st_size != entry.size:
                raise InputError(f"{path}: is missing or has changed its size; run `megamm prepare` again")

    def check_files(self, directory: Path, hash_limit: int | None) -> None:
        """Compare the files of `directory` with their sizes and sha256.

        Args:
            hash_limit: bytes to hash in all, the smallest files first; None means everything.

        Raises:
            InputError: names the first file that differs.
        """
        self.check_sizes(directory)
        names = sorted(self.files, key=lambda name: self.files[name].size)
        if hash_limit is not None:
            ends = accumulate(self.files[name].size for name in names)
            names = [name for name, end in zip(names, ends, strict=True) if end <= hash_limit]
        self.check_hashes(directory, names)

    def check_hashes(self, directory: Path, names: Iterable[str]) -> None:
        """Compare the sha256 of the files `names`; raises InputError for the first that differs."""
        for name in names:
            if file_sha256(directory / name) != self.files[name].sha256:
                raise InputError(f"{directory / name}: its content has changed; run `megamm prepare` again")

    def _plausible(self) -> bool:
        texts = [self.preparation, self.created_by, self.source_format, self.instructions, self.template]
        texts += [self.image_checks, self.tokenizer_sha256]
        numbers = [self.vocab_size, self.image_id]
        return (
            all(isinstance(text, str) for text in texts)
            and isinstance(self.sources, list)
            and isinstance(self.options, dict)
            and isinstance(self.counts, dict)
            and isinstance(self.containers, list)
            and all(type(number) is int for number in [*numbers, *self.counts.values()])
            and all(_is_container(container) for container in self.containers)
            and all(_inside(name) for name in self.files)
            and all(type(f.size) is int and isinstance(f.sha256, str) for f in self.files.values())
        )


def describe_files(directory: Path, names: Iterable[str], threads: int = 2) -> dict[str, FileEntry]:
    """Size and sha256 of the files `names` of `directory`."""
    names = list(names)
    with ThreadPoolExecutor(threads) as pool:  # hashing leaves the interpreter free
        hashes = pool.map(file_sha256, [directory / name for name in names])
        return {
            name: FileEntry((directory / name).stat().st_size, sha256)
            for name, sha256 in zip(names, hashes, strict=True)
        }


def file_sha256(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def hash_of(content: dict[str, Any]) -> str:
    """sha256 of a manifest's content, however its JSON is spaced."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _inside(name: str) -> bool:
    """Whether `name` is a file of the directory, or of its tokenizer folder."""
    return Path(name.removeprefix(f"{TOKENIZER_FOLDER}/")).name == name.removeprefix(f"{TOKENIZER_FOLDER}/")


def _is_container(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 3:
        return False
    return value[0] in CONTAINER_KINDS and isinstance(value[1], str) and type(value[2]) is int
