"""What lies in a checkpoint beside its tensors, and checkpoints of weights alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch

from megamm.config import Recipe
from megamm.engine import manifest as manifests
from megamm.engine.manifest import INCOMPLETE, FileEntry, Manifest
from megamm.engine.weight_files import StreamedTensor, whole_tensors, write_streamed
from megamm.errors import InputError
from megamm.recipe import recipe_hash, recipe_to_yaml


def describe_run(directory: Path, recipe: Recipe, tokenizer: Callable[[Path], object] | None) -> None:
    """Write the recipe, and the tokenizer by what writes it into a directory."""
    (directory / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    if tokenizer is not None:
        tokenizer(directory / "tokenizer")


def all_files(directory: Path, hashed: dict[str, FileEntry]) -> dict[str, FileEntry]:
    """Size and hash of every file below `directory`; only those not yet `hashed` are read."""
    names = manifests.files_below(directory)
    return {name: hashed.get(name) or manifests.hash_file(directory / name) for name in names}


def write_weights(
    out: Path,
    tensors: Mapping[str, torch.Tensor] | Iterable[StreamedTensor],
    recipe: Recipe,
    tokenizer: Path | None,
) -> Path:
    """Write a checkpoint of weights only, from one process; any layout can load it.

    Args:
        out: the checkpoint's directory; must not exist.
        tensors: whole tensors by their checkpoint names, or such as are made when they are written.
        recipe: describes the model.
        tokenizer: directory that is copied along, if there is one.
    Raises:
        InputError: `out` exists.
    """
    if out.exists():
        raise InputError(f"{out}: already exists; choose another --out or remove it")
    streamed = whole_tensors(tensors) if isinstance(tensors, Mapping) else tensors
    temporary = out.parent / f"{INCOMPLETE}{out.name}"
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    try:
        (temporary / "shards").mkdir(parents=True)
        written = write_streamed(streamed, temporary / "shards")
        describe_run(temporary, recipe, partial(shutil.copytree, tokenizer) if tokenizer else None)
        hashed = {path.relative_to(temporary).as_posix(): entry for path, entry in written.items()}
        layout = {"tensor": 1, "pipeline": 1, "data": 1}
        manifest = Manifest(0, 0, layout, recipe_hash(recipe), False, all_files(temporary, hashed))
        # what the weights came from is still there: no need to wait for the disk
        manifests.commit(temporary, out, manifest, durable=False)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out
