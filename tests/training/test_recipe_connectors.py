"""Which keys of connectors and gated blocks fit together."""

from __future__ import annotations

import pytest

from megamm.errors import InputError
from megamm.recipe_checks.model import BELONGS_TO
from tests.training.test_recipe import FLAMINGO, make

QFORMER = ["model.connector.kind=qformer", "model.connector.num_latents=8"]
IDEFICS = [*FLAMINGO, "model.cross_attention.geometry=idefics"]
OTHER = {
    "connector.activation": "relu",
    "connector.qk_norm": "true",
    "connector.cross_every": "3",
    "connector.flag_embeddings": "true",
    "cross_attention.num_heads": "4",
    "cross_attention.head_dim": "32",
    "cross_attention.ffn_multiple": "2",
    "cross_attention.skip_text_only": "true",
    "cross_attention.qk_norm": "true",
    "cross_attention.vector_gates": "true",
}
NARROW = ["model.vision.width=18", "model.vision.num_heads=2", "model.connector.ffn_multiple=3"]
INSTEAD = {"resampler": "qformer", "qformer": "resampler", "flamingo": "idefics", "idefics": "flamingo"}
ASSEMBLIES = {"resampler": FLAMINGO, "qformer": QFORMER, "flamingo": FLAMINGO, "idefics": IDEFICS}


@pytest.mark.parametrize(("key", "decider", "needed"), BELONGS_TO)
def test_keys_of_one_kind_are_refused_with_another(key: str, decider: str, needed: str) -> None:
    change, wrong = f"model.{key}={OTHER[key]}", INSTEAD[needed]
    make(*ASSEMBLIES[needed], change)
    with pytest.raises(InputError) as caught:
        make(*ASSEMBLIES[wrong], change)
    for part in (f"model.{key}: ", f"model.{decider} {wrong}, only with {needed}; remove it"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.assembly=cross_attention", *QFORMER], "qformer does not fit model.assembly cross_attention"),
        (
            [*QFORMER, "model.connector.num_heads=3", "parallel.tensor=2"],
            "connector.num_heads: 3 is not",
        ),
        ([*QFORMER, "model.connector.cross_every=0"], "model.connector.cross_every: 0 is not positive"),
        (
            [*QFORMER, "data.sequence_length=10", "model.connector.flag_embeddings=true"],
            "beside the 10 positions of one image; raise it or lower model.connector.num_latents",
        ),
        (
            [*FLAMINGO, "parallel.tensor=4", *NARROW],
            "model.vision.width x model.connector.ffn_multiple: 54 is not divisible by parallel.tensor 4",
        ),
        (
            [*IDEFICS, "model.connector.num_heads=3", "parallel.tensor=2"],
            "connector.num_heads: 3 is not",
        ),
    ],
)
def test_sizes_that_do_not_fit(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        make(*overrides)
    assert message in str(caught.value)


def test_idefics_has_a_block_before_the_first_layer_whatever_the_interval() -> None:
    recipe = make(*IDEFICS, "model.cross_attention.every=9")
    blocks = [recipe.model.cross_attention.stands_before(layer) for layer in range(4)]
    assert blocks == [True, False, False, False]
    make(*IDEFICS, "parallel.tensor=4")  # the flamingo geometry's 8 heads and their size do not matter
