"""InfiMM for transformers: an EVA-CLIP encoder, a perceiver resampler, and gated cross-attention blocks in a
decoder.

Copied into exported directories; loaded with trust_remote_code=True.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .flamingo_parts import FlamingoConfig, FlamingoForConditionalGeneration, Perceiver, wrapped_decoder
from .vision_eva import EvaVisionTransformer


class InfiMMConfig(FlamingoConfig):
    """`visual` has the keys of EVA-CLIP's model configurations."""

    model_type = "infimm"


class InfiMMParts(nn.Module):
    """The three parts under the names that they have in the weights."""

    def __init__(self, config: InfiMMConfig) -> None:
        super().__init__()
        width = config.visual["width"]
        self.vision_encoder = EvaVisionTransformer(config.visual)
        self.perceiver = Perceiver(width, config.perceiver)
        self.lang_encoder = wrapped_decoder(config, width)


class InfiMMForConditionalGeneration(FlamingoForConditionalGeneration):
    """A sample without any image passes the gated blocks unchanged."""

    config_class = InfiMMConfig
    skips_text_only = True
    _tied_weights_keys = {  # noqa: RUF012 (transformers reads it from the class)
        "model.lang_encoder.lm_head.weight": "model.lang_encoder.model.embed_tokens.weight"
    }

    def __init__(self, config: InfiMMConfig) -> None:
        super().__init__(config)
        self.model = InfiMMParts(config)
        self.post_init()

    @property
    def parts(self) -> Any:
        return self.model
