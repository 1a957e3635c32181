"""The parts of a model: which of them a weight belongs to, and what two models have to agree on."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, get_args

from megamm.config.model import UNCOMPARED_KEYS, ModelConfig, Part

EMBEDDING = "language.embedding.word_embeddings.weight"
OUTPUT = "language.output_layer.weight"
POSITIONS = "vision.position_embedding"
LATENTS = ("connector.latents", "connector.queries")


def part_of(parameter_name: str) -> str:
    """The part of the model that a parameter belongs to, by the names that recipes freeze."""
    if ".gated_cross_attention." in parameter_name:
        return "cross_attention"
    if ".lora." in parameter_name:
        return "lora"
    return parameter_name.split(".", 1)[0]


def padded_vocab_size(vocab_size: int, tensor: int) -> int:
    """Rows of embedding and output layer: the smallest multiple of `tensor` that holds the vocabulary."""
    return -(-vocab_size // tensor) * tensor


def compared_values(model: ModelConfig) -> dict[str, Any]:
    """Key -> value of everything that makes it this model and no other."""
    values: dict[str, Any] = {"model.assembly": model.assembly}
    for section in get_args(Part):
        for key, value in asdict(getattr(model, section)).items():
            if key not in UNCOMPARED_KEYS:
                values[f"model.{section}.{key}"] = value
    values["model.lora.targets"] = sorted(model.lora.targets)
    values["model.language.num_kv_heads"] = model.language.num_kv_heads or model.language.num_heads
    return values
