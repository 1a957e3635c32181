"""megamm -> Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from megamm.config import LoraConfig, ModelConfig, Recipe
from megamm.convert.engine import (
    MAX_SHARD_BYTES,
    InMemory,
    OurSource,
    check_new,
    export_pickle,
    export_tensors,
    staged,
    write_json,
)
from megamm.convert.families import exported
from megamm.convert.family import Export, Target
from megamm.convert.tables.llama import EMBEDDING
from megamm.convert.tokenizer import write_tokenizer
from megamm.data.tokenizer import Tokenizer
from megamm.errors import InputError
from megamm.layers.lora import merged
from megamm.models.freezing import part_of


@dataclass
class ExportReport:
    """What was written.

    Attributes:
        num_tensors: in their format.
        num_bytes: of the weights, without headers.
        files: names inside `out`.
        notes: what the user should know.
    """

    out: Path
    family: str
    num_tensors: int = 0
    num_bytes: int = 0
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    family: str = "llava",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    merge_lora: bool = False,
) -> ExportReport:
    """Write a checkpoint as a Hugging Face model directory.

    The checkpoint is verified while it is converted: `out` only appears if every byte was as it was saved.

    Args:
        checkpoint: a checkpoint, or a run directory (its newest checkpoint).
        out: a new directory.
        family: whose format it gets.
        merge_lora: add the adapters to the weights that they adapt, also if the family has a place for them.

    Raises:
        InputError: `out` exists, the checkpoint is damaged, the model is not of the family, or there are no
            adapters to merge.
    """
    from megamm.engine.checkpoint import Verification, WeightFiles, read_recipe, resolve, tokenizer_directory

    exported(family)
    check_new(out)
    found = resolve(checkpoint)
    with Verification(found) as verification:
        recipe, words = read_recipe(found), tokenizer_directory(found)
        source = WeightFiles(found / "shards")
        return _export(source, recipe, words, out, family, max_shard_bytes, verification.wait, merge_lora)


def export_llava(
    tensors: Mapping[str, Tensor],
    recipe: Recipe,
    tokenizer_dir: Path,
    out: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ExportReport:
    """Write whole tensors under their checkpoint names as LlavaForConditionalGeneration.

    The directory also holds megamm's own tokenizer files, so that it can be imported again.

    Raises:
        InputError: `out` exists, tensors or tokenizer do not fit the recipe, or LLaVA cannot express it.
    """
    source = InMemory(tensors)
    return _export(source, recipe, tokenizer_dir, out, "llava", max_shard_bytes, check=lambda: None)


def _export(
    source: OurSource,
    recipe: Recipe,
    tokenizer_dir: Path,
    out: Path,
    family: str,
    max_shard_bytes: int,
    check: Callable[[], None],
    merge_lora: bool = False,
) -> ExportReport:
    """Write everything, `check`, and only then give the directory its name."""
    export, report = exported(family), ExportReport(out, family)
    if merge_lora:
        _refuse_merging_nothing(recipe.model, export, family)
    if recipe.model.lora.rank and (merge_lora or "lora" not in export.parts):
        source = _Merged(source, recipe.model)
        recipe = replace(recipe, model=replace(recipe.model, lora=LoraConfig()))
        report.notes.append("the adapters (LoRA) were added to the weights that they adapt")
    table = export.table(_with_image_id(recipe.model, tokenizer_dir))
    names = [name for name in source if part_of(name) in export.parts]
    left_out = sorted({part_of(name) for name in source} - set(export.parts))
    if left_out:
        report.notes.append(f"family {family} has no place for {', '.join(left_out)}, which were left out")
    with staged(out) as directory:
        # 1. small files: a model that cannot be expressed is found before the weights are written
        words = tokenizer_dir if "language" in export.parts else None
        target = _target(directory, recipe, words, _dtype(source, names, report), report, export)
        if export.config is not None:
            write_json(directory / "config.json", export.config(target))
        export.extras(target)
        # 2. the weights
        written = export_tensors(source, names, table, directory, max_shard_bytes, export.only_file)
        if export.pickle is not None:
            file, some = export.pickle[0], export.pickle[1](recipe.model)
            export_pickle(source, some.our_keys(), some, directory / file)
        check()
        report.files = sorted(path.name for path in directory.iterdir())
        report.num_tensors, report.num_bytes = written.num_tensors, written.num_bytes
    return report


def _refuse_merging_nothing(model: ModelConfig, export: Export, family: str) -> None:
    if not model.lora.rank:
        raise InputError("--merge-lora: the checkpoint has no adapters (LoRA); export it without this option")
    if export.parts == ("lora",):
        raise InputError(
            f"--merge-lora: family {family} is the adapters alone; leave the option out, or choose another"
            " --family"
        )


def _dtype(source: OurSource, names: list[str], report: ExportReport) -> torch.dtype:
    """The one type that config.json can name: that of the embedding, if there is one."""
    dtypes = {name: source.dtype(name) for name in names}
    if not dtypes:
        raise InputError(
            f"--family: the checkpoint has none of the weights of {report.family}; choose another"
        )
    dtype = dtypes.get(EMBEDDING, next(iter(dtypes.values())))
    if len(set(dtypes.values())) > 1:
        report.notes.append(
            f"the weights have several types; transformers will load all in {dtype}, as config.json says"
        )
    return dtype


def _with_image_id(model: ModelConfig, tokenizer_dir: Path) -> ModelConfig:
    """A format without `<image>` has to know which row to leave out."""
    if not tokenizer_dir.is_dir():
        return model
    return replace(model, image_token_id=Tokenizer.load(tokenizer_dir).image_id)


def _target(
    directory: Path,
    recipe: Recipe,
    tokenizer_dir: Path | None,
    dtype: torch.dtype,
    report: ExportReport,
    export: Export,
) -> Target:
    """The directory with its tokenizer, if one belongs into it (a directory is named) and is there."""
    target = Target(directory, recipe, None, {}, recipe.model.image_token_id, dtype, report.notes)
    if tokenizer_dir is None:
        return target
    if not tokenizer_dir.is_dir():
        report.notes.append("the checkpoint has no tokenizer, so none was exported")
        return target
    tokenizer = _write_tokenizer(target, tokenizer_dir, export.has_image_token)
    target.token_ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    target.tokenizer, target.image_id = tokenizer, tokenizer.image_id
    return target


def _write_tokenizer(target: Target, source: Path, has_image_token: bool) -> Tokenizer:
    """Copy the tokenizer, and describe it to transformers: without `<image>`, where that is the last token
    and the format has none."""
    tokenizer, language = Tokenizer.load(source), target.model.language
    has_images = target.model.assembly != "language"
    if tokenizer.vocab_size > language.vocab_size and has_images:
        raise InputError(
            f"{source}: has {tokenizer.vocab_size} tokens, but model.language.vocab_size is"
            f" {language.vocab_size}; use the tokenizer that the model was trained with"
        )
    has_images &= has_image_token or tokenizer.image_id < tokenizer.vocab_size - 1
    write_tokenizer(tokenizer, target.directory, language.max_positions, has_images)
    return tokenizer


class _Merged:
    """A checkpoint whose adapters are added to the weights that they adapt."""

    def __init__(self, source: OurSource, model: ModelConfig) -> None:
        self._source, self._model = source, model

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._source if part_of(name) != "lora")

    def __getitem__(self, name: str, /) -> Tensor:
        return merged(name, self._source.__getitem__, self._model)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)
