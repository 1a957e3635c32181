"""LlavaForConditionalGeneration through the conversion table: logits, loss and gradients, fp32, on one and on
two tensor-parallel ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megamm.batch import Batch
from megamm.convert.tables import llava
from tests.convert.helpers import VOCAB_SIZE, hf_llava
from tests.parity.families import Reference, check, text_and_images

VARIANTS: dict[str, dict[str, Any]] = {
    "grouped_queries_odd_vocabulary": dict(text=dict(vocab_size=VOCAB_SIZE + 13)),
    "tied_class_token_kept": dict(
        text=dict(tie_word_embeddings=True, num_key_value_heads=4),
        tie_word_embeddings=True,
        vision_feature_select_strategy="full",
        image_seq_length=5,
    ),
}
IMAGE_ID = VOCAB_SIZE - 1


def reference(**changes: Any) -> Reference:
    theirs = hf_llava(**changes)
    model = llava.from_hf(theirs.config.to_dict(), "config.json")

    def logits(batch: Batch) -> torch.Tensor:
        found: torch.Tensor = theirs(input_ids=batch.input_ids, pixel_values=batch.images).logits
        return found

    batch = text_and_images(model.language.vocab_size, IMAGE_ID, model.tokens_per_image, 28)
    return Reference(model, llava.table(model), theirs, logits, batch, IMAGE_ID)


@pytest.mark.parametrize("tensor", [1, 2])
def test_logits_loss_and_gradients(tensor: int, tmp_path: Path) -> None:
    references = {name: reference(**changes) for name, changes in VARIANTS.items()}
    print(f"largest difference of logits: {check(references, tmp_path, tensor):.1e}")
