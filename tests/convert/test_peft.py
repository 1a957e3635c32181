"""Adapters alone: PEFT -> checkpoint -> PEFT bit for bit, the logits of PEFT's own models, refusals."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from megamm.config import LoraConfig, ModelConfig
from megamm.convert import export_checkpoint, import_checkpoint
from megamm.convert.engine import write_json
from megamm.convert.family import Found
from megamm.convert.files import SourceFiles
from megamm.convert.importing import import_sources
from megamm.convert.tables import idefics, infimm, open_flamingo, peft, xcomposer
from megamm.engine import checkpoint, groups
from megamm.errors import InputError
from megamm.inference import load
from tests.convert.families import IMAGE_ID, hf_decoder, hf_idefics
from tests.convert.helpers import VOCAB_SIZE, assert_bitwise_equal, hf_llava, read_tensors, recipe_for
from tests.convert.test_flamingo import model_of
from tests.convert.test_xcomposer import VARIANTS as XCOMPOSERS
from tests.parity.families import by_sample, text_and_images, text_only
from tests.parity.references import peft as reference

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WEIGHTS = "adapter_model.safetensors"
OPTIONS: dict[str, Any] = dict(r=3, lora_alpha=5, lora_dropout=0.25)
# name: the model, PEFT's target_modules, ours, the placeholder of an image
BASES: dict[str, tuple[Callable[[], nn.Module], Any, list[str], int | None]] = {
    "llama": (hf_decoder, ALL, ["q", "k", "v", "o", "gate", "up", "down"], None),
    "mistral": (lambda: hf_decoder(sliding_window=7), ["v_proj", "gate_proj"], ["v", "gate"], None),
    "llava": (
        hf_llava,
        r".*language_model.*\.(q_proj|k_proj|down_proj)",
        ["q", "k", "down"],
        VOCAB_SIZE - 1,
    ),
    "idefics": (
        hf_idefics,
        r"model\.layers\.\d+\.(self_attn|mlp)\.(v_proj|o_proj|up_proj)",
        ["v", "o", "up"],
        IMAGE_ID,
    ),
}


@pytest.fixture(scope="module", autouse=True)
def no_groups_left() -> Iterator[None]:
    yield
    groups.shutdown()


def adapted(base: nn.Module, modules: Any, out: Path) -> nn.Module:
    """A model of PEFT with random adapters, saved to `out` without its base."""
    config = reference().LoraConfig(target_modules=modules, task_type="CAUSAL_LM", **OPTIONS)
    model: Any = reference().get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.4)
    model.save_pretrained(out)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<name>/base, <name>/adapter, and <name>/logits.pt of the two with the ids and images that gave them."""
    root = tmp_path_factory.mktemp("peft")
    for name, (make, modules, _, image_id) in BASES.items():
        base = make()
        base.save_pretrained(root / name / "base")
        theirs = adapted(base, modules, root / name / "adapter")
        inputs = batch_of(base, image_id)
        with torch.no_grad():
            torch.save([inputs, theirs(**inputs).logits], root / name / "logits.pt")
    return root


def batch_of(base: Any, image_id: int | None) -> dict[str, torch.Tensor]:
    if image_id is None:
        return {"input_ids": text_only(base.config.vocab_size).input_ids}
    if base.config.model_type == "llava":
        batch = text_and_images(VOCAB_SIZE, image_id, 4, 28)
        return {"input_ids": batch.input_ids, "pixel_values": batch.images}
    batch = text_and_images(base.config.vocab_size, image_id, 1, 28)
    images, mask = by_sample(batch, image_id)
    return {"input_ids": batch.input_ids, "pixel_values": images, "image_attention_mask": mask}


@pytest.mark.parametrize("name", BASES)
def test_logits_are_those_of_peft_and_every_bit_comes_back(name: str, folder: Path, tmp_path: Path) -> None:
    make, _, targets, image_id = BASES[name]
    sources = [folder / name / "adapter", folder / name / "base"]
    imported = import_checkpoint(sources, tmp_path / "ckpt")
    stored = checkpoint.read_recipe(imported).model
    assert stored.lora == LoraConfig(rank=3, alpha=5.0, dropout=0.25, targets=targets)  # type: ignore[arg-type]

    inputs, wanted = torch.load(folder / name / "logits.pt")
    images = inputs.get("pixel_values")
    if images is not None and images.ndim == 5:  # [B, T, 3, height, width]: the samples have 2, 0 and 1
        images = torch.cat([images[0], images[2, :1]])
    model = load(imported, "cpu", image_token_id=image_id)
    assert wanted.std() > 0.1
    found = model.logits(inputs["input_ids"], images)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    print(f"{name}: {float((found - wanted).abs().max()):.1e}")

    report = export_checkpoint(imported, tmp_path / "out", "peft")
    assert set(report.files) == {"adapter_config.json", WEIGHTS}
    assert_bitwise_equal(read_tensors(tmp_path / "out"), read_tensors(folder / name / "adapter"))
    again: Any = reference().PeftModel.from_pretrained(make(), tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, wanted)
    said, meant = (
        json.loads((where / "adapter_config.json").read_text())
        for where in (tmp_path / "out", folder / name / "adapter")
    )
    assert {key: said[key] for key in said.keys() - {"target_modules"}}.items() <= meant.items()
    assert again.targeted_module_names == reference_names(make(), meant)


def reference_names(base: nn.Module, config: dict[str, Any]) -> list[str]:
    """The modules that PEFT adapts for the configuration that it wrote itself."""
    modules = config["target_modules"]
    made: Any = reference().get_peft_model(base, reference().LoraConfig(target_modules=modules))
    names: list[str] = made.targeted_module_names
    return names


# --- names --------------------------------------------------------------------------------------------

WHOLE: dict[str, tuple[Any, ModelConfig]] = {
    "open_flamingo": (open_flamingo, model_of("clip", {}, small=False)),
    "infimm": (infimm, model_of("eva g", {}, small=False)),
    "xcomposer": (xcomposer, XCOMPOSERS["EVA L, no adapters, no flags"]),
    "idefics": (idefics, idefics.from_hf(hf_idefics().config.to_dict(), "config.json")),
}


@pytest.mark.parametrize("name", WHOLE)
def test_adapters_are_on_the_decoder_of_the_class_that_the_rest_is_exported_to(name: str) -> None:
    """These classes have the names of their modules in files, too."""
    family, model = WHOLE[name]
    linears = {key.removesuffix(".weight") for key in family.table(model).their_keys()}
    model = replace(model, lora=LoraConfig(rank=2, targets=["q", "gate", "down"]))
    keys = list(peft.table(model).their_keys())
    modules = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in keys}
    pattern = peft.to_peft(model)["target_modules"]
    assert modules == {name for name in linears if re.fullmatch(pattern, name)}
    assert len(keys) == 2 * len(modules) == 2 * 3 * model.language.num_layers


def adapter(folder: Path, out: Path, name: str = "llava") -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(folder / name / "adapter", out))


def renamed(directory: Path, old: str, new: str) -> None:
    tensors = load_file(directory / WEIGHTS)
    save_file({key.replace(old, new): tensor for key, tensor in tensors.items()}, directory / WEIGHTS)


def edit(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "adapter_config.json").read_text())
    write_json(directory / "adapter_config.json", {**config, **changes})


def test_names_before_transformers_4_52(folder: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    old = adapter(folder, tmp_path / "old")
    renamed(old, "model.model.language_model.layers", "model.language_model.model.layers")
    import_checkpoint([folder / "llava" / "base", old], tmp_path / "ckpt", tokenizer=tokenizer_dir)
    report = export_checkpoint(tmp_path / "ckpt", tmp_path / "out", "peft")
    assert_bitwise_equal(read_tensors(tmp_path / "out"), read_tensors(folder / "llava" / "adapter"))
    assert set(report.files) == {"adapter_config.json", WEIGHTS}  # the tokenizer is the base's


@pytest.mark.parametrize("is_named", [False, True])
def test_pickled_adapters_among_the_files_of_a_training_run(
    is_named: bool, folder: Path, tmp_path: Path
) -> None:
    run = adapter(folder, tmp_path / "run", "llama")
    torch.save(load_file(run / WEIGHTS), run / "adapter_model.bin")
    (run / WEIGHTS).unlink()
    torch.save({"lr": 0.1}, run / "training_args.bin")
    (run / "config.json").write_text((folder / "llama" / "base" / "config.json").read_text())
    source = run / "adapter_model.bin" if is_named else run
    assert peft.FAMILY.recognises(Found(source, {}, SourceFiles(source)))
    import_checkpoint([folder / "llama" / "base", source], tmp_path / "ckpt")
    export_checkpoint(tmp_path / "ckpt", tmp_path / "out", "peft")
    assert_bitwise_equal(read_tensors(tmp_path / "out"), read_tensors(folder / "llama" / "adapter"))


def test_a_model_with_its_adapters_beside_it_is_a_model(folder: Path, tmp_path: Path) -> None:
    """As a directory is that PEFT's adapters were merged into."""
    both = Path(shutil.copytree(folder / "llama" / "base", tmp_path / "both"))
    shutil.copytree(folder / "llama" / "adapter", both, dirs_exist_ok=True)
    assert import_sources([both], None, None).model.lora.rank == 0


def test_a_recipe_says_the_same_or_is_refused(folder: Path) -> None:
    sources = [folder / "llama" / "base", folder / "llama" / "adapter"]
    recipe = recipe_for(import_sources(sources, None, None).model)
    recipe.model.lora.targets.reverse()
    recipe.model.lora.dropout = 0.5  # how they are trained on is free
    found = import_sources(sources, recipe, None)
    assert found.model.lora.dropout == 0.5
    recipe.model.lora.rank = 4
    with pytest.raises(InputError, match=r"model\.lora\.rank is 4 in the recipe and 3 in the sources"):
        import_sources(sources, recipe, None)


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(peft_type="IA3"), "peft_type is 'IA3'"),
        (dict(use_rslora=True), "use_rslora is True, which plain adapters"),
        (dict(use_dora=True), "use_dora is True"),
        (dict(bias="lora_only"), "bias is 'lora_only'"),
        (dict(modules_to_save=["lm_head"]), r"modules_to_save is \['lm_head'\]"),
        (dict(rank_pattern={"q_proj": 4}), "rank_pattern is"),
        (dict(alpha_pattern={"q_proj": 4}), "alpha_pattern is"),
        (dict(layers_to_transform=[0]), r"layers_to_transform is \[0\]"),
        (dict(a_variant_of_next_year={"x": 1}), "a_variant_of_next_year is"),
        (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights is 'pissa_niter_4'"),
        (dict(target_modules=None), "target_modules is None"),
        (dict(target_modules=["q_proj"]), r"also has .*\.down_proj.*nowhere else"),
        (dict(target_modules=[*ALL, "q_proj"]), r"lacks .*gate_proj"),
        (dict(r=4), r"q_proj\.lora_A\.weight has shape \[3, 32\], but the configuration says \[4, 32\]"),
        (dict(r="8"), "r is '8', but must be a positive whole number"),
        (dict(lora_alpha=-1), "lora_alpha is -1"),
    ],
)
def test_what_adapters_cannot_be(changes: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    source = adapter(folder, tmp_path / "bad")
    edit(source, **changes)
    with pytest.raises(InputError, match=message) as caught:
        import_sources([folder / "llava" / "base", source], None, None)
    assert "\n" not in str(caught.value)


def test_adapters_of_the_encoder_are_refused(folder: Path, tmp_path: Path) -> None:
    """PEFT's short names mean CLIP's projections as well."""
    adapted(hf_llava(), ["q_proj"], tmp_path / "both")
    with pytest.raises(InputError, match=r"also has base_model\.model\.model\.vision_tower\..*nowhere else"):
        import_sources([folder / "llava" / "base", tmp_path / "both"], None, None)


def test_adapters_of_some_layers_are_refused(folder: Path, tmp_path: Path) -> None:
    adapted(hf_decoder(), r".*\.1\..*q_proj", tmp_path / "some")
    with pytest.raises(InputError, match=r"lacks .*layers\.0\.self_attn\.q_proj\.lora_A.* all 2 decoder"):
        import_sources([folder / "llama" / "base", tmp_path / "some"], None, None)


def test_adapters_need_a_model(folder: Path, tmp_path: Path) -> None:
    source = folder / "llama" / "adapter"
    with pytest.raises(InputError, match="adapters need the model that they adapt"):
        import_sources([source], None, None)
    recipe = recipe_for(import_sources([folder / "llama" / "base", source], None, None).model)
    with pytest.raises(InputError, match="no language model among the sources"):
        import_sources([source], recipe, None)
    with pytest.raises(InputError, match="both hold a lora model"):
        import_sources([folder / "llama" / "base", source, source], None, None)


def test_export_of_what_is_not_there(folder: Path, tmp_path: Path) -> None:
    import_checkpoint([folder / "llama" / "base"], tmp_path / "plain")
    with pytest.raises(InputError, match="no adapters to export; choose another --family"):
        export_checkpoint(tmp_path / "plain", tmp_path / "out", "peft")
    import_checkpoint([folder / "llama" / "base", folder / "llama" / "adapter"], tmp_path / "adapted")
    with pytest.raises(InputError, match="family peft is the adapters alone"):
        export_checkpoint(tmp_path / "adapted", tmp_path / "out", "peft", merge_lora=True)
    assert not (tmp_path / "out").exists()
