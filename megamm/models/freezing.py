"""Which parameters a stage trains: whole parts, or the last blocks of a part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from megamm.config import TrainingConfig


def part_of(parameter_name: str) -> str:
    """The part of the model that a parameter belongs to, by the names that recipes freeze."""
    if ".gated_cross_attention." in parameter_name:
        return "cross_attention"
    if ".lora." in parameter_name:
        return "lora"
    return parameter_name.split(".", 1)[0]


def is_trained(module: nn.Module) -> bool:
    """Whether any parameter of `module` is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def freeze(model: Any, training: TrainingConfig, tie_embeddings: bool) -> None:
    """Switch off the gradients of what the stage does not train, in one chunk of a model.

    Args:
        model: a VisionLanguageModel.
        training: `freeze` names parts, `unfreeze` the first trained block of frozen ones.
        tie_embeddings: the output layer is the embedding, and stays frozen with it.
    """
    last_blocks = {p for module in _unfrozen(model, training, tie_embeddings) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        # gated blocks and adapters lie within decoder layers, but are parts of their own
        is_unfrozen = parameter in last_blocks and part not in ("cross_attention", "lora")
        if part in training.freeze and not is_unfrozen:
            parameter.requires_grad_(False)
    if model.pre_process and model.sees_images:
        for module in model.vision.unused_modules():
            module.requires_grad_(False)


def _unfrozen(model: Any, training: TrainingConfig, tie_embeddings: bool) -> Iterator[nn.Module]:
    vision, language = training.unfreeze.vision, training.unfreeze.language
    if vision is not None and model.pre_process:
        yield from model.vision.blocks[vision:]
        yield model.vision.post_norm
    if language is not None:
        decoder = model.language.decoder
        # layer numbers count from 1 over the whole model
        yield from (layer for layer in decoder.layers if layer.layer_number > language)
        if model.post_process:
            yield decoder.final_layernorm
            if not tie_embeddings:
                yield model.language.output_layer
