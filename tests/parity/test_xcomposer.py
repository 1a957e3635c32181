"""InternLM-XComposer, put together from timm's EVA, BLIP-2's Q-Former and LLaMA of transformers, through the
conversion table: logits, loss and gradients, fp32, on one and two tensor-parallel ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from megamm.batch import Batch
from megamm.config import ConnectorConfig, LoraConfig, ModelConfig
from megamm.convert.tables import llama, xcomposer
from tests.convert.families import hf_decoder, randomize
from tests.parity.families import Reference, check, text_and_images
from tests.parity.flamingo import EVA_G, EvaEyes

IMAGE_ID = 61
QUERIES = 3


class AdaptedLinear(nn.Linear):
    """W x + s B A x, as XComposer has it."""

    def __init__(self, plain: nn.Linear, rank: int, scale: float) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None)
        self.scale = scale
        self.lora_A = nn.Linear(plain.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, plain.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.scale * self.lora_B(self.lora_A(x))


class Parts(nn.Module):
    """XComposer's parts under its names, as far as the libraries have them."""

    def __init__(self, rank: int, cross_every: int, flags: bool, **decoder: Any) -> None:
        super().__init__()
        sizes = Blip2QFormerConfig(
            hidden_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=4 * 24,
            encoder_hidden_size=EVA_G.width,
            cross_attention_frequency=cross_every,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.visual_encoder = EvaEyes(EVA_G).visual
        self.ln_vision = nn.LayerNorm(EVA_G.width)
        self.query_tokens = nn.Parameter(torch.empty(1, QUERIES, 24))
        self.Qformer = Blip2QFormerModel(sizes)
        self.internlm_model = hf_decoder(num_key_value_heads=4, attention_bias=True, **decoder)
        self.internlm_proj = nn.Linear(24, 32)
        self.flags = flags
        if flags:
            self.flag_image_start = nn.Parameter(torch.empty(1, 1, 32), requires_grad=False)
            self.flag_image_end = nn.Parameter(torch.empty(1, 1, 32), requires_grad=False)
        if rank:
            for layer in self.internlm_model.model.layers:
                for part, names in (
                    (layer.self_attn, ("q_proj", "v_proj")),
                    (layer.mlp, ("up_proj", "down_proj")),
                ):
                    for name in names:
                        setattr(part, name, AdaptedLinear(getattr(part, name), rank, 1.5))

    def forward(self, batch: Batch) -> torch.Tensor:
        features = self.ln_vision(self.visual_encoder(batch.images)[1])
        queries = self.query_tokens.expand(len(features), -1, -1)
        seen = self.Qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        found = self.internlm_proj(seen)
        if self.flags:
            start, end = (x.expand(len(found), -1, -1) for x in (self.flag_image_start, self.flag_image_end))
            found = torch.cat([start, found, end], dim=1)
        embedded = self.internlm_model.model.embed_tokens(batch.input_ids)
        embedded = embedded.masked_scatter((batch.input_ids == IMAGE_ID)[..., None], found)
        logits: torch.Tensor = self.internlm_model(inputs_embeds=embedded).logits
        return logits


def published(name: str) -> str:
    """XComposer's name of a parameter."""
    for theirs, own in (
        ("Qformer.layernorm.", "Qformer.bert.embeddings.LayerNorm."),
        ("Qformer.encoder.", "Qformer.bert.encoder."),
        ("attention.attention.", "attention.self."),
        ("visual_encoder.trunk.", "visual_encoder."),
    ):
        name = name.replace(theirs, own)
    return name


def reference(rank: int = 0, cross_every: int = 2, flags: bool = True, **decoder: Any) -> Reference:
    theirs = Parts(rank, cross_every, flags, **decoder)
    randomize(theirs)
    language = llama.from_hf(theirs.internlm_model.config.to_dict(), "config.json")
    model = ModelConfig(
        assembly="merged",
        language=language,
        vision=EVA_G,
        connector=ConnectorConfig(
            kind="qformer",
            num_latents=QUERIES,
            depth=3,
            num_heads=2,
            head_dim=12,
            cross_every=cross_every,
            flag_embeddings=flags,
        ),
        lora=LoraConfig(rank=rank, alpha=1.5 * rank, targets=["q", "v", "up", "down"] if rank else []),
    )
    span = model.tokens_per_image
    batch = text_and_images(language.vocab_size, IMAGE_ID, span, EVA_G.image_size, length=24)
    return Reference(model, xcomposer.table(model), theirs, theirs, batch, IMAGE_ID, names=published)


@pytest.mark.parametrize("tensor", [1, 2])
def test_logits_loss_and_gradients(tensor: int, tmp_path: Path) -> None:
    references = {
        "adapters": reference(rank=2),
        "plain": reference(cross_every=1, flags=False, vocab_size=65),
    }
    print(f"largest difference of logits: {check(references, tmp_path, tensor):.1e}")
