"""Hugging Face -> checkpoint -> a run's checkpoint in any layout -> Hugging Face: every bit comes back."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megamm.convert import export_checkpoint, import_checkpoint
from tests.convert.families import hf_decoder, hf_idefics
from tests.convert.helpers import (
    VOCAB_SIZE,
    assert_bitwise_equal,
    hf_llava,
    hub_layout,
    read_tensors,
    save_hf,
)
from tests.dist.harness import run_distributed

# Odd vocabularies are padded differently in each layout.
SOURCES: dict[str, tuple[str, Any]] = {
    "llava": (
        "llava",
        lambda: hf_llava(text=dict(vocab_size=VOCAB_SIZE + 13), vision=dict(num_hidden_layers=2)),
    ),
    "tied": ("llava", lambda: hf_llava(text=dict(tie_word_embeddings=True), tie_word_embeddings=True)),
    "idefics": ("idefics", hf_idefics),
    "llama": ("llama", lambda: hf_decoder(vocab_size=67, num_key_value_heads=2).bfloat16()),
}
NEVER = {("llama", "tp2"), ("llama", "pp2")}  # a decoder alone is not trained
LAYOUTS = {"tp2": {"tensor": 2, "sequence": True}, "pp2": {"pipeline": 2}}


def load_and_save(folder: str, layouts: dict[str, dict[str, Any]]) -> None:
    """On every rank: fill a model from each imported checkpoint in each layout; save it as training does."""
    from megatron.core import parallel_state

    from megamm.config import ParallelConfig
    from megamm.engine import checkpoint
    from megamm.engine.checkpoint import Progress
    from megamm.models.freezing import part_of
    from tests.dist.workers import Run

    for layout, parallel in layouts.items():
        for source in sorted(Path(folder).glob("*.ckpt")):
            stored = checkpoint.read_recipe(source)
            if stored.model.assembly == "language":
                continue  # trained in no layout
            if parallel_state.model_parallel_is_initialized():
                parallel_state.destroy_model_parallel()
            recipe = replace(stored, parallel=ParallelConfig(**parallel), seed=3)
            recipe.data.sequence_length, recipe.data.max_images = 32, 2
            recipe.checkpoint.asynchronous, recipe.optimizer.weight_decay = False, 0.0
            run = Run(recipe)
            assert checkpoint.load_weights(source, run.models, run.layout, part_of) == []
            # a step without gradients changes nothing, but the optimizer has a state to save
            for model in run.wrapped:
                model.zero_grad_buffer()
            run.optimizer.step()
            words, out = source / "tokenizer", source.with_suffix(f".{layout}") / "checkpoints"
            copy = partial(shutil.copytree, words) if words.is_dir() else lambda directory: None
            state = (run.models, run.optimizer, recipe)
            checkpoint.Checkpoints(out, *state, copy, run.layout, print).save(Progress(1, 1))


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every source as a directory of shards, as an imported checkpoint, and as one of each layout."""
    root = tmp_path_factory.mktemp("layouts")
    for name, (_, make) in SOURCES.items():
        model = make()
        if name in ("llava", "tied"):
            save_hf(model, tokenizer, root / name, max_shard_size="30KB")
        else:
            model.save_pretrained(root / name, max_shard_size="30KB")
        import_checkpoint([root / name], root / f"{name}.ckpt")
    run_distributed(2, "tests.convert.test_layouts:load_and_save", {"folder": str(root), "layouts": LAYOUTS})
    return root


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name in SOURCES for layout in ("ckpt", *LAYOUTS) if (name, layout) not in NEVER],
)
def test_every_bit_comes_back(name: str, layout: str, folder: Path, tmp_path: Path) -> None:
    family = SOURCES[name][0]
    report = export_checkpoint(folder / f"{name}.{layout}", tmp_path / "out", family, max_shard_bytes=20_000)
    assert len([file for file in report.files if file.endswith(".safetensors")]) > 1
    assert_bitwise_equal(read_tensors(tmp_path / "out"), hub_layout(read_tensors(folder / name)))
