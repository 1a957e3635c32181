"""Hugging Face -> megamm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from megamm.config import UNCOMPARED_KEYS, DataConfig, ModelConfig, ParallelConfig, Recipe, TrainingConfig
from megamm.convert.engine import check_new
from megamm.convert.processor import image_config_from_hf
from megamm.convert.sources import Assembled, Source, combined, open_source
from megamm.convert.tables import llava
from megamm.convert.tokenizer import tokenizer_from_hf
from megamm.data.tokenizer import IMAGE_TOKEN, Tokenizer
from megamm.errors import InputError, RunError

_ANY_WEIGHT = "language.decoder.final_layernorm.weight"  # every model has it


@dataclass(frozen=True)
class Imported:
    """A model that is ready to be written as a checkpoint.

    Attributes:
        tensors: whole tensors under their checkpoint names, read when asked for; vocabulary not padded.
        tokenizer: None if a whole model came without one; it can compute logits, but knows no text.
        skipped: keys of the sources that were left out -> reason.
    """

    tensors: Mapping[str, Tensor]
    model: ModelConfig
    tokenizer: Tokenizer | None
    skipped: dict[str, str]


def import_checkpoint(
    sources: list[Path],
    out: Path,
    recipe: Recipe | None = None,
    tokenizer: Path | None = None,
    parallel: ParallelConfig | None = None,
) -> Path:
    """Make a checkpoint of one LLaVA directory, or of a language model and a CLIP encoder.

    Args:
        sources: Hugging Face model directories (safetensors).
        out: the new checkpoint.
        recipe: what the model must be; needed for separate parts, whose features to take no config.json
            says. Without it the recipe in the checkpoint is made from the sources.
        tokenizer: a tokenizer directory or SentencePiece model, where the sources have none.
        parallel: layout that the recipe in the checkpoint names; the weights are stored for any.

    Returns:
        `out`.

    Raises:
        InputError: a source is damaged or incomplete, differs from the recipe, or `out` exists. Nothing is
            left behind then.
    """
    from megamm.engine.checkpoint import write_weights
    from megamm.recipe import validate

    check_new(out)
    found = import_sources(sources, recipe, tokenizer)
    full = replace(recipe, model=found.model) if recipe else _recipe_for(found, sources[0], out)
    full = replace(full, parallel=parallel or full.parallel)
    validate(full)
    try:
        if out.is_dir():
            out.rmdir()  # empty
        with TemporaryDirectory() as scratch:
            if found.tokenizer is not None:
                found.tokenizer.save(scratch)
            return write_weights(out, dict(found.tensors), full, Path(scratch) if found.tokenizer else None)
    except OSError as error:
        raise RunError(
            f"{out}: cannot be written ({error.strerror or error}); free space or choose another --out"
        ) from None


def import_llava(directory: Path) -> Imported:
    """The model in one LLaVA directory, as its config.json describes it.

    Raises:
        InputError: the directory is damaged, incomplete, or holds no LLaVA model.
    """
    return import_sources([directory], None, None)


def import_sources(sources: list[Path], recipe: Recipe | None, tokenizer: Path | None) -> Imported:
    """Open and check everything that `import_checkpoint` needs; writes nothing."""
    if not sources:
        raise InputError("--from: name at least one Hugging Face model directory")
    opened = [open_source(directory) for directory in sources]
    model = combined(opened)
    parts = {part for source in opened for part in source.parts}
    for part in ("language", "vision"):
        if part not in parts:
            raise InputError(f"--from: no {part} model among the sources; add the directory of one")
    words = _tokenizer(opened, recipe, tokenizer)
    if "connector" not in parts:
        model = _with_recipe_choices(model, recipe)
    if recipe is not None:
        _refuse_differences(model, recipe.model)
        model = recipe.model
    llava.check_family(model)
    if words is not None:
        _check_tokens(words, model, opened)
    else:
        model = replace(model, image_token_id=opened[0].image_id)
    skipped = {key: why for source in opened for key, why in source.tensors.skipped.items()}
    seed = recipe.seed if recipe else 1
    tensors = opened[0].tensors if len(opened) == 1 else Assembled(opened, model, seed)
    return Imported(tensors, model, words, skipped)


def _with_recipe_choices(model: ModelConfig, recipe: Recipe | None) -> ModelConfig:
    """Separate parts leave open which features are taken and how large the vocabulary becomes."""
    if recipe is None:
        raise InputError(
            "--recipe: needed for separate parts; it says which vision features are taken and how many tokens"
            " there are"
        )
    wanted = recipe.model
    vision = replace(
        model.vision,
        feature_layer=wanted.vision.feature_layer,
        feature_select=wanted.vision.feature_select,
    )
    vocab_size = max(model.language.vocab_size, wanted.language.vocab_size)
    return replace(model, vision=vision, language=replace(model.language, vocab_size=vocab_size))


def _refuse_differences(found: ModelConfig, wanted: ModelConfig) -> None:
    ours, theirs = _flat(wanted), _flat(found)
    different = [
        f"{key} is {ours[key]!r} in the recipe and {theirs[key]!r} in the sources"
        for key in ours
        if ours[key] != theirs[key]
    ]
    if different:
        raise InputError(f"--recipe: describes another model: {'; '.join(different)}; correct the recipe")


def _flat(model: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"model.assembly": model.assembly, "model.connector.kind": model.connector.kind}
    for section in ("language", "vision"):
        for key, value in asdict(getattr(model, section)).items():
            if key not in UNCOMPARED_KEYS:
                values[f"model.{section}.{key}"] = value
    values["model.language.num_kv_heads"] = model.language.num_kv_heads or model.language.num_heads
    return values


def _tokenizer(opened: list[Source], recipe: Recipe | None, given: Path | None) -> Tokenizer | None:
    if given is not None:
        return Tokenizer.load(given)
    for source in opened:
        # A CLIP directory has a tokenizer too, that of its text tower.
        if "language" in source.parts and (found := tokenizer_from_hf(source.directory)):
            return found
    if recipe is not None and Path(recipe.tokenizer).exists():
        return Tokenizer.load(recipe.tokenizer)
    if opened[0].image_id is not None:
        return None  # a whole model, whose config.json says all that its weights need
    names = ", ".join(str(source.directory) for source in opened)
    raise InputError(
        f"{names}: no tokenizer.model (SentencePiece); copy it there or name one with --tokenizer"
    )


def _check_tokens(tokenizer: Tokenizer, model: ModelConfig, opened: list[Source]) -> None:
    if tokenizer.vocab_size > model.language.vocab_size:
        raise InputError(
            f"tokenizer: has {tokenizer.vocab_size} tokens ({IMAGE_TOKEN} is {tokenizer.image_id}), but the"
            f" model has only {model.language.vocab_size} embeddings; use the tokenizer of this model"
        )
    for source in opened:
        if source.image_id is not None and source.image_id != tokenizer.image_id:
            raise InputError(
                f"{source.directory / 'config.json'}: image_token_index is {source.image_id}, but in the"
                f" tokenizer {IMAGE_TOKEN} is {tokenizer.image_id}; use the tokenizer of this model"
            )


def _recipe_for(found: Imported, source: Path, out: Path) -> Recipe:
    """A recipe that says no more than the source does: the model and how its images are prepared."""
    image = image_config_from_hf(source, found.model.vision.image_size)
    data = DataConfig(sequence_length=min(2048, found.model.language.max_positions), image=image)
    # fp16 has more digits than bf16: only fp32 keeps them
    is_bf16 = found.tensors[_ANY_WEIGHT].dtype == torch.bfloat16
    return Recipe(
        name=out.name,
        run_dir=str(out.parent),
        tokenizer=str(out / "tokenizer"),
        model=found.model,
        stage="import",
        data=data,
        training=TrainingConfig(precision="bf16" if is_bf16 else "fp32"),
    )
