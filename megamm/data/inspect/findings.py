"""What `megamm data check` finds: kinds, one finding, and the account of all of them."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from megamm.errors import RunError
from megamm.whole_files import written_whole

Finding = dict[str, Any]

# Kind -> what it says of those it counts; what is a note alone leaves a dataset without problems.
PROBLEMS = {
    "file": "files of the directory that are not as the manifest says",
    "structure": "contradictions that keep the dataset from being read",
    "container": "folders or tars of images that are gone or have changed",
    "sample": "samples that cannot be read or have another checksum",
    "empty": "samples without a token to predict",
    "vocabulary": "samples with token ids outside the vocabulary",
    "placeholders": "samples with other images than placeholders",
    "learnt_image": "samples that learn to predict an image token",
    "masked": "samples in which nothing is learnt",
    "cut_images": "samples that lose images to truncation",
    "cut_masked": "samples in which truncation leaves nothing to learn",
    "image": "images that cannot be used",
}
NOTES = {"duplicate": "samples that repeat an earlier one"}
KINDS = PROBLEMS | NOTES


def finding(kind: str, reason: str, **where: Any) -> Finding:
    """A finding; `where` says what it is about (row, image, source, name, ...)."""
    assert kind in KINDS, kind
    return {"kind": kind, **where, "reason": reason}


@dataclass
class Report:
    """What was checked and found.

    Attributes:
        counts: findings of each kind; kinds without any are left out.
        examples: the first of each kind.
        samples, images, files: that were looked at; images once, though several samples have them.
        cut: samples longer than the limits (None: there are none).
    """

    directory: Path
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[Finding]] = field(default_factory=dict)
    samples: int = 0
    images: int = 0
    files: int = 0
    cut: int | None = None

    @property
    def problems(self) -> int:
        """Findings that are not notes."""
        return sum(count for kind, count in self.counts.items() if kind in PROBLEMS)

    def content(self) -> dict[str, Any]:
        """The report for scripts."""
        return {
            "directory": str(self.directory),
            "problems": self.problems,
            "counts": {kind: self.counts.get(kind, 0) for kind in KINDS},
            "samples": self.samples,
            "images": self.images,
            "files": self.files,
            "cut_samples": self.cut,
            "examples": self.examples,
        }

    def lines(self, limit: int) -> list[str]:
        """The report for people, with at most `limit` examples of each kind."""
        looked = f"{self.samples} samples, {self.images} different images and {self.files} files looked at"
        lines = [f"{self.directory}: {self.problems or 'no'} problems; {looked}"]
        for kind, what in KINDS.items():
            if not (count := self.counts.get(kind)):
                continue
            lines.append(f"{kind}: {count} {what}")
            lines += ["  " + _shown(one) for one in self.examples[kind][:limit]]
            if count > limit > 0:
                lines.append(f"  ... and {count - limit} more")
        if self.cut:
            lines.append(f"truncation: {self.cut} samples are cut")
        return lines


def _shown(one: Finding) -> str:
    """A finding on one line, whatever the names in it hold."""
    where = [f"row {one['row']}"] if one.get("row") is not None else []
    if "name" in one:
        where.append(f"{one['name']!a} in {one['source']!a}" if "source" in one else f"{one['name']!a}")
    return f"{', '.join(where)}: {one['reason']}" if where else str(one["reason"])


class Account(AbstractContextManager["Account"]):
    """Counts findings, keeps the first of each kind, and writes all of them to a file, which
    appears at the end."""

    def __init__(self, report: Report, examples: int, path: Path | None) -> None:
        self.report = report
        self._examples, self._path = examples, path
        self._file: IO[str] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Account:
        if self._path is not None:
            try:
                self._file = self._stack.enter_context(written_whole(self._path))
            except OSError as error:
                raise self._failed(error) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            self._stack.__exit__(kind, error, where)
        except OSError as problem:
            if problem is error:
                raise
            raise self._failed(problem) from None

    def add(self, one: Finding) -> None:
        """Take up a finding."""
        report, kind = self.report, one["kind"]
        report.counts[kind] = report.counts.get(kind, 0) + 1
        kept = report.examples.setdefault(kind, [])
        if len(kept) < self._examples:
            kept.append(one)
        if self._file is not None:
            try:
                self._file.write(json.dumps(one) + "\n")
            except OSError as error:
                raise self._failed(error) from None

    def _failed(self, error: OSError) -> RunError:
        return RunError(f"{self._path}: cannot be written ({error.strerror}); choose another --list")
