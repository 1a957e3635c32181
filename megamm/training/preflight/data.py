"""Whether the data of a stage are what its recipe takes them for, by a sample of their rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from megamm.config import Recipe
from megamm.data.indexed import PreparedDataset
from megamm.data.inspect.check_images import ImageCheck
from megamm.data.inspect.check_samples import SampleScan
from megamm.data.inspect.findings import PROBLEMS
from megamm.data.inspect.limits import Limits
from megamm.data.tokenizer import Tokenizer
from megamm.engine.groups import Groups
from megamm.engine.ranks import describe
from megamm.errors import InputError
from megamm.training.preflight.found import Found

ROWS, PICTURES = 32, 3  # of each dataset, that each reading rank looks at
# Findings that no good dataset has; the others happen, and training lives with a few.
_FATAL = ("sample", "vocabulary", "placeholders", "learnt_image")


def check_data(recipe: Recipe, layout: Groups, tokenizer: Tokenizer) -> Found:
    """Every source and the validation data, by rows that differ from rank to rank; ranks that read no data
    look at nothing."""
    found = Found()
    if not layout.is_model_leader:
        return found
    data, validation = recipe.data, recipe.validation
    places = {(source.path, source.sequence_length) for source in data.sources()}
    if validation.interval and validation.data is not None:
        places.add((validation.data, max(data.sequence_lengths())))  # as held_out.py reads them
    for path, length in sorted(places):
        try:
            _check_dataset(Path(path), length, recipe, layout, tokenizer, found)
        except InputError as error:
            found.problems.append(str(error))
        except (OSError, ValueError) as error:  # what damaged files lead to, in words that name no file
            found.problems.append(
                f"{path}: cannot be read ({describe(error)}); `megamm data check {path}` tells the damage"
            )
    if validation.interval and validation.questions is not None and not Path(validation.questions).is_file():
        found.problems.append(
            f"validation.questions: {validation.questions} does not exist; correct the path"
        )
    return found


def _check_dataset(
    directory: Path, length: int, recipe: Recipe, layout: Groups, tokenizer: Tokenizer, found: Found
) -> None:
    dataset = PreparedDataset(directory, verify=False)
    try:
        # (the contents of small files are hashed when training opens them)
        dataset.manifest.check_sizes(directory)
        dataset.store.check()
        if dataset.manifest.tokenizer_sha256 != tokenizer.sha256:
            found.problems.append(
                f"{directory}: was prepared with another tokenizer than {recipe.tokenizer}; prepare it again "
                "with this one, or correct the key tokenizer"
            )
            return
        draw = np.random.default_rng([recipe.seed, layout.dp_rank])
        rows = np.unique(draw.integers(len(dataset), size=ROWS)).tolist()
        limits = Limits(
            recipe.model.tokens_per_image,
            length,
            recipe.data.max_images,
            recipe.data.image,
            recipe.model.vision.image_size,
        )
        pictures = _check_rows(dataset, rows, limits, found)
        _check_pictures(dataset, pictures[:PICTURES], limits, found)
    finally:
        dataset.close()


def _check_rows(dataset: PreparedDataset, rows: list[int], limits: Limits, found: Found) -> list[int]:
    """The samples of these rows; returns the images of those that can be read."""
    directory = dataset.directory
    scanned = SampleScan(dataset, limits).scan(rows)
    remedy = f"`megamm data check {directory}` lists all there are"
    for one in scanned.findings:
        if one["kind"] in _FATAL:
            found.problems.append(f"{directory}: row {one['row']}: {one['reason'].rstrip('.')}; {remedy}")
            break
    kinds = Counter(one["kind"] for one in scanned.findings if one["kind"] not in _FATAL)
    unlearnt = kinds["masked"] + kinds["cut_masked"] + kinds["empty"]
    if unlearnt == len(rows):
        found.problems.append(
            f"{directory}: nothing is learnt in any of {len(rows)} rows that were looked at, cut to "
            f"{limits.sequence_length} positions; prepare the dataset with another template, or raise "
            "data.sequence_length"
        )
    for kind, count in kinds.items():
        found.remarks.append(f"{directory}: of {len(rows)} rows, {count} {PROBLEMS[kind]}; {remedy}")
    if scanned.cut:
        found.remarks.append(
            f"{directory}: {scanned.cut} of {len(rows)} rows are cut to {limits.sequence_length} positions "
            f"and {limits.max_images} images"
        )
    return [image for images in scanned.images for image in images.records]


def _check_pictures(dataset: PreparedDataset, images: list[int], limits: Limits, found: Found) -> None:
    if not images:
        return
    bad = ImageCheck(dataset, "decode", limits).look(images).bad
    if not bad:
        return
    text = (
        f"{dataset.directory}: {len(bad)} of {len(images)} pictures cannot be used (the first: {bad[0][1]}); "
        f"`megamm data check {dataset.directory}` lists all there are"
    )
    # training replaces single ones (data.max_bad_images)
    (found.problems if len(bad) == len(images) else found.remarks).append(text)
