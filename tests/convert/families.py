"""Tiny models of the families in transformers, and a table applied there and back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from megamm.batch import Batch
from megamm.config import ModelConfig
from megamm.convert.engine import write_json
from megamm.convert.family import Family, Target
from megamm.convert.rules import Table
from megamm.engine.groups import Groups
from tests.convert.helpers import assert_bitwise_equal, read_tensors, recipe_for
from tests.one_process import build

IMAGE_ID = 61


def randomize(module: nn.Module, std: float = 0.2) -> nn.Module:
    """Random numbers everywhere: norms and biases start as ones and zeros, which would hide a mix-up."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)
    return module.eval()


def hf_decoder(**changes: Any) -> nn.Module:
    """A random LlamaForCausalLM, or a MistralForCausalLM if there is a sliding window."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    sizes: dict[str, Any] = dict(vocab_size=67, hidden_size=32, intermediate_size=40, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5) | changes
    if sizes.get("sliding_window"):
        return randomize(MistralForCausalLM(MistralConfig(**sizes)))
    return randomize(LlamaForCausalLM(LlamaConfig(**sizes)))


def hf_idefics(
    vision: dict[str, Any] | None = None, perceiver: dict[str, Any] | None = None, **changes: Any
) -> nn.Module:
    """A random IdeficsForVisionText2Text."""
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    sizes: dict[str, Any] = dict(vocab_size=64, additional_vocab_size=3, hidden_size=32, intermediate_size=40)
    sizes |= dict(num_hidden_layers=4, num_attention_heads=4, cross_layer_interval=2, rms_norm_eps=1e-5)
    eyes: dict[str, Any] = dict(embed_dim=24, intermediate_size=40, num_hidden_layers=2)
    eyes |= dict(image_size=28, patch_size=14, num_attention_heads=2) | (vision or {})
    resampler: dict[str, Any] = dict(use_resampler=True, resampler_n_latents=4, resampler_depth=2)
    resampler |= dict(resampler_n_heads=2, resampler_head_dim=12) | (perceiver or {})
    values = {**sizes, **changes, "vision_config": eyes, "perceiver_config": resampler}
    # (frozen parts of a reference would have no gradients to compare)
    free = dict(freeze_text_layers=False, freeze_lm_head=False, freeze_vision_layers=False)
    config = IdeficsConfig(**values, use_resampler=True, **free, attn_implementation="eager")
    return randomize(IdeficsForVisionText2Text(config))


def there_and_back(table: Table, source: Path, out: Path) -> dict[str, torch.Tensor]:
    """Ours from the safetensors in `source`; written to `out` again, with no bit changed."""
    theirs = read_tensors(source)
    names = table.canonical_keys(theirs, str(source))
    skipped = table.account(names, str(source))
    ours = to_ours(table, {name: theirs[key] for name, key in names.items()})
    out.mkdir()
    save_file(to_theirs(table, ours), out / "model.safetensors", metadata={"format": "pt"})
    kept = {name: theirs[key] for name, key in names.items() if name not in skipped}
    assert_bitwise_equal(read_tensors(out), kept)
    return ours


def to_ours(table: Table, theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our tensors, whose pieces must be the whole."""
    ours = {}
    for rule in table.rules:
        tensors = [theirs[key] for key in rule.theirs]
        assert [tuple(tensor.shape) for tensor in tensors] == rule.their_shapes(), rule.ours
        ours[rule.ours] = rule.to_ours(tensors)
        assert tuple(ours[rule.ours].shape) == rule.our_shape(), rule.ours
        assert torch.equal(flat(rule.our_pieces(tensors)), ours[rule.ours].flatten()), rule.ours
    return ours


def to_theirs(table: Table, ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their tensors, whose pieces must be the whole."""
    theirs = {}
    for rule in table.rules:
        parts = rule.to_theirs(ours[rule.ours])
        for part, pieces in zip(parts, rule.their_pieces(ours[rule.ours]), strict=True):
            assert torch.equal(flat(pieces), part.flatten()), rule.ours
        theirs |= {key: part.contiguous() for key, part in zip(rule.theirs, parts, strict=True)}
    return theirs


def flat(pieces: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([piece.flatten() for piece in pieces])


def target(directory: Path, model: ModelConfig, image_id: int | None = None) -> Target:
    """An export in fp32 without a tokenizer."""
    ids: dict[str, int | None] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return Target(directory, recipe_for(model), None, ids, image_id, torch.float32)


_REMOTE = """
import sys, torch
from transformers import AutoModelForCausalLM
directory, inputs, out = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(
    directory, trust_remote_code=True, output_loading_info=True, dtype=torch.float32
)
complaints = {kind: keys for kind, keys in info.items() if keys}
assert not complaints, complaints
assert not any(name.partition(".")[0] in ("megamm", "megatron") for name in sys.modules)
with torch.no_grad():
    result = model.eval()(**torch.load(inputs)).logits
torch.save(result, out)
"""


def run_remote(directory: Path, inputs: dict[str, torch.Tensor], code: str = _REMOTE) -> torch.Tensor:
    """Logits of an exported directory, by its own model code, in a process that does not know megamm."""
    torch.save(inputs, directory.parent / "inputs.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(directory.parent / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    arguments = [str(directory), str(directory.parent / "inputs.pt"), str(directory.parent / "result.pt")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=directory.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: torch.Tensor = torch.load(directory.parent / "result.pt")
    return found


def random_tensors(
    table: Table, std: float = 0.2, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Random tensors under their names, for families without a class to take them from."""
    generator = torch.Generator().manual_seed(0)
    return {
        key: (std * torch.randn(shape, generator=generator)).to(dtype)
        for rule in table.rules
        for key, shape in zip(rule.theirs, rule.their_shapes(), strict=True)
    }


def export_to(out: Path, family: Family, model: ModelConfig, theirs: dict[str, torch.Tensor]) -> Path:
    """What an export writes: weights, config.json, further files."""
    goal, export = target(out, model, IMAGE_ID), family.export
    assert export is not None and export.config is not None
    out.mkdir(exist_ok=True)
    save_file(theirs, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", export.config(goal))
    export.extras(goal)
    return out


def megamm_logits(
    model: ModelConfig, layout: Groups, weights: dict[str, torch.Tensor], batch: Batch, image_id: int
) -> torch.Tensor:
    """[B, S, V] by one process."""
    recipe = recipe_for(model)
    recipe.training.precision = "fp32"
    ours = build(recipe, layout, weights, image_id=image_id).eval()
    with torch.no_grad():
        return ours(batch, return_logits=True)
