"""FP8 in the recipe: what becomes of it in megatron-core's configuration, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from megamm.config import Recipe
from megamm.engine.transformer_config import decoder_config
from megamm.errors import InputError
from megamm.recipe import recipe_from_dict

LANGUAGE = {"num_layers": 4, "hidden_size": 256, "num_heads": 4, "ffn_hidden_size": 704, "vocab_size": 512}
VISION = {"image_size": 32, "patch_size": 8, "width": 96, "num_layers": 2, "num_heads": 4, "mlp_width": 320}
FLAMINGO = {
    "model.assembly": "cross_attention",
    "model.connector.kind": "resampler",
    "model.cross_attention.num_heads": 4,
}


def make(scaling: str, overrides: dict[str, Any] | None = None) -> Recipe:
    raw = {
        "name": "test",
        "run_dir": "r",
        "tokenizer": "t",
        "model": {"language": LANGUAGE, "vision": VISION},
        "data": {"sequence_length": 128},
        "training": {"fp8": {"scaling": scaling}},
    }
    return recipe_from_dict(raw, overrides=[f"{key}={value}" for key, value in (overrides or {}).items()])


def fp8_of(recipe: Recipe) -> dict[str, Any]:
    config = decoder_config(recipe)
    names = ["fp8", "fp8_recipe", "fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo"]
    return {name: getattr(config, name) for name in names}


def test_off_leaves_megatron_alone() -> None:
    config = decoder_config(make("off"))
    assert config.fp8 is None and not config.first_last_layers_bf16


def test_delayed_scaling() -> None:
    keys = {
        "training.fp8.format": "e4m3",
        "training.fp8.amax_history": 16,
        "training.fp8.amax_choice": "most_recent",
        "training.fp8.margin": 1,
    }
    assert fp8_of(make("delayed", keys)) == {
        "fp8": "e4m3",
        "fp8_recipe": "delayed",
        "fp8_margin": 1,
        "fp8_amax_history_len": 16,
        "fp8_amax_compute_algo": "most_recent",
    }
    found = fp8_of(make("delayed"))
    assert (found["fp8"], found["fp8_amax_history_len"], found["fp8_amax_compute_algo"]) == (
        "hybrid",
        1024,
        "max",
    )


@pytest.mark.parametrize(
    "scaling, name", [("current", "tensorwise"), ("blockwise", "blockwise"), ("mxfp8", "mxfp8")]
)
def test_other_scalings_and_layers_in_bf16(scaling: str, name: str) -> None:
    config = decoder_config(make(scaling, {"training.fp8.bf16_layers_at_end": 2}))
    assert (config.fp8, config.fp8_recipe) == ("hybrid", name)
    assert config.first_last_layers_bf16
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (0, 2)
    assert not config.fp8_dot_product_attention and not config.fp8_param


REFUSED = [
    (
        "delayed",
        {"parallel.backend": "local"},
        "needs Transformer Engine, but parallel.backend is local; set",
    ),
    ("current", {"training.precision": "fp32"}, "goes with bf16, but training.precision is fp32; set"),
    ("current", {"training.device": "cpu"}, "needs a GPU, but training.device is cpu; set"),
    (
        "current",
        {"training.fp8.margin": 1},
        r"fp8\.margin: 1 means nothing with .* current, only with delayed",
    ),
    ("mxfp8", {"training.fp8.amax_history": 16}, r"amax_history: 16 means nothing with .* mxfp8"),
    ("delayed", {"training.fp8.bf16_layers_at_end": 1}, r"at_end: 1 is not possible with delayed scaling"),
    (
        "current",
        {"training.fp8.bf16_layers_at_start": 2, "training.fp8.bf16_layers_at_end": 2},
        "leave none of the 4 decoder layers in FP8",
    ),
    (
        "current",
        {"training.fp8.bf16_layers_at_start": 3, "parallel.pipeline": 2},
        "3 are more than the 2 decoder layers of a pipeline stage",
    ),
    (
        "delayed",
        {"model.language.ffn_hidden_size": 712},
        r"ffn_hidden_size: 712 features are not a multiple of 16 .* delayed needs; widen it, or",
    ),
    (
        "delayed",
        {"model.language.ffn_hidden_size": 720, "parallel.tensor": 2},
        r"ffn_hidden_size: 720 features over parallel\.tensor 2 are not .* lower parallel\.tensor",
    ),
    ("mxfp8", {"model.language.ffn_hidden_size": 720}, r"ffn_hidden_size: 720 features .* multiple of 32"),
    (
        "delayed",
        {"model.language.num_heads": 16, "model.language.num_kv_heads": 4, "parallel.tensor": 4, **FLAMINGO}
        | {"model.cross_attention.head_dim": 12},
        r"cross_attention\.num_heads x head_dim: 48 features over parallel\.tensor 4",
    ),
    (
        "delayed",
        {"model.vision.width": 72, "model.connector.num_latents": 64, **FLAMINGO},
        r"vision\.width: 72 features are not a multiple of 16",
    ),
    (
        "delayed",
        {"data.sequence_length": 104},
        r"data\.sequence_length: 104 x training\.micro_batch_size 1 is not a multiple of 16 positions",
    ),
    (
        "delayed",
        {"data.sequence_length": 120, "parallel.tensor": 4, "parallel.sequence": "true"}
        | {"training.micro_batch_size": 2, "training.global_batch_size": 2},
        r"sequence_length: 120 x training\.micro_batch_size 2 over 4 ranks is not",
    ),
    (
        "blockwise",
        {"parallel.tensor": 2, "parallel.sequence": "true"},
        r"sequence_length: 128 x training\.micro_batch_size 1 over 2 ranks is not a multiple of 128",
    ),
    (
        "delayed",
        {"model.connector.num_latents": 8, **FLAMINGO},
        r"num_latents: 8 x 1 samples of a micro-batch is not a multiple of 16 media tokens",
    ),
]


@pytest.mark.parametrize("scaling, overrides, message", REFUSED)
def test_what_cannot_work_is_refused(scaling: str, overrides: dict[str, Any], message: str) -> None:
    make("off", {k: v for k, v in overrides.items() if not k.startswith("training.fp8")})
    with pytest.raises(InputError, match=message):
        make(scaling, overrides)


def test_what_works_is_accepted() -> None:
    """Right at the borders that the refusals draw."""
    make(
        "delayed",
        {"data.sequence_length": 120, "training.micro_batch_size": 2} | {"training.global_batch_size": 2},
    )
    make("blockwise", {"parallel.tensor": 2, "parallel.sequence": "true", "data.sequence_length": 256})
    make("current", {"training.fp8.bf16_layers_at_start": 2, "training.fp8.bf16_layers_at_end": 1})
    make("delayed", {"model.connector.num_latents": 16, **FLAMINGO})
    packed = {"training.micro_batch_size": 2, "training.global_batch_size": 2, "data.pack": "true"}
    make("delayed", {"model.connector.num_latents": 8, **FLAMINGO, **packed, "data.pack": "false"})
    with pytest.raises(InputError, match="8 x 1 samples"):
        make("delayed", {"model.connector.num_latents": 8, **FLAMINGO, **packed})
