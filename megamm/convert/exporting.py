"""megamm -> Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from megamm.config import Recipe
from megamm.convert import processor
from megamm.convert.engine import MAX_SHARD_BYTES, check_new, export_tensors, staged, write_json
from megamm.convert.tables import llava
from megamm.convert.tokenizer import tokenizer_config, tokenizer_json
from megamm.data.templates import Template
from megamm.data.tokenizer import MODEL_FILE, Tokenizer
from megamm.errors import InputError

FAMILIES = ("llava",)


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
    checkpoint: Path, out: Path, family: str = "llava", max_shard_bytes: int = MAX_SHARD_BYTES
) -> ExportReport:
    """Write a checkpoint as a Hugging Face model directory that transformers and vLLM load.

    Args:
        checkpoint: a checkpoint, or a run directory (its newest checkpoint).
        out: a new directory.

    Raises:
        InputError: `out` exists, or the model is not of the family.
    """
    from megamm.engine.checkpoint import read_recipe, read_weights, resolve, tokenizer_directory

    if family not in FAMILIES:
        raise InputError(f"--family: there is no {family!r}; choose one of {', '.join(FAMILIES)}")
    check_new(out)
    found = resolve(checkpoint)
    recipe = read_recipe(found)
    llava.check_family(recipe.model)
    return export_llava(read_weights(found), recipe, tokenizer_directory(found), out, max_shard_bytes)


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
    model = recipe.model
    table = llava.table(model)
    report = ExportReport(out, "llava")
    with staged(out) as directory:
        token_ids, image_id = {}, model.image_token_id
        if tokenizer_dir.is_dir():
            tokenizer = _write_tokenizer(directory, tokenizer_dir, recipe)
            token_ids = {
                "bos_token_id": tokenizer.bos_id,
                "eos_token_id": tokenizer.eos_id,
                "pad_token_id": tokenizer.pad_id,
            }
            image_id = tokenizer.image_id
            _write_processor(directory, recipe, report)
            write_json(directory / "generation_config.json", token_ids)
        else:
            report.notes.append("the checkpoint has no tokenizer: neither it nor a processor was exported")
        if image_id is None:
            raise InputError(
                f"{tokenizer_dir}: missing, and the recipe has no model.image_token_id; restore it"
            )
        written = export_tensors(tensors, table, directory, max_shard_bytes)
        dtype = written.dtypes["language.embedding.word_embeddings.weight"]
        if len(set(written.dtypes.values())) > 1:
            report.notes.append(
                f"the weights have several types; transformers will load all in {dtype}, as config.json says"
            )
        write_json(directory / "config.json", llava.to_hf(model, token_ids, image_id, dtype))
        report.files = sorted(path.name for path in directory.iterdir())
        report.num_tensors, report.num_bytes = written.num_tensors, written.num_bytes
    return report


def _write_tokenizer(directory: Path, source: Path, recipe: Recipe) -> Tokenizer:
    """Copy the tokenizer, and describe it to transformers."""
    tokenizer, language = Tokenizer.load(source), recipe.model.language
    if tokenizer.vocab_size > language.vocab_size:
        raise InputError(
            f"{source}: has {tokenizer.vocab_size} tokens, but model.language.vocab_size is"
            f" {language.vocab_size}; use the tokenizer that the model was trained with"
        )
    tokenizer.save(directory)
    write_json(directory / "tokenizer.json", tokenizer_json(tokenizer, directory / MODEL_FILE))
    write_json(directory / "tokenizer_config.json", tokenizer_config(tokenizer, language.max_positions))
    return tokenizer


def _write_processor(directory: Path, recipe: Recipe, report: ExportReport) -> None:
    vision, image = recipe.model.vision, recipe.data.image
    write_json(directory / processor.PREPROCESSOR_FILE, processor.image_processor(vision, image))
    write_json(directory / processor.PROCESSOR_FILE, processor.processor(vision))
    chat = processor.chat_template(Template.by_name(recipe.template))
    if chat is None:
        report.notes.append(f"template {recipe.template} is no template for conversations; none was exported")
    else:
        (directory / "chat_template.jinja").write_text(chat, encoding="utf-8")
