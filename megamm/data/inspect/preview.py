"""`megamm data preview`: samples of a dataset on one HTML page, as training sees them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from megamm.data.indexed import PreparedDataset, Sample
from megamm.data.inspect import page
from megamm.data.inspect.check_samples import place_of, reason_of
from megamm.data.inspect.limits import Cut, Limits
from megamm.data.inspect.page import Picture, Shown
from megamm.data.inspect.token_text import TokenTexts
from megamm.data.order import samples_at
from megamm.data.thumbnail import thumbnail
from megamm.errors import InputError, RunError
from megamm.whole_files import written_whole

MAX_PICTURES, MAX_TOKENS = 16, 8192  # of a sample
MAX_NAMES = 20  # of sources, and of folders and tars


def write_preview(
    directory: Path,
    out: Path,
    limits: Limits,
    rows: list[int] | None,
    sample: int,
    seed: int,
) -> int:
    """Write the page `out` about the samples `rows`, or `sample` samples drawn by `seed`; how many there are.

    Raises:
        InputError: no dataset, or no such row.
        RunError: the page cannot be written.
    """
    dataset = PreparedDataset(directory, verify=False)
    try:
        chosen = _chosen(dataset, rows, sample, seed)
        previewer = Previewer(dataset, TokenTexts(dataset.tokenizer()), limits)
        try:
            with written_whole(out) as file:
                file.writelines(previewer.page(chosen))
        except OSError as error:
            raise RunError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    finally:
        dataset.close()
    return len(chosen)


def _chosen(dataset: PreparedDataset, rows: list[int] | None, sample: int, seed: int) -> list[int]:
    size = len(dataset)
    if rows is None:
        return sorted(samples_at(seed, "preview", 0, min(sample, size), size).tolist())
    for row in rows:
        if row >= size:
            raise InputError(
                f"--rows: there is no row {row} in {size} samples; give numbers from 0 to {size - 1}"
            )
    return list(dict.fromkeys(rows))


class Previewer:
    """Makes the page of a dataset, piece by piece."""

    def __init__(self, dataset: PreparedDataset, texts: TokenTexts, limits: Limits) -> None:
        self._dataset, self._texts, self._limits = dataset, texts, limits
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, limits.image.max_pixels)

    def page(self, rows: list[int]) -> Iterator[str]:
        """The HTML about the samples `rows`."""
        manifest = self._dataset.manifest
        counts = manifest.counts
        share = counts.get("learnt_tokens", 0) / max(counts.get("tokens", 0), 1)
        summary = (
            f"{len(rows)} of {counts.get('samples', 0):,} samples · {counts.get('images', 0):,} images · "
            f"{counts.get('tokens', 0):,} tokens, {share:.1%} of them carry loss"
        )
        facts = {
            "sources": _few(manifest.sources),
            "format": manifest.source_format,
            "template": manifest.template,
            "instructions": manifest.instructions,
            "tokenizer": f"{manifest.vocab_size} ids, sha256 {manifest.tokenizer_sha256}",
            "images in": _few(list(dict.fromkeys(path for _, path, _ in manifest.containers))),
            "skipped entries": str(counts.get("skipped", 0)),
            "truncation": self._limits_text(),
        }
        yield from page.head(str(self._dataset.directory), summary, facts, rows)
        for row in rows:
            yield from page.article(self.shown(row))
        yield page.foot()

    def shown(self, row: int) -> Shown:
        """What is shown of the sample `row`."""
        try:
            sample = self._dataset[row]
            return self._whole(row, sample)
        except Exception as error:  # damaged files lead to errors of any kind
            return Shown(row, [], error=reason_of(error))

    def _whole(self, row: int, sample: Sample) -> Shown:
        limits, tokens, total = self._limits, sample.tokens, len(sample.images)
        positions = limits.positions(len(tokens), total)
        left = self._cut(sample)
        facts = [
            f"tokens: {len(tokens)}",
            f"learnt: {int(np.count_nonzero(sample.learnt))}",
            f"images: {total}",
        ]
        if limits.tokens_per_image > 1:
            facts.append(f"positions: {positions}")
        cut_text = ""
        if left is not None:
            images = f"{left.images} of {total} images"
            cut_text = f"✂ cut here: {left.positions} of {positions} positions and {images} are left"
            if not left.learnt:
                cut_text += ", nothing to learn"
        kept = left.images if left is not None else total
        return Shown(
            row,
            facts,
            self._texts.pieces(tokens[:MAX_TOKENS].tolist()),
            (sample.learnt[:MAX_TOKENS] != 0).tolist(),
            [self._picture(image, n >= kept) for n, image in enumerate(sample.images[:MAX_PICTURES])],
            None if left is None else left.tokens,
            cut_text,
            max(0, len(tokens) - MAX_TOKENS),
            max(0, total - MAX_PICTURES),
        )

    def _cut(self, sample: Sample) -> Cut | None:
        """What truncation leaves of a sample; None: all."""
        if not self._limits.cuts:
            return None
        left = self._limits.cut(sample.tokens, sample.learnt, self._dataset.manifest.image_id)
        return left if left.shorter else None

    def _picture(self, image: int, lost: bool) -> Picture:
        place = place_of(self._dataset, image)
        if place is None:
            return Picture("", "", "", None, "the record of this image is damaged", lost)
        source = self._dataset.store.source(place)
        facts = f"{place.length:,} bytes"
        try:
            uri, size = thumbnail(self._dataset.read_image(image), self._limits.image.max_pixels)
        except Exception as error:  # readers meet damaged bytes with exceptions of any kind
            return Picture(place.name, source, facts, None, reason_of(error), lost)
        return Picture(place.name, source, f"{size[0]} x {size[1]} · {facts}", uri, "", lost)

    def _limits_text(self) -> str:
        limits = self._limits
        parts = []
        if limits.sequence_length is not None:
            parts.append(f"at {limits.sequence_length} positions, {limits.tokens_per_image} for an image")
        if limits.max_images is not None:
            parts.append(f"at {limits.max_images} images")
        return ", ".join(parts) or "none asked for"


def _few(names: list[str]) -> str:
    """Names with commas between them; many are counted instead."""
    more = [f"and {len(names) - MAX_NAMES} more"] if len(names) > MAX_NAMES else []
    return ", ".join(names[:MAX_NAMES] + more)
