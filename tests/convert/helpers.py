"""Tiny LLaVA models, tokenizers and recipes for the tests of conversion."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megamm.config import ImageConfig, ModelConfig, Recipe
from megamm.data.tokenizer import Tokenizer, train_tokenizer

VOCAB_SIZE = 420  # of the tiny tokenizer, <image> included

_TEXT = """a chat between curious user and an artificial intelligence assistant gives helpful detailed polite
answers to the user's questions what is shown in this picture red blue circle square cat dog on of with image
describe"""


def train_tiny_tokenizer(out: Path) -> Tokenizer:
    """A LLaMA style tokenizer trained on a few made-up sentences."""
    source = random.Random(0)
    texts = [" ".join(source.choices(_TEXT.split(), k=12)) + "." for _ in range(400)]
    texts += ["USER: ASSISTANT: aaaa aaa -- ---- é日本 0123", "  two  spaces   here"] * 20
    return train_tokenizer(texts, out, VOCAB_SIZE)


def hf_llava(
    *, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **config: Any
) -> torch.nn.Module:
    """A random LlavaForConditionalGeneration of a few thousand parameters, in fp32."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        MistralConfig,
    )

    sizes = dict(vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=40, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5) | (text or {})
    text_class = MistralConfig if sizes.get("sliding_window") else LlamaConfig
    eyes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
    eyes |= dict(image_size=28, patch_size=14) | (vision or {})
    values = dict(image_token_index=VOCAB_SIZE - 1, image_seq_length=4) | config
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text_class(**sizes), vision_config=CLIPVisionConfig(**eyes), **values)
    )
    with torch.no_grad():  # norms and biases start as ones and zeros, which would hide a mix-up
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def save_hf(model: torch.nn.Module, tokenizer: Tokenizer, out: Path, **options: Any) -> Path:
    """save_pretrained plus the SentencePiece model, as a public LLaVA directory has it."""
    model.save_pretrained(out, **options)
    tokenizer.save(out)
    (out / "tokenizer_config.megamm.json").unlink()
    return out


def recipe_for(model: ModelConfig, image: ImageConfig | None = None, template: str = "vicuna") -> Recipe:
    """The least recipe of a model."""
    recipe = Recipe(name="tiny", run_dir="runs/tiny", tokenizer="tokenizer", model=model)
    recipe.template = template  # type: ignore[assignment]
    recipe.data.image = image or ImageConfig()
    return recipe


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every safetensors file of a directory."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def hub_layout(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under the names of published models, which megamm writes too: transformers 5 leaves `vision_model` out
    of the keys of a LLaVA or a CLIP encoder when it saves."""
    tower, modules = "vision_tower.", ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")

    def name(key: str) -> str:
        prefix = tower if key.startswith(tower) else ""
        rest = key.removeprefix(prefix)
        return f"{prefix}vision_model.{rest}" if rest.startswith(modules) else key

    return {name(key): tensor for key, tensor in tensors.items()}


def assert_bitwise_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Same keys, types, shapes and bytes."""
    assert sorted(found) == sorted(wanted)
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype, key
        assert found[key].shape == tensor.shape, key
        same = found[key].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)
        assert torch.equal(*same), key


def edit_config(directory: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change config.json in place."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))
