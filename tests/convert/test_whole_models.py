"""Families without a class in transformers: published directory -> checkpoint -> a run's checkpoint in any
layout -> published directory, bitwise; and the same logits on both sides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megamm.config import DataConfig, ModelConfig, Recipe
from megamm.convert import export_checkpoint, import_checkpoint
from megamm.convert.engine import write_json
from megamm.convert.families import FAMILIES
from megamm.convert.family import Family
from megamm.convert.tables import clip, llama, open_flamingo
from megamm.engine import groups
from megamm.inference import load
from tests.convert.families import (
    IMAGE_ID,
    export_to,
    random_tensors,
    run_remote,
    target,
)
from tests.convert.helpers import assert_bitwise_equal, read_tensors
from tests.convert.test_flamingo import model_of
from tests.convert.test_layouts import LAYOUTS
from tests.convert.test_xcomposer import VARIANTS as XCOMPOSERS
from tests.dist.harness import run_distributed
from tests.parity.families import text_and_images

MODELS: dict[str, tuple[str, ModelConfig]] = {
    "open_flamingo": ("open_flamingo", model_of("clip", {}, small=False)),
    "infimm": ("infimm", model_of("eva g", dict(sliding_window=7), small=False)),
    "xcomposer": ("xcomposer", XCOMPOSERS["as published"]),
}
BY_NAME: dict[str, Family] = {family.name: family for family in FAMILIES}


@pytest.fixture(scope="module", autouse=True)
def no_groups_left() -> Iterator[None]:
    yield
    groups.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model as a directory, as an imported checkpoint, and as one of each layout."""
    root = tmp_path_factory.mktemp("whole")
    for name, (family, model) in MODELS.items():
        export = BY_NAME[family].export
        assert export is not None
        export_to(root / name, BY_NAME[family], model, random_tensors(export.table(model), std=0.3))
        import_checkpoint([root / name], root / f"{name}.ckpt")
    args = {"folder": str(root), "layouts": LAYOUTS}
    run_distributed(2, "tests.convert.test_layouts:load_and_save", args)
    return root


@pytest.mark.parametrize("layout", ["ckpt", *LAYOUTS])
@pytest.mark.parametrize("name", MODELS)
def test_every_bit_comes_back(name: str, layout: str, folder: Path, tmp_path: Path) -> None:
    family, model = MODELS[name]
    report = export_checkpoint(folder / f"{name}.{layout}", tmp_path / "out", family)
    assert_bitwise_equal(read_tensors(tmp_path / "out"), read_tensors(folder / name))
    assert {"README.md", "config.json", f"modeling_{family}.py", "preprocessor_config.json"} <= set(
        report.files
    )
    if layout != "ckpt":
        return
    batch = text_and_images(
        model.language.vocab_size, IMAGE_ID, model.tokens_per_image, model.vision.image_size
    )
    wanted = load(folder / f"{name}.ckpt", "cpu").logits(batch.input_ids, batch.images)
    found = run_remote(tmp_path / "out", {"input_ids": batch.input_ids, "pixel_values": batch.images})
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_model_from_decoder_encoder_and_checkpoint(tmp_path: Path) -> None:
    """As OpenFlamingo is published; the export has a checkpoint.pt again."""
    model = model_of("clip", {}, small=False)
    plain = replace(model, language=replace(model.language, vocab_size=65))
    parts: dict[str, Any] = {"llama": llama.table(plain.language), "clip": clip.table(model.vision)}
    configs = {"llama": llama.to_hf(plain.language, {}), "clip": clip.to_hf(model.vision)}
    for name, table in parts.items():
        (tmp_path / name).mkdir()
        torch.save(random_tensors(table, std=0.3), tmp_path / name / "pytorch_model.bin")
        write_json(tmp_path / name / "config.json", configs[name])
    trained = random_tensors(open_flamingo.checkpoint_table(model), std=0.5)
    torch.save(trained, tmp_path / "checkpoint.pt")

    recipe = Recipe("flamingo", "unused", "unused", replace(model, image_token_id=IMAGE_ID))
    recipe.data = DataConfig(sequence_length=64)
    sources = [tmp_path / "checkpoint.pt", tmp_path / "clip", tmp_path / "llama"]
    import_checkpoint(sources, tmp_path / "imported", recipe)
    export_checkpoint(tmp_path / "imported", tmp_path / "out", "open_flamingo")
    written = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert_bitwise_equal(written, trained)
    whole = read_tensors(tmp_path / "out")
    assert torch.equal(
        whole["lang_encoder.model.embed_tokens.weight"], trained["lang_encoder.model.embed_tokens.weight"]
    )
    # two output rows for tokens that the decoder does not have: the mean of the others
    source = torch.load(tmp_path / "llama" / "pytorch_model.bin")["lm_head.weight"]
    assert torch.equal(whole["lang_encoder.lm_head.weight"][:65], source)
    torch.testing.assert_close(whole["lang_encoder.lm_head.weight"][65:], source.mean(0).expand(2, -1))


@pytest.mark.parametrize("family", ["infimm", "xcomposer"])
def test_export_says_which_token_is_missing(family: str, tmp_path: Path) -> None:
    from megamm.errors import InputError

    export = BY_NAME[family].export
    assert export is not None and export.config is not None
    with pytest.raises(InputError, match=r"no model\.image_token_id"):
        export.config(target(tmp_path, MODELS[family][1]))
