"""Rates of parts, new tokens and a kept optimizer that make no sense are refused with the remedy."""

from __future__ import annotations

from typing import Any

import pytest

from megamm.errors import InputError
from tests.dist.tiny import tiny_recipe


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"optimizer.parts": "[{part: lora, lr: 0.1}]"}, "lora is not trained"),
        ({"optimizer.parts": "[{part: vision, lr: 0.1}, {part: vision, lr: 0.2}]"}, "vision is named twice"),
        ({"optimizer.parts": "[{part: vision}]"}, "vision has no value of its own"),
        ({"optimizer.parts": "[{part: vision, lr: 0.1, min_lr: 0.2}]"}, "above its lr 0.1"),
        ({"optimizer.parts": "[{part: vision, weight_decay: -1}]"}, "weight_decay -1"),
        ({"training.init_optimizer": "keep"}, "init_from names no checkpoint"),
        (
            {
                "training.init_optimizer": "keep",
                "training.init_from": "x",
                "parallel.distributed_optimizer": "false",
            },
            "keep needs parallel.distributed_optimizer",
        ),
        (
            {"training.unfreeze.new_tokens": "true", "training.freeze": "[language]"},
            "model.language.added_vocab is 0",
        ),
        (
            {"training.unfreeze.new_tokens": "true", "model.language.added_vocab": 2},
            "add language to training.freeze",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_recipe("merged", overrides)
