"""Hugging Face -> megamm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from megamm.config import (
    DataConfig,
    ModelConfig,
    ParallelConfig,
    Recipe,
    TrainingConfig,
    compared_values,
)
from megamm.convert.engine import check_new
from megamm.convert.processor import image_config_of
from megamm.convert.sources import Assembled, Source, combined, left_open, new_connector, open_sources
from megamm.convert.tokenizer import tokenizer_from_hf
from megamm.data.tokenizer import IMAGE_TOKEN, Tokenizer
from megamm.errors import InputError, RunError

_ANY_WEIGHT = "language.decoder.final_layernorm.weight"  # every decoder has it
_ALONE = {
    "language",
    "vision",
}  # parts that may be imported without the others, and the name of that assembly


@dataclass(frozen=True)
class Imported:
    """A model that is ready to be written as a checkpoint.

    Attributes:
        tensors: whole tensors under their checkpoint names, read when asked for; vocabulary not padded.
        tokenizer: None if the sources came without one; the model can compute logits, but knows no text.
        skipped: keys of the sources that were left out -> reason.
        notes: what the user should know besides.
    """

    tensors: Assembled
    model: ModelConfig
    tokenizer: Tokenizer | None
    skipped: dict[str, str]
    notes: list[str]


def import_checkpoint(
    sources: list[Path],
    out: Path,
    recipe: Recipe | None = None,
    tokenizer: Path | None = None,
    parallel: ParallelConfig | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Make a checkpoint of a published model, or of one put together from several.

    Args:
        sources: Hugging Face model directories, or files of weights.
        out: the new checkpoint.
        recipe: what the model must be; needed for separate parts, as none says what they are to become.
            Without it the recipe in the checkpoint is made from the sources.
        tokenizer: a tokenizer directory or file, where the sources have none.
        parallel: layout that the recipe in the checkpoint names; the weights are stored for any.
        report: takes lines about what was left out.

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
    full = replace(recipe, model=found.model) if recipe else _recipe_for(found, sources, out)
    full = replace(full, parallel=parallel or full.parallel)
    validate(full)
    try:
        if out.is_dir():
            out.rmdir()  # empty
        with TemporaryDirectory() as scratch:
            if found.tokenizer is not None:
                found.tokenizer.save(scratch)
            words = Path(scratch) if found.tokenizer else None
            written = write_weights(out, found.tensors.streamed(), full, words)
    except OSError as error:
        raise RunError(
            f"{out}: cannot be written ({error.strerror or error}); free space or choose another --out"
        ) from None
    for line in [*_counted(found.skipped), *found.notes]:
        report(line)
    return written


def _counted(skipped: dict[str, str]) -> Iterator[str]:
    """One line for each reason."""
    for reason in dict.fromkeys(skipped.values()):
        keys = [key for key in skipped if skipped[key] == reason]
        yield f"left out {len(keys)} tensor(s), {keys[0]}{', ...' if len(keys) > 1 else ''}: {reason}"


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
    opened = open_sources(sources, recipe.model if recipe else None)
    found = combined(opened)
    _refuse_missing_parts(opened, recipe)
    model = found
    if recipe is not None:
        _refuse_differences(opened, found, recipe.model)
        model = recipe.model
    words = _tokenizer(opened, model, recipe, tokenizer)
    if recipe is None and any(source.reading.lacks_image_token for source in opened):
        model = _with_image_token(model, words)
    if words is not None:
        _check_tokens(words, model, opened)
    else:
        image_ids = [source.image_id for source in opened if source.image_id is not None]
        model = replace(model, image_token_id=image_ids[0] if image_ids else model.image_token_id)
    new, notes = _new_parts(opened, model, recipe)
    skipped = {key: why for source in opened for key, why in source.tensors.skipped.items()}
    return Imported(Assembled(opened, model, new), model, words, skipped, notes)


def _refuse_missing_parts(opened: list[Source], recipe: Recipe | None) -> None:
    parts = {part for source in opened for part in source.parts} - {"lora"}
    assembly = recipe.model.assembly if recipe else None
    is_part_alone = assembly in parts or (assembly is None and len(parts) == 1 and parts <= _ALONE)
    for part in ("language", "vision") if not is_part_alone else ():
        if part not in parts:
            raise InputError(f"--from: no {part} model among the sources; add the directory of one")
    if recipe is None and not is_part_alone and "connector" not in parts:
        raise InputError(
            "--recipe: needed for separate parts; it says which vision features are taken, what connects them"
            " with the language model, and how many tokens there are"
        )


def _new_parts(
    opened: list[Source], model: ModelConfig, recipe: Recipe | None
) -> tuple[dict[str, Tensor], list[str]]:
    """What no source has: a projector is drawn, other parts are left for the start of training."""
    there = {part for source in opened for part in source.parts}
    wanted = {
        "connector": model.assembly not in _ALONE,
        "cross_attention": model.assembly == "cross_attention",
        "lora": model.lora.rank > 0,
    }
    missing = [part for part, is_wanted in wanted.items() if is_wanted and part not in there]
    if missing == ["connector"] and model.connector.kind == "mlp":
        holder = next(source for source in opened if "language" in source.parts)
        new = new_connector(model, recipe.seed if recipe else 1, holder.tensors.dtype(_ANY_WEIGHT))
        return new, ["no source has a connector: it starts from random numbers"]
    return {}, [
        f"no source has {part}: training.init_from this checkpoint draws random numbers for it"
        for part in missing
    ]


def _refuse_differences(opened: list[Source], found: ModelConfig, wanted: ModelConfig) -> None:
    """Every value that the sources say has to be the recipe's; what they leave open is not compared."""
    ours, theirs = compared_values(wanted), compared_values(found)
    parts = {part for source in opened for part in source.parts}
    is_whole = "connector" in parts or found.assembly in _ALONE
    ignored = {f"model.{key}" for key in left_open(opened)}
    if not is_whole:
        ignored.add("model.assembly")
    vocab_size = "model.language.vocab_size"
    if (
        found.assembly not in _ALONE
        and _tokens_may_be_added(opened)
        and theirs[vocab_size] <= ours[vocab_size]
    ):
        ignored.add(vocab_size)
    different = [
        f"{key} is {ours[key]!r} in the recipe and {theirs[key]!r} in the sources"
        for key in ours
        if (key == "model.assembly" or key.split(".")[1] in parts)
        and key not in ignored
        and ours[key] != theirs[key]
    ]
    if different:
        raise InputError(f"--recipe: describes another model: {'; '.join(different)}; correct the recipe")


def _tokens_may_be_added(opened: list[Source]) -> bool:
    """Whether the language model knows no images: it stands apart from the connector, or has no `<image>`."""
    holders = [source for source in opened if "language" in source.parts]
    return any("connector" not in h.parts or h.reading.lacks_image_token for h in holders)


def _tokenizer(
    opened: list[Source], model: ModelConfig, recipe: Recipe | None, given: Path | None
) -> Tokenizer | None:
    if given is not None:
        return Tokenizer.load(given)
    for source in opened:
        # A CLIP directory has a tokenizer too, that of its text tower.
        if "language" in source.parts and (found := tokenizer_from_hf(source.path)):
            return found
    if recipe is not None and Path(recipe.tokenizer).exists():
        return Tokenizer.load(recipe.tokenizer)
    if model.assembly in _ALONE or any("connector" in source.parts for source in opened):
        return None  # its configuration says all that the weights need
    names = ", ".join(str(source.path) for source in opened)
    raise InputError(
        f"{names}: no tokenizer.model or tokenizer.json; copy it there or name one with --tokenizer"
    )


def _with_image_token(model: ModelConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    """One more token, if that is what the tokenizer has; without a tokenizer, the next id."""
    size = model.language.vocab_size
    if tokenizer is not None and (tokenizer.vocab_size, tokenizer.image_id) != (size + 1, size):
        return model
    return replace(model, language=replace(model.language, vocab_size=size + 1), image_token_id=size)


def _check_tokens(tokenizer: Tokenizer, model: ModelConfig, opened: list[Source]) -> None:
    num_tokens = tokenizer.vocab_size
    if model.assembly in _ALONE and tokenizer.image_id == num_tokens - 1:
        num_tokens -= 1  # every tokenizer has <image>; a decoder alone needs no embedding for it
    if num_tokens > model.language.vocab_size:
        raise InputError(
            f"tokenizer: has {tokenizer.vocab_size} tokens ({IMAGE_TOKEN} is {tokenizer.image_id}), but the"
            f" model has only {model.language.vocab_size} embeddings; use the tokenizer of this model"
        )
    for source in opened:
        if source.image_id is not None and source.image_id != tokenizer.image_id:
            raise InputError(
                f"{source.path / 'config.json'}: image_token_index is {source.image_id}, but in the"
                f" tokenizer {IMAGE_TOKEN} is {tokenizer.image_id}; use the tokenizer of this model"
            )


def _recipe_for(found: Imported, sources: list[Path], out: Path) -> Recipe:
    """A recipe that says no more than the source does: the model and how its images are prepared."""
    model = found.model
    data = DataConfig()
    if model.assembly != "vision":
        data.sequence_length = min(data.sequence_length, model.language.max_positions)
    if model.assembly not in _ALONE:
        data.image = image_config_of(sources, model.vision.image_size)
    # fp16 has more digits than bf16: only fp32 keeps them
    is_bf16 = found.tensors.dtype(next(iter(found.tensors))) == torch.bfloat16
    return Recipe(
        name=out.name,
        run_dir=str(out.parent),
        tokenizer=str(out / "tokenizer"),
        model=model,
        stage="import",
        data=data,
        training=TrainingConfig(precision="bf16" if is_bf16 else "fp32"),
    )
