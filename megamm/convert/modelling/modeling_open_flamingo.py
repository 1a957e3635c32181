"""OpenFlamingo for transformers: a CLIP encoder, a perceiver resampler, and gated cross-attention blocks in a
decoder.

Copied into exported directories; loaded with trust_remote_code=True.
"""

from __future__ import annotations

from .flamingo_parts import FlamingoConfig, FlamingoForConditionalGeneration, Perceiver, wrapped_decoder
from .vision_openclip import OpenClipVisionTransformer


class OpenFlamingoConfig(FlamingoConfig):
    """`visual` has the keys of transformers' CLIPVisionConfig."""

    model_type = "open_flamingo"


class OpenFlamingoForConditionalGeneration(FlamingoForConditionalGeneration):
    """Parameters have the names of the module `Flamingo` of open_flamingo."""

    config_class = OpenFlamingoConfig
    _tied_weights_keys = {  # noqa: RUF012 (transformers reads it from the class)
        "lang_encoder.lm_head.weight": "lang_encoder.model.embed_tokens.weight"
    }

    def __init__(self, config: OpenFlamingoConfig) -> None:
        super().__init__(config)
        width = config.visual["hidden_size"]
        self.vision_encoder = OpenClipVisionTransformer(config.visual)
        self.perceiver = Perceiver(width, config.perceiver)
        self.lang_encoder = wrapped_decoder(config, width)
        self.post_init()
