"""Tiny LLaVA directories as the authors of LLaVA publish theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from megamm.convert.engine import write_json
from megamm.data.tokenizer import MODEL_FILE, Tokenizer
from tests.convert.helpers import VOCAB_SIZE, hf_llava

TEXT_VOCAB = VOCAB_SIZE - 1  # pieces of the tiny tokenizer, without <image>
TOWER = "model.vision_tower.vision_tower.vision_model."
PUBLISHED = "openai/clip-vit-large-patch14-336"


def random_model(**text: Any) -> nn.Module:
    return hf_llava(text=dict(vocab_size=TEXT_VOCAB) | text, image_token_index=TEXT_VOCAB - 1)


def original_keys(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's weights under the authors' names, the encoder among them."""
    renamed = {
        "model.language_model.": "model.",
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "model.vision_tower.": TOWER,
    }
    found = {}
    for key, tensor in model.state_dict().items():
        old = next((prefix for prefix in renamed if key.startswith(prefix)), "")
        found[renamed.get(old, "") + key.removeprefix(old)] = tensor.clone()
    return found


def original_config(model: nn.Module, **changes: Any) -> dict[str, Any]:
    text = model.config.text_config.to_dict()
    mistral = text["model_type"] == "mistral"
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    keys += ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "sliding_window")
    return {
        **{key: text[key] for key in keys if key in text},
        "model_type": "llava_mistral" if mistral else "llava",
        "architectures": ["LlavaMistralForCausalLM" if mistral else "LlavaLlamaForCausalLM"],
        "hidden_act": "silu",
        "rope_theta": text["rope_parameters"]["rope_theta"],
        "mm_hidden_size": 16,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": PUBLISHED,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "tune_mm_mlp_adapter": False,
        **changes,
    }


def save_original(
    model: nn.Module, out: Path, tokenizer: Tokenizer | None, has_tower: bool = False, **changes: Any
) -> Path:
    """As published; half of the weights in each of two .bin files."""
    tensors = original_keys(model)
    tensors = {key: x for key, x in tensors.items() if has_tower or not key.startswith(TOWER)}
    out.mkdir(parents=True)
    weight_map = {}
    for shard in range(2):
        name = f"pytorch_model-0000{shard + 1}-of-00002.bin"
        keys = list(tensors)[shard::2]
        torch.save({key: tensors[key] for key in keys}, out / name)
        weight_map |= dict.fromkeys(keys, name)
    write_json(out / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(out / "config.json", original_config(model, **changes))
    if tokenizer is not None:
        (out / MODEL_FILE).write_bytes(tokenizer.model)
    return out


def save_clip(model: nn.Module, out: Path, **vision: Any) -> Path:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(**{**model.config.vision_config.to_dict(), **vision})
    encoder = CLIPVisionModel(config)
    if not vision:
        encoder.load_state_dict(model.model.vision_tower.state_dict())
    encoder.to(next(model.parameters()).dtype).save_pretrained(out)
    return out
