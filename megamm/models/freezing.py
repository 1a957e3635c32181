"""Which parameters a stage trains: whole parts, the last blocks of a part, or the rows of new tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from megamm.config import TrainingConfig, part_of
from megamm.engine.parameter_groups import train_rows

__all__ = ["freeze", "is_trained", "part_of", "train_new_tokens"]


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


def train_new_tokens(model: Any) -> None:
    """Train the rows of the added tokens in embedding and output layer, where these are frozen, in one chunk
    of a model that is on its device already.

    Args:
        model: a VisionLanguageModel, after `freeze`.
    """
    language, tp_group = model.model_config.language, model.tp_group
    new = range(language.vocab_size - language.added_vocab, language.vocab_size)
    for weight in _vocabulary_weights(model):
        if not weight.requires_grad:
            # the rank has as many rows of the padded vocabulary as every other
            size = len(weight)
            start, stop = (row - tp_group.rank() * size for row in (new.start, new.stop))
            train_rows(weight, slice(min(max(start, 0), size), min(max(stop, 0), size)))


def _vocabulary_weights(model: Any) -> Iterator[torch.Tensor]:
    if model.pre_process:
        yield model.language.embedding.word_embeddings.weight
    # a tied output layer has a weight of its own only on another pipeline stage than the embedding
    if model.post_process and model.language.output_layer.weight is not None:
        yield model.language.output_layer.weight
