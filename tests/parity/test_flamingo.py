"""open_flamingo's Flamingo through the conversion tables, as OpenFlamingo and as InfiMM have it: logits, loss
and gradients, fp32, on one and two tensor-parallel ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.families import check
from tests.parity.flamingo import infimm_reference, open_flamingo_reference


@pytest.mark.parametrize("tensor", [1, 2])
def test_logits_loss_and_gradients(tensor: int, tmp_path: Path) -> None:
    references = {
        "llama_every_2": open_flamingo_reference(2, num_key_value_heads=4),
        "mistral_every_1": open_flamingo_reference(1, sliding_window=7, num_hidden_layers=2),
        "infimm_every_2": infimm_reference(2, sliding_window=7),
        "infimm_every_3": infimm_reference(3, num_key_value_heads=4, vocab_size=65),
    }
    print(f"largest difference of logits: {check(references, tmp_path, tensor):.1e}")
