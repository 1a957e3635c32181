"""Random Flamingos of open_flamingo, with OpenFlamingo's encoder or InfiMM's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megamm.batch import Batch
from megamm.config import ConnectorConfig, CrossAttentionConfig, ModelConfig, VisionConfig
from megamm.convert.rules import Table
from megamm.convert.tables import eva, flamingo, llama, open_flamingo, openclip
from tests.convert.families import hf_decoder, randomize
from tests.parity import references
from tests.parity.families import Reference, by_sample, text_and_images

IMAGE_ID = 61
CLIP = VisionConfig(
    image_size=28,
    patch_size=14,
    width=24,
    num_layers=2,
    num_heads=2,
    mlp_width=40,
    activation="gelu",
    feature_layer=-1,
    feature_norm=True,
)
EVA_G = VisionConfig(
    image_size=28,
    patch_size=14,
    width=24,
    num_layers=2,
    num_heads=2,
    mlp_width=40,
    activation="gelu",
    norm_eps=1e-6,
    patch_bias=True,
    qkv_bias="qv",
    pre_norm=False,
    feature_layer=-1,
    feature_select="all",
)


class ClipEyes(nn.Module):
    """What open_flamingo takes the features from."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        values = {**openclip.to_open_clip(config), "output_tokens": True}
        quick = config.activation == "quick_gelu"
        self.visual = references.open_clip().model._build_vision_tower(12, values, quick)


class LastBlock(nn.Module):
    """timm's encoder up to the output of its last block, as (pooled, tokens)."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, images: torch.Tensor) -> tuple[None, torch.Tensor]:
        found: list[torch.Tensor] = []
        handle = self.trunk.blocks[-1].register_forward_hook(lambda *call: found.append(call[-1]))
        self.trunk(images)
        handle.remove()
        return None, found[0]


class EvaEyes(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        values = eva.to_timm(config)
        trunk = references.timm().create_model(values["architecture"], num_classes=0, **values["model_args"])
        self.visual = LastBlock(trunk)


def build(eyes: nn.Module, width: int, every: int, **decoder: Any) -> nn.Module:
    """A Flamingo whose decoder is LLaMA, or Mistral if there is a sliding window; sizes that its code fixes
    (6 layers, 64 latents, 8 heads of 64) are those of the real models."""
    source = references.open_flamingo().src
    import open_flamingo.src.flamingo as flamingo_module
    import open_flamingo.src.flamingo_lm as lm_module
    import open_flamingo.src.utils as utils

    assert source is not None
    language = hf_decoder(**{"num_hidden_layers": 4, **decoder})
    utils.extend_instance(language, lm_module.FlamingoLMMixin)
    language.set_decoder_layers_attr_name("model.layers")
    model = flamingo_module.Flamingo(
        vision_encoder=eyes,
        lang_encoder=language,
        eoc_token_id=IMAGE_ID + 1,
        media_token_id=IMAGE_ID,
        vis_dim=width,
        cross_attn_every_n_layers=every,
    )
    return randomize(model, std=0.15)


def run(model: nn.Module, batch: Batch) -> torch.Tensor:
    images, _ = by_sample(batch, IMAGE_ID)
    out = model(images[:, :, None], batch.input_ids, torch.ones_like(batch.input_ids))
    found: torch.Tensor = out.logits
    return found


def config_of(model: nn.Module, vision: VisionConfig, every: int, skip_text_only: bool) -> ModelConfig:
    language = llama.from_hf(model.lang_encoder.config.to_dict(), "config.json")
    return ModelConfig(
        assembly="cross_attention",
        language=language,
        vision=vision,
        connector=ConnectorConfig(kind="resampler"),
        cross_attention=CrossAttentionConfig(every=every, skip_text_only=skip_text_only),
    )


def open_flamingo_reference(every: int, **decoder: Any) -> Reference:
    theirs = build(ClipEyes(CLIP), CLIP.width, every, **decoder)
    model = config_of(theirs, CLIP, every, skip_text_only=False)
    batch = text_and_images(model.language.vocab_size, IMAGE_ID, 1, CLIP.image_size)
    table = open_flamingo.table(model)
    return Reference(model, table, theirs, lambda b: run(theirs, b), batch, IMAGE_ID, freeze=("vision",))


def infimm_reference(every: int, vision: VisionConfig = EVA_G, **decoder: Any) -> Reference:
    """A sample without images passes InfiMM's blocks unchanged: it sees the decoder alone."""
    theirs = build(EvaEyes(vision), vision.width, every, **decoder)
    model = config_of(theirs, vision, every, skip_text_only=True)
    batch = text_and_images(model.language.vocab_size, IMAGE_ID, 1, vision.image_size)

    def logits(b: Batch) -> torch.Tensor:
        found = run(theirs, b)
        layers = theirs.lang_encoder.model.layers
        blocks = [layer.gated_cross_attn_layer for layer in layers]
        for layer in layers:
            layer.gated_cross_attn_layer = None
        plain = theirs.lang_encoder(b.input_ids, torch.ones_like(b.input_ids)).logits
        for layer, block in zip(layers, blocks, strict=True):
            layer.gated_cross_attn_layer = block
        return torch.where((b.images_per_sample > 0)[:, None, None], found, plain)

    rules = [
        *eva.rules(vision, "vision_encoder.trunk.", "timm"),
        *flamingo.resampler_rules(model, "perceiver."),
        *flamingo.decoder_rules(model, "lang_encoder.", None),
        *flamingo.gated_block_rules(model, "lang_encoder.model.layers."),
    ]
    return Reference(model, Table(rules), theirs, logits, batch, IMAGE_ID, freeze=("vision",))
