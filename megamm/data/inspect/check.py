"""`megamm data check`: finds everything that is broken in a prepared dataset, and lists it.

In this order: the files of the directory and the containers of the images, all samples, samples that
repeat, all images, each once. Nothing that is found stops the rest, and the findings are the same for
any number of workers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np

from megamm.data.indexed import PreparedDataset
from megamm.data.inspect import check_images, check_samples
from megamm.data.inspect.check_images import Depth, Looked
from megamm.data.inspect.check_samples import Scanned, place_of
from megamm.data.inspect.findings import Account, Report, finding
from megamm.data.inspect.limits import Limits
from megamm.data.inspect.pool import Pool
from megamm.data.inspect.progress import Progress
from megamm.data.inspect.repeats import BLOCK, blocks, repeats, scratch
from megamm.data.manifest import Manifest, file_sha256
from megamm.errors import InputError

SAMPLES_PER_TASK, IMAGES_PER_TASK = 512, 32


@dataclass(frozen=True)
class CheckOptions:
    """How a dataset is checked.

    Attributes:
        limits: what samples are cut to; None: truncation is not looked at.
        images: how far images are read: to the last pixel, to the header, or not at all.
        workers: processes; 0: none but this one.
        listing: a file for all findings, one JSON object per line.
        examples: findings of each kind that the report keeps.
        progress: reports on stderr.
    """

    limits: Optional[Limits] = None
    images: Depth = "decode"
    workers: int = 1
    listing: Optional[Path] = None
    examples: int = 5
    progress: bool = False


def check(directory: Path, options: CheckOptions) -> Report:
    """Look at everything in the dataset `directory`.

    Raises:
        InputError: it is no dataset, or its manifest cannot be read.
        RunError: no room for the listing or for temporary files.
    """
    manifest = Manifest.read(directory)
    report = Report(directory)
    with Account(report, options.examples, options.listing) as account:
        _check_files(directory, manifest, account)
        _check_containers(manifest, account)
        try:
            dataset = PreparedDataset(directory, verify=False)
        except (InputError, OSError, ValueError) as error:
            account.add(finding("structure", check_samples.reason_of(error), source=str(directory)))
            return report
        try:
            _Look(dataset, options, account).run()
        finally:
            dataset.close()
    return report


def _check_files(directory: Path, manifest: Manifest, account: Account) -> None:
    for name, entry in manifest.files.items():
        path, reason = directory / name, None
        account.report.files += 1
        try:
            size = path.stat().st_size
            if size != entry.size:
                reason = f"has {size} bytes where the manifest says {entry.size}"
            elif file_sha256(path) != entry.sha256:
                reason = "its content has changed since `megamm prepare`"
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
        if reason is not None:
            account.add(finding("file", reason, source=str(directory), name=name))


def _check_containers(manifest: Manifest, account: Account) -> None:
    for kind, path, size in manifest.containers:
        reason = None
        if not (os.path.isdir(path) if kind == "folder" else os.path.isfile(path)):
            reason = f"the {'folder' if kind == 'folder' else 'tar file'} of images is gone"
        elif kind != "folder" and (now := os.path.getsize(path)) != size:
            reason = f"has {now} bytes and had {size} at `megamm prepare`"
        if reason is not None:
            account.add(finding("container", reason, source=path, name=os.path.basename(path)))


class _Look:
    """The samples and images of a dataset that can be opened."""

    def __init__(self, dataset: PreparedDataset, options: CheckOptions, account: Account) -> None:
        self._dataset, self._options, self._account = dataset, options, account
        # A file of nothing but numbers for each question that needs all samples or images at once.
        self._keys = scratch(len(dataset), "<u8")
        self._image_keys = scratch(dataset.num_images, "<u8")
        self._image_users = scratch(dataset.num_images, "<i8")  # row + 1; 0: of a sample that cannot be read

    def run(self) -> None:
        self._samples()
        self._duplicates()
        if self._options.images != "none":
            self._images()

    def _samples(self) -> None:
        options, report = self._options, self._account.report
        limits = options.limits if options.limits is not None and options.limits.cuts else None
        report.cut = None if limits is None else 0
        arguments = (self._dataset.directory, limits)
        pool = Pool[int, Scanned](options.workers, check_samples.start_scan, arguments, _crashed_sample)
        with Progress("samples", len(self._dataset), options.progress) as progress:
            for scanned in pool.results(_tasks(len(self._dataset))):
                row, count = report.samples, len(scanned.keys)
                self._keys[row : row + count] = np.array(scanned.keys, np.uint64)
                for images in scanned.images:
                    stretch = slice(images.records.start, images.records.stop)
                    self._image_keys[stretch], self._image_users[stretch] = images.keys, images.row + 1
                report.samples += count
                if report.cut is not None:
                    report.cut += scanned.cut
                for one in scanned.findings:
                    self._account.add(one)
                progress.advance(count)

    def _duplicates(self) -> None:
        first, _ = repeats(self._keys)
        for start, stop in blocks(len(first)):
            rows = np.arange(start, stop)
            for row in rows[first[start:stop] != rows].tolist():
                reason = f"has the tokens and images of row {first[row]}"
                self._account.add(finding("duplicate", reason, row=row, same_as=int(first[row])))

    def _images(self) -> None:
        options, report = self._options, self._account.report
        _, uses = repeats(self._image_keys)
        for a, b in blocks(len(uses)):
            uses[a:b] *= self._image_users[a:b] > 0
        total = sum(int(np.count_nonzero(uses[a:b])) for a, b in blocks(len(uses)))
        arguments = (self._dataset.directory, options.images, options.limits or Limits())
        work, crashed = check_images.start_looking, check_images.crashed
        pool = Pool[int, Looked](options.workers, work, arguments, crashed)
        with Progress("images", total, options.progress) as progress:
            for looked in pool.results(_image_tasks(uses)):
                report.images += looked.images
                for image, reason in looked.bad:
                    self._bad_image(image, reason, int(uses[image]))
                progress.advance(looked.images)

    def _bad_image(self, image: int, reason: str, uses: int) -> None:
        place = place_of(self._dataset, image)
        source = self._dataset.manifest.containers[place.container][1] if place is not None else None
        where = {"row": int(self._image_users[image]) - 1, "image": image, "source": source, "uses": uses}
        name = place.name if place is not None else ""
        self._account.add(finding("image", reason, **where, name=name))


def _image_tasks(uses: np.ndarray) -> Iterator[list[int]]:
    """Each different image once."""
    for start, stop in blocks(len(uses), BLOCK):
        images = (start + np.flatnonzero(uses[start:stop])).tolist()
        for first, last in blocks(len(images), IMAGES_PER_TASK):
            yield images[first:last]


def _tasks(samples: int) -> Iterator[range]:
    for start, stop in blocks(samples, SAMPLES_PER_TASK):
        yield range(start, stop)


def _crashed_sample(row: int) -> Scanned:
    """What is said of a sample that ended the process which read it."""
    findings = [finding("sample", check_images.CRASH, row=row)]
    return Scanned([check_samples.key_of(b"crashed", row)], [], findings)
