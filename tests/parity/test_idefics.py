"""IdeficsForVisionText2Text through the conversion table: logits, loss and gradients, fp32, on one and two
tensor-parallel ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megamm.batch import Batch
from megamm.convert.tables import idefics
from tests.convert.families import hf_idefics
from tests.parity.families import Reference, by_sample, check, text_and_images

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "normed": dict(qk_layer_norms=True, alpha_type="vector", perceiver=dict(qk_layer_norms_perceiver=True)),
    "no_added_tokens": dict(additional_vocab_size=0, cross_layer_interval=1, rope_theta=500.5),
    "tied": dict(tie_word_embeddings=True),
}
IMAGE_ID = 61


def reference(**changes: Any) -> Reference:
    theirs = hf_idefics(**changes)
    model = idefics.from_hf(theirs.config.to_dict(), "config.json")

    def logits(batch: Batch) -> torch.Tensor:
        images, mask = by_sample(batch, IMAGE_ID)
        out = theirs(input_ids=batch.input_ids, pixel_values=images, image_attention_mask=mask)
        found: torch.Tensor = out.logits
        return found

    batch = text_and_images(model.language.vocab_size, IMAGE_ID, 1, 28)
    return Reference(model, idefics.table(model), theirs, logits, batch, IMAGE_ID)


@pytest.mark.parametrize("tensor", [1, 2])
def test_logits_loss_and_gradients(tensor: int, tmp_path: Path) -> None:
    references = {name: reference(**changes) for name, changes in VARIANTS.items()}
    print(f"largest difference of logits: {check(references, tmp_path, tensor):.1e}")
