"""Which settings of adapters make sense."""

from __future__ import annotations

import pytest

from megamm.errors import InputError
from megamm.recipe import validate
from megamm.recipe_checks import trainable_parts
from tests.training.test_recipe import make

ON = ["model.lora.rank=8", "model.lora.targets=[q, v]"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.lora.rank=-1"], "model.lora.rank: -1 is negative"),
        (
            ["model.lora.targets=[q, up]"],
            "model.lora.targets: q, up would get no adapters, as model.lora.rank is 0",
        ),
        (["model.lora.rank=8"], "model.lora.targets: is empty, so a rank of 8 has no effect; name linears"),
        ([*ON, "model.lora.targets=[q, up, q]"], "model.lora.targets: names q twice"),
        (
            [*ON, "model.lora.targets=[qkv]"],
            "must be a list [..] whose items are one of q, k, v, o, gate, up, down",
        ),
        ([*ON, "model.lora.rank=129"], "model.lora.rank: 129 is more than model.language.hidden_size 128"),
        ([*ON, "model.lora.alpha=0"], "model.lora.alpha: 0.0 is not positive"),
        ([*ON, "model.lora.dropout=1"], "model.lora.dropout: 1.0 is outside [0, 1)"),
        (["training.freeze=[lora]"], "training.freeze: holds lora, but model.lora.rank is 0"),
        ([*ON, "training.freeze=[vision, connector, language, lora]"], "every part is frozen"),
    ],
)
def test_settings_without_a_meaning_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        make(*overrides)
    assert message in str(caught.value)


def test_adapters_alone_are_something_to_train() -> None:
    recipe = make(*ON, "training.freeze=[vision, connector, language]", "training.init_from=ckpt")
    assert trainable_parts(recipe) == ["lora"] and validate(recipe) == []
    assert trainable_parts(make()) == ["vision", "connector", "language"]


def test_a_decoder_trained_beside_its_adapters_is_warned_of() -> None:
    (warning,) = validate(make(*ON))
    assert warning.startswith("model.lora: ") and "add language to training.freeze" in warning
