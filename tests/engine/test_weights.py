"""Parameters under their checkpoint names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megamm.engine import checkpoint, groups
from megamm.engine.groups import Groups
from megamm.engine.weights import named_shards
from megamm.errors import InputError
from megamm.models.freezing import part_of
from tests.dist.tiny import tiny_recipe
from tests.one_process import CPU, build, whole

DECODER_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": (64,),
    "self_attention.linear_qkv.weight": (128, 64),
    "self_attention.linear_proj.weight": (64, 64),
    "mlp.linear_fc1.layer_norm_weight": (64,),
    "mlp.linear_fc1.weight": (192, 64),
    "mlp.linear_fc2.weight": (64, 96),
}
VISION_BLOCK = {
    "norm1.weight": (48,),
    "norm1.bias": (48,),
    "attention.qkv.weight": (144, 48),
    "attention.qkv.bias": (144,),
    "attention.proj.weight": (48, 48),
    "attention.proj.bias": (48,),
    "norm2.weight": (48,),
    "norm2.bias": (48,),
    "mlp.fc1.weight": (64, 48),
    "mlp.fc1.bias": (64,),
    "mlp.fc2.weight": (48, 64),
    "mlp.fc2.bias": (48,),
}
MERGED = {
    "vision.patch_embedding.weight": (48, 3, 8, 8),
    "vision.class_embedding": (48,),
    "vision.position_embedding": (5, 48),
    **{f"vision.{norm}.{kind}": (48,) for norm in ("pre_norm", "post_norm") for kind in ("weight", "bias")},
    **{f"vision.blocks.{n}.{name}": shape for n in range(3) for name, shape in VISION_BLOCK.items()},
    "connector.linear_1.weight": (64, 48),
    "connector.linear_1.bias": (64,),
    "connector.linear_2.weight": (64, 64),
    "connector.linear_2.bias": (64,),
    "language.embedding.word_embeddings.weight": (67, 64),
    **{
        f"language.decoder.layers.{n}.{name}": shape
        for n in range(4)
        for name, shape in DECODER_LAYER.items()
    },
    "language.decoder.final_layernorm.weight": (64,),
    "language.output_layer.weight": (67, 64),
}
GATED_BLOCK = {
    "attention_norm.weight": (64,),
    "attention_norm.bias": (64,),
    "attention.to_q.weight": (32, 64),
    "attention.to_kv.weight": (64, 48),
    "attention.to_out.weight": (64, 32),
    "feed_forward_norm.weight": (64,),
    "feed_forward_norm.bias": (64,),
    "feed_forward.linear_1.weight": (256, 64),
    "feed_forward.linear_2.weight": (64, 256),
    "attention_gate": (1,),
    "feed_forward_gate": (1,),
}


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_names_and_shapes_are_the_published_ones(layout: Groups) -> None:
    """The names in checkpoints are a format: changing one breaks everybody's files."""
    assert shapes(whole(build(tiny_recipe("merged"), layout))) == MERGED
    cross = shapes(whole(build(tiny_recipe("cross_attention"), layout)))
    kept = {name: shape for name, shape in MERGED.items() if not name.startswith("connector.")}
    prefix = "language.decoder.layers.{}.gated_cross_attention.{}"
    blocks = {prefix.format(n, name): shape for n in (1, 3) for name, shape in GATED_BLOCK.items()}
    rest = {name: shape for name, shape in cross.items() if name not in kept | blocks}
    assert cross == kept | blocks | rest
    assert rest and all(name.startswith("connector.") for name in rest)
    assert rest["connector.latents"] == (4, 48)
    assert rest["connector.layers.1.attention.to_kv.weight"] == (64, 48)
    assert len(rest) == 3 + 2 * 11


def test_shards_are_views_and_cover_every_parameter_once(layout: Groups) -> None:
    model = build(tiny_recipe("cross_attention"), layout)
    seen: list[Any] = list(named_shards(model))
    assert sum(shard.data.numel() for shard in seen) == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        for value, shard in enumerate(seen, start=1):
            shard.data.fill_(value)
    assert all((parameter > 0).all() for parameter in model.parameters())
    # gate and up of SwiGLU are two shards of one tensor, gate first
    pair = [shard for shard in seen if shard.name == "language.decoder.layers.0.mlp.linear_fc1.weight"]
    assert [shard.index[0] for shard in pair] == [slice(0, 96), slice(96, 192)]
    assert model.language.decoder.layers[0].mlp.linear_fc1.weight[[0, 96], 0].tolist() == [
        seen.index(shard) + 1 for shard in pair
    ]


def test_select_takes_another_tensor_of_the_same_shape(layout: Groups) -> None:
    model = build(tiny_recipe("merged"), layout)
    for parameter in model.connector.parameters():
        parameter.grad = parameter.detach() * 2
    gradients = whole(model, lambda parameter: parameter.grad)
    weights = whole(model)
    assert sorted(gradients) == sorted(name for name in MERGED if name.startswith("connector."))
    assert all(torch.equal(gradient, weights[name] * 2) for name, gradient in gradients.items())


# --- starting from the weights of a checkpoint ----------------------------------------------------------


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    (directory / "some_file").write_text("copied along")
    return directory


def test_weights_there_and_back(layout: Groups, tokenizer: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("merged")
    tensors = whole(build(recipe, layout))
    out = checkpoint.write_weights(tmp_path / "out", tensors, recipe, tokenizer)
    found = checkpoint.read_weights(out)
    assert sorted(found) == sorted(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert checkpoint.read_recipe(out) == recipe
    assert (checkpoint.tokenizer_directory(out) / "some_file").read_text() == "copied along"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tokenizer"]
    with pytest.raises(InputError, match="already exists"):
        checkpoint.write_weights(out, tensors, recipe, tokenizer)
    groups.initialize(recipe.parallel, CPU, "gloo")  # writing left them


def test_missing_parts_are_named_and_half_parts_refused(
    layout: Groups, tokenizer: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe("merged")
    tensors = whole(build(recipe, layout))
    without = {name: tensor for name, tensor in tensors.items() if part_of(name) != "connector"}
    half = {name: tensor for name, tensor in tensors.items() if name != "connector.linear_2.bias"}
    checkpoint.write_weights(tmp_path / "without", without, recipe, tokenizer)
    checkpoint.write_weights(tmp_path / "half", half, recipe, tokenizer)
    world = groups.initialize(recipe.parallel, CPU, "gloo")

    model = build(tiny_recipe("merged", {"seed": 7}), world)
    own = whole(model)
    missing = checkpoint.load_weights(tmp_path / "without", [model], world, part_of)
    assert missing == ["connector"]
    for name, tensor in whole(model).items():
        assert torch.equal(tensor, own[name] if part_of(name) == "connector" else tensors[name]), name
    with pytest.raises(InputError, match=r"another model .* connector\.linear_2\.bias"):
        checkpoint.load_weights(tmp_path / "half", [model], world, part_of)


def test_weights_of_another_shape_are_refused(layout: Groups, tokenizer: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("merged")
    checkpoint.write_weights(tmp_path / "out", whole(build(recipe, layout)), recipe, tokenizer)
    world = groups.initialize(recipe.parallel, CPU, "gloo")
    wider = build(tiny_recipe("merged", {"model.language.ffn_hidden_size": 128}), world)
    with pytest.raises(InputError, match="does not hold what this recipe's model needs"):
        checkpoint.load_weights(tmp_path / "out", [wider], world, part_of)
