"""`megamm data stats`: distributions of lengths, images and labels, and how full rows become."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np

from megamm.data.indexed import PreparedDataset
from megamm.data.inspect.histogram import PERCENTILES, Histogram
from megamm.data.inspect.limits import Limits
from megamm.data.inspect.progress import Progress
from megamm.data.inspect.repeats import blocks
from megamm.data.order import samples_at
from megamm.data.packing import pack_prefix

BLOCK = 4096  # samples that are looked at together
PACKED_STEPS = 64  # that packing is tried on


@dataclass
class Packing:
    """How full the rows of a step become, measured on steps in training order.

    Attributes:
        positions: of a row; max_images: that it has room for; rows: of a step; steps: that were packed.
        packed: share of the positions of packed rows that hold a sample.
        padded: the same with one sample per row.
        samples_per_row: of packed rows, on average.
    """

    positions: int
    max_images: int
    rows: int
    steps: int
    packed: float
    padded: float
    samples_per_row: float


@dataclass
class Statistics:
    """What was measured.

    Attributes:
        samples: that were looked at, of `all_samples`.
        tokens, learnt: stored tokens of them, and those that carry loss.
        histograms: by name; those that have nothing to show are left out.
        truncation: what the limits cut, where there are any.
    """

    directory: Path
    all_samples: int
    samples: int
    tokens: int = 0
    learnt: int = 0
    histograms: dict[str, Histogram] = field(default_factory=dict)
    truncation: Optional[dict[str, int]] = None
    packing: Optional[Packing] = None

    def content(self) -> dict[str, Any]:
        """Everything for scripts."""
        return {
            "directory": str(self.directory),
            "samples": self.all_samples,
            "looked_at": self.samples,
            "tokens": self.tokens,
            "learnt_tokens": self.learnt,
            "distributions": {name: one.content() for name, one in self.histograms.items()},
            "truncation": self.truncation,
            "packing": None if self.packing is None else vars(self.packing),
        }

    def lines(self) -> list[str]:
        """A table for people."""
        share = self.learnt / max(self.tokens, 1)
        drawn = "" if self.samples == self.all_samples else f", {self.samples} of them looked at"
        lines = [
            f"{self.directory}: {self.all_samples} samples{drawn};"
            f" {self.tokens} tokens, {share:.1%} of them carry loss",
            "",
            f"{'':28}" + "".join(f"{_percent(p):>9}" for p in PERCENTILES) + f"{'mean':>10}",
        ]
        for name, one in self.histograms.items():
            values = "".join(f"{_short(one.percentile(p)):>9}" for p in PERCENTILES)
            lines.append(f"{name:28}{values}{_short(one.mean):>10}")
        if self.truncation is not None:
            cut = self.truncation
            lines += [
                "",
                f"truncation: {cut['samples']} samples are cut, {cut['samples_without_images']} of them lose"
                f" {cut['images']} images, {cut['samples_without_loss']} keep nothing to learn;"
                f" {cut['positions']} positions are lost",
            ]
        if (one_packing := self.packing) is not None:
            lines += [
                f"rows of {one_packing.positions} positions: {one_packing.packed:.1%} full when packed"
                f" ({one_packing.samples_per_row:.2f} samples per row, {one_packing.rows} rows a step),"
                f" {one_packing.padded:.1%} with one sample each",
            ]
        return lines


def collect(directory: Path, limits: Limits, sample: int | None, progress: bool = False) -> Statistics:
    """Measure the dataset in `directory`; `sample` samples of it in training order, or all.

    Raises:
        InputError: it is no dataset or damaged.
    """
    dataset = PreparedDataset(directory)
    try:
        collector = _Collector(dataset, limits)
        total = min(sample or len(dataset), len(dataset))
        with Progress("samples", total, progress) as shown:
            for rows in _rows(len(dataset), None if total == len(dataset) else total, limits):
                collector.add(rows)
                shown.advance(len(rows))
        return collector.result(directory, total)
    finally:
        dataset.close()


def _rows(size: int, sample: int | None, limits: Limits) -> Iterator[np.ndarray]:
    for start, stop in blocks(sample or size, BLOCK):
        if sample is None:
            yield np.arange(start, stop)
        else:
            yield samples_at(limits.seed, "stats", start, stop - start, size)


class _Collector:
    """Adds up samples, a block at a time."""

    def __init__(self, dataset: PreparedDataset, limits: Limits) -> None:
        self._dataset, self._limits = dataset, limits
        self._histograms = {
            "tokens": Histogram(),
            "positions": Histogram(),
            "images per sample": Histogram(),
            "learnt tokens": Histogram(),
            "label share": Histogram(0.001),
            "image width": Histogram(),
            "image height": Histogram(),
            "image aspect (width/height)": Histogram(0.01),
        }
        self._tokens = self._learnt = 0
        names = ("samples", "samples_without_images", "images", "samples_without_loss", "positions")
        self._cut = dict.fromkeys(names, 0)

    def add(self, rows: np.ndarray) -> None:
        """Take up the samples `rows` [n]."""
        tokens, images = self._dataset.sizes(rows)
        found, learnt = self._histograms, np.zeros(len(rows), np.int64)
        too_large = self._limits.too_large(tokens, images)
        sizes = []
        for number, row in enumerate(rows.tolist()):
            sample = self._dataset[row]
            learnt[number] = np.count_nonzero(sample.learnt)
            if len(sample.images):
                sizes.append(self._dataset.image_sizes(sample.images))
            if too_large[number]:
                self._add_cut(sample.tokens, sample.learnt, len(sample.images))
        found["tokens"].add(tokens)
        found["positions"].add(self._limits.positions(tokens, images))
        found["images per sample"].add(images)
        found["learnt tokens"].add(learnt)
        found["label share"].add(learnt / np.maximum(tokens, 1))
        if sizes:
            edges = np.concatenate(sizes)
            edges = edges[(edges > 0).all(axis=1)]  # others were not looked at when they were prepared
            found["image width"].add(edges[:, 0])
            found["image height"].add(edges[:, 1])
            found["image aspect (width/height)"].add(edges[:, 0] / edges[:, 1])
        self._tokens += int(tokens.sum())
        self._learnt += int(learnt.sum())

    def _add_cut(self, tokens: np.ndarray, learnt: np.ndarray, images: int) -> None:
        left = self._limits.cut(tokens, learnt, self._dataset.manifest.image_id)
        whole = self._limits.positions(len(tokens), images)
        self._cut["samples"] += left.shorter
        self._cut["samples_without_images"] += left.images < images
        self._cut["images"] += images - left.images
        self._cut["samples_without_loss"] += not left.learnt and bool(learnt[1:].any())
        self._cut["positions"] += whole - left.positions

    def result(self, directory: Path, samples: int) -> Statistics:
        """Everything that was added up."""
        limits, found = self._limits, self._histograms
        if limits.tokens_per_image == 1:
            del found["positions"]
        return Statistics(
            directory,
            len(self._dataset),
            samples,
            self._tokens,
            self._learnt,
            {name: one for name, one in found.items() if one.total},
            self._cut if limits.cuts else None,
            packing(self._dataset, limits) if limits.sequence_length is not None else None,
        )


def packing(dataset: PreparedDataset, limits: Limits) -> Packing:
    """How full rows become that are packed as in training, over at most PACKED_STEPS steps, or one epoch."""
    assert limits.sequence_length is not None
    capacity = limits.row_samples * limits.sequence_length
    most = limits.row_samples * (limits.max_images if limits.max_images is not None else capacity)
    used = samples = steps = start = 0
    while steps < PACKED_STEPS and (steps == 0 or start < len(dataset)):
        lengths, images = _enough(dataset, limits, start, capacity, most)
        rows = pack_prefix(lengths, images, limits.rows, capacity, most)
        count = sum(map(len, rows))
        used += int(lengths[:count].sum())
        start, samples, steps = start + count, samples + count, steps + 1
    places = steps * limits.rows
    return Packing(
        capacity,
        most,
        limits.rows,
        steps,
        used / (places * capacity),
        used / (samples * limits.sequence_length),
        samples / places,
    )


def _enough(
    dataset: PreparedDataset, limits: Limits, start: int, capacity: int, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and images, as cut, of the samples from `start` on that fill more than a step."""
    count = limits.rows * limits.row_samples
    needs = np.empty((2, 0), np.int64)
    while not (needs.sum(axis=1) > [limits.rows * capacity, limits.rows * most]).any():
        at = start + needs.shape[1]
        rows = samples_at(limits.seed, limits.stage, at, count, len(dataset))
        needs = np.concatenate([needs, _needs(dataset, limits, rows)], axis=1)
        count *= 2
    return needs[0], needs[1]


def _needs(dataset: PreparedDataset, limits: Limits, rows: np.ndarray) -> np.ndarray:
    tokens, images = dataset.sizes(rows)
    needs = np.stack([limits.positions(tokens, images), images])
    for i in np.flatnonzero(limits.too_large(tokens, images)).tolist():
        sample = dataset[int(rows[i])]
        left = limits.cut(sample.tokens, sample.learnt, dataset.manifest.image_id)
        needs[:, i] = left.positions, left.images
    return needs


def _percent(percent: int) -> str:
    return {0: "least", 50: "median", 100: "most"}.get(percent, f"{percent} %")


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}" if value < 1 else f"{value:.2f}"
