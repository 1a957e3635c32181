"""Decoders of transformers through the conversion tables: logits, loss and gradients, fp32, on one and two
tensor-parallel ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megamm.batch import Batch
from megamm.config import ConnectorConfig, ModelConfig, VisionConfig
from megamm.convert.tables import llama
from tests.convert.families import hf_decoder
from tests.parity.families import Reference, check, text_only

VARIANTS: dict[str, dict[str, Any]] = {
    "grouped_queries": {},
    "llama": dict(num_key_value_heads=4, rms_norm_eps=1e-6),
    "mistral": dict(sliding_window=7, rope_theta=500.5),
    "internlm": dict(num_key_value_heads=4, attention_bias=True),
    "odd_vocabulary": dict(vocab_size=97, hidden_size=48, num_attention_heads=6, rms_norm_eps=1e-3),
    "tied": dict(tie_word_embeddings=True),
}
VISION = VisionConfig(image_size=16, patch_size=8, width=16, num_layers=1, num_heads=2, mlp_width=16)


def reference(**changes: Any) -> Reference:
    theirs = hf_decoder(**changes)
    language = llama.from_hf(theirs.config.to_dict(), "config.json")
    # an encoder and a projector that no position sees
    model = ModelConfig(language=language, vision=VISION, connector=ConnectorConfig(kind="mlp"))

    def logits(batch: Batch) -> torch.Tensor:
        found: torch.Tensor = theirs(input_ids=batch.input_ids).logits
        return found

    return Reference(model, llama.table(language), theirs, logits, text_only(language.vocab_size), -1)


@pytest.mark.parametrize("tensor", [1, 2])
def test_logits_loss_and_gradients(tensor: int, tmp_path: Path) -> None:
    references = {name: reference(**changes) for name, changes in VARIANTS.items()}
    print(f"largest difference of logits: {check(references, tmp_path, tensor):.1e}")
