"""The preset `tiny`: the same stage in small, with files of its own; overrides have the last word."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megamm.config import PartOptimizerConfig, Recipe
from megamm.errors import InputError
from megamm.recipe import load_recipe, recipe_from_dict, recipe_to_yaml
from megamm.recipe_checks import trainable_parts, validate_world
from megamm.recipe_presets.tiny import PEAK_LR, STEPS, rooted, tiny

RECIPES = sorted((Path(__file__).parents[2] / "examples").rglob("*.yaml"))
INFIMM: dict[str, Any] = {
    "name": "infimm",
    "stage": "pretrain",
    "run_dir": "runs/infimm/pretrain",
    "tokenizer": "data/infimm/tokenizer",
    "template": "pair",
    "model": {
        "assembly": "cross_attention",
        "language": {"preset": "zephyr-7b", "vocab_size": 32002, "added_vocab": 2},
        "vision": {"preset": "eva02-clip-l-14-336", "feature_layer": -2, "feature_select": "all"},
        "connector": {"kind": "resampler", "num_latents": 32},
        "cross_attention": {"every": 4, "skip_text_only": True},
    },
    "data": {
        "train": [
            {"path": "data/infimm/obelics", "sequence_length": 384, "weight": 101},
            {"path": "/far/away/pairs", "sequence_length": 32, "weight": 115},
        ],
        "workers": 4,
    },
    "training": {
        "steps": 1000,
        "global_batch_size": 256,
        "micro_batch_size": 32,
        "freeze": ["vision", "language"],
        "unfreeze": {"vision": 12, "new_tokens": True},
        "init_from": "checkpoints/infimm",
        "fp8": {"scaling": "delayed"},
    },
    "optimizer": {
        "lr": 1e-4,
        "min_lr": 1e-5,
        "warmup_steps": 100,
        "parts": [{"part": "connector", "lr": 5e-4, "weight_decay": 0.0}],
    },
    "parallel": {"tensor": 4, "sequence": True, "backend": "te"},
    "validation": {"interval": 250, "data": "data/infimm/held", "questions": "data/infimm/q.json"},
    "hardware": {"gpus": 40},
    "log": {"wandb": "ours"},
}
SIZES = {  # of the model; everything else of it stays
    *["preset", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_hidden_size", "vocab_size"],
    *["max_positions", "sliding_window", "image_size", "patch_size", "width", "mlp_width", "feature_layer"],
    *["num_latents", "depth", "head_dim", "every", "cross_every", "init_std", "image_token_id", "rank"],
    "weights_image_size",
}


def kept(recipe: Recipe) -> dict[str, Any]:
    """What makes it this stage of this system."""
    model = {
        section: {key: value for key, value in values.items() if key not in SIZES}
        for section, values in asdict(recipe.model).items()
        if isinstance(values, dict)
    }
    training = {key: getattr(recipe.training, key) for key in ("freeze", "init_optimizer")}
    data = {key: getattr(recipe.data, key) for key in ("pack", "pure_batches", "balance")}
    schedule = {key: getattr(recipe.optimizer, key) for key in ("schedule", "beta1", "beta2", "weight_decay")}
    names = [recipe.name, recipe.stage, recipe.template, recipe.seed, recipe.model.assembly]
    return {**model, **training, **data, **schedule, "names": names, "parts": trainable_parts(recipe)}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_is_the_same_stage_in_small(path: Path, tmp_path: Path) -> None:
    large, small = load_recipe(path), load_recipe(path, preset="tiny")
    assert kept(small) == kept(large)
    for world in (1, 2):
        validate_world(small, world)
    assert small.model.language.hidden_size <= 128 and small.training.steps <= 200
    assert small.training.precision == "fp32" and small.training.device == "cpu"
    (tmp_path / "small.yaml").write_text(recipe_to_yaml(small))
    assert load_recipe(tmp_path / "small.yaml") == small


def small(**overrides: Any) -> Recipe:
    return tiny(recipe_from_dict(INFIMM | overrides))


def test_switches_and_shares_stay() -> None:
    found = small()
    model = found.model
    assert model.language.num_kv_heads == model.language.num_heads // 2 and model.language.sliding_window
    assert model.language.added_vocab == 2 and model.cross_attention.skip_text_only
    assert model.vision.sub_norm and model.vision.rotary_side == 16 and model.vision.feature_layer == -2
    assert found.training.unfreeze.vision == 1 and found.training.unfreeze.new_tokens
    assert found.data.sequence_lengths() == [192, 32]
    assert [source.weight for source in found.data.train or [] if not isinstance(source, str)] == [101, 115]
    assert found.training.global_batch_size == 2 * found.training.micro_batch_size
    assert found.training.fp8.scaling == "off" and found.parallel.backend == "auto"
    assert (found.parallel.tensor, found.hardware.gpus, found.log.wandb) == (1, None, None)


def test_schedule_keeps_its_shape() -> None:
    found = small().optimizer
    assert found.lr == pytest.approx(PEAK_LR) and found.min_lr == pytest.approx(PEAK_LR / 10)
    assert found.warmup_steps == STEPS // 10 and found.decay_steps is None
    assert found.parts == [PartOptimizerConfig("connector", pytest.approx(5 * PEAK_LR), None, 0.0)]
    assert small().validation.interval == STEPS // 4
    assert small(validation={"interval": 0}).validation.interval == 0
    endless = small(optimizer={"lr": 1e-4, "warmup_steps": 4000, "decay_steps": 5000}).optimizer
    assert endless.warmup_steps == 4 * STEPS and endless.decay_steps == 5 * STEPS
    assert endless.lr == pytest.approx(4 * PEAK_LR)  # of which the stage reaches a quarter


def test_files_have_a_root_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = small()
    assert found.run_dir == "runs/tiny/infimm/pretrain"
    assert found.tokenizer == "runs/tiny/data/infimm/tokenizer"
    assert [source.path for source in found.data.sources()] == [
        "runs/tiny/data/infimm/obelics",
        "/far/away/pairs",
    ]
    assert found.validation.data == "runs/tiny/data/infimm/held"
    assert found.validation.questions == "runs/tiny/data/infimm/q.json" and found.validation.images is None
    assert rooted("runs/a") == "runs/tiny/a" and rooted("runsheet") == "runs/tiny/runsheet"


def test_first_stage_starts_from_random_weights_and_a_later_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pretrained, stage = Path("runs/tiny/checkpoints/infimm"), "runs/infimm/pretrain"
    (pretrained / "tokenizer").mkdir(parents=True)
    assert small().training.init_from is None
    later = replace(recipe_from_dict(INFIMM).training, init_from=stage)
    # nothing there: training says so, rather than starting from random weights
    assert small(training=asdict(later)).training.init_from == "runs/tiny/infimm/pretrain"
    for there in (
        pretrained / "shards",
        pretrained / "step_00000000",
        pretrained / "checkpoints/step_00000007",
    ):
        there.mkdir(parents=True)
        assert small().training.init_from == str(pretrained)
        there.rmdir()


def test_overrides_come_after_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_to_yaml(recipe_from_dict(INFIMM)))
    overrides = ["--training.steps=7", "--parallel.tensor=2", "--run_dir=runs/elsewhere"]
    found = load_recipe(path, overrides, "tiny")
    assert (found.training.steps, found.parallel.tensor, found.run_dir) == (7, 2, "runs/elsewhere")
    with pytest.raises(InputError, match="unknown key training\\.stops"):
        load_recipe(path, ["--training.stops=7"], "tiny")
    path.write_text(path.read_text().replace("tokenizer: data/infimm/tokenizer\n", ""))
    with pytest.raises(InputError, match="tokenizer is missing"):
        load_recipe(path, preset="tiny")
