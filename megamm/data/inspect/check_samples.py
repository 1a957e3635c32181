"""What can be wrong with one sample: ids, mask, placeholders, and what truncation does to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megamm.data.image_store import Location
from megamm.data.indexed import PreparedDataset, Sample
from megamm.data.inspect.findings import Finding, finding
from megamm.data.inspect.limits import Limits
from megamm.data.inspect.repeats import key_of

MAX_NAMED = 20  # images that one finding names
MASK = (1 << 64) - 1  # damaged records may hold negative numbers


class Images(NamedTuple):
    """Images of the sample `row`: their records, and keys that are equal where the same bytes are meant."""

    row: int
    records: range
    keys: list[int]


@dataclass
class Scanned:
    """Some samples that were looked at, in their order.

    Attributes:
        keys: of each sample, equal for equal samples.
        images: of those that have any and can be read.
        cut: samples that truncation shortens.
    """

    keys: list[int] = field(default_factory=list)
    images: list[Images] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    cut: int = 0


def start_scan(directory: Path, limits: Limits | None) -> Callable[[Sequence[int]], Scanned]:
    """The work of a process that looks at samples."""
    return SampleScan(PreparedDataset(directory, verify=False), limits).scan


class SampleScan:
    """Looks at samples of a dataset."""

    def __init__(self, dataset: PreparedDataset, limits: Limits | None) -> None:
        self._dataset, self._limits = dataset, limits
        self._image_id, self._vocab_size = dataset.manifest.image_id, dataset.manifest.vocab_size

    def scan(self, rows: Sequence[int]) -> Scanned:
        """Everything that is wrong with `rows`."""
        scanned, limits = Scanned(), self._limits
        for row in rows:
            try:
                sample = self._dataset[row]
                image_keys = [_image_key(place) for place in self._dataset.locations(sample)]
                placeholders = int(np.count_nonzero(sample.tokens == self._image_id))
                scanned.findings += self._findings(row, sample, placeholders)
                if limits is not None and limits.cuts_one(len(sample.tokens), placeholders):
                    scanned.cut += self._cut(row, sample, placeholders, limits, scanned.findings)
                content = sample.tokens.tobytes() + sample.learnt.tobytes()
                scanned.keys.append(key_of(content, *image_keys))
                if image_keys:
                    scanned.images.append(Images(row, sample.images, image_keys))
            except Exception as error:  # damaged files lead to errors of any kind
                scanned.findings.append(finding("sample", reason_of(error), row=row))
                scanned.keys.append(key_of(b"unreadable", row))
        return scanned

    def _findings(self, row: int, sample: Sample, placeholders: int) -> list[Finding]:
        tokens, learnt = sample.tokens, sample.learnt
        found = []
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._vocab_size:
            foreign = np.flatnonzero((tokens < 0) | (tokens >= self._vocab_size))
            reason = (
                f"{len(foreign)} ids outside the vocabulary of {self._vocab_size}, the first being "
                f"{tokens[foreign[0]]} at token {foreign[0]}"
            )
            found.append(finding("vocabulary", reason, row=row))
        if placeholders != len(sample.images):
            reason = f"{placeholders} placeholders for {len(sample.images)} images"
            found.append(finding("placeholders", reason, row=row, images=self._names(sample.images)))
        if placeholders and (wrong := int(np.count_nonzero(learnt[tokens == self._image_id]))):
            found.append(finding("learnt_image", f"{wrong} image tokens are to be predicted", row=row))
        if len(tokens) < 2:
            found.append(finding("empty", f"has {len(tokens)} tokens", row=row))
        elif not learnt[1:].any():
            reason = f"none of its {len(tokens)} tokens carries loss"
            found.append(finding("masked", reason, row=row, images=self._names(sample.images)))
        return found

    def _cut(self, row: int, sample: Sample, total: int, limits: Limits, found: list[Finding]) -> bool:
        """Whether truncation shortens a sample of `total` images; what it breaks goes into `found`."""
        left = limits.cut(sample.tokens, sample.learnt, self._image_id)
        if left.images < total:
            reason = (
                f"loses {total - left.images} of {total} images: {left.positions} of "
                f"{limits.positions(len(sample.tokens), total)} positions are left"
            )
            lost = self._names(sample.images[left.images :])
            found.append(finding("cut_images", reason, row=row, lost=total - left.images, images=lost))
        if not left.learnt and sample.learnt[1:].any():
            reason = f"no label is left within {left.positions} positions"
            found.append(finding("cut_masked", reason, row=row))
        return left.shorter

    def _names(self, images: range) -> list[str]:
        return [name_of(self._dataset, image) for image in images[:MAX_NAMED]]


def _image_key(place: Location) -> int:
    name = place.name.encode("utf-8", "surrogatepass")
    return key_of(name, place.container, place.offset & MASK, place.length & MASK)


def name_of(dataset: PreparedDataset, image: int) -> str:
    """The name of an image, or nothing where the files are damaged."""
    place = place_of(dataset, image)
    return place.name if place is not None else ""


def place_of(dataset: PreparedDataset, image: int) -> Location | None:
    """Where an image lies; None: the files are damaged."""
    try:
        return dataset.location(image)
    except Exception:  # damaged files lead to errors of any kind
        return None


def reason_of(error: Exception) -> str:
    """What an error says, in one line, also where it says nothing."""
    text = " ".join(str(error).split())
    return text or type(error).__name__
