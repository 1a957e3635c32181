"""FLOPs of whole steps: the planner's formulas against torch's counter on the real models.

torch counts what runs. Three things run that the definition of model FLOPs leaves out, or the other way
round; they are worked out here, exactly, so that nothing else can hide behind a tolerance:
- plain attention computes the square of scores, of which causal attention needs half;
- keys and values of media are computed for every place of a padded batch, not only where an image is;
- positions in front of the first image attend to no media, though the definition counts all positions.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megamm.batch import IGNORE_INDEX, Batch
from megamm.config import Recipe
from megamm.engine.groups import Groups
from megamm.models.vlm import VisionLanguageModel
from megamm.planning.flops import flops_per_step, hardware_flops_per_step, recomputed_flops
from tests.dist.tiny import LORA, tiny_batch, tiny_recipe
from tests.one_process import build, layout

__all__ = ["layout"]
FIRST_IMAGE = 3  # position of it in the samples of tiny_batch


def counted(model: VisionLanguageModel, batch: Batch) -> float:
    """What torch counts in a forward and backward pass."""
    model.train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch).sum().backward()
    return counter.get_total_flops()


def last_products(recipe: Recipe, batch: Batch, num_layers: int) -> float:
    """The last products of recomputed layers, which plain linears do not compute again."""
    m = recipe.model.language
    return num_layers * 2 * batch.input_ids.numel() * m.ffn_hidden_size * m.hidden_size


def unneeded(recipe: Recipe, batch: Batch, times: float, cross_times: float) -> float:
    """What runs although the definition leaves it out, less what it counts although it does not run.

    Args:
        times: passes over the decoder's attention (forward 1, backward 2, recomputed 1).
        cross_times: passes over the gated blocks.
    """
    m, c, model = recipe.model.language, recipe.model.cross_attention, recipe.model
    samples, length = batch.input_ids.shape
    found = m.num_layers * times * samples * 2 * length**2 * m.hidden_size
    if model.assembly == "cross_attention":
        inner = m.hidden_size if c.geometry == "idefics" else c.num_heads * c.head_dim
        blocks = sum(c.stands_before(layer) for layer in range(m.num_layers))
        places = samples * int(batch.images_per_sample.max()) - batch.num_images
        latents = model.connector.num_latents
        found += blocks * cross_times * places * latents * 2 * (2 * model.vision.width * inner)
        blind = samples * FIRST_IMAGE  # every sample of the batch has an image
        found -= blocks * cross_times * blind * 4 * latents * inner
    return found


FROZEN = {"training.freeze": "[vision, language]"}
CASES: dict[str, tuple[str, dict[str, Any], float, float]] = {
    "merged": ("merged", {}, 3, 3),
    "language-frozen": ("merged", FROZEN, 3, 3),
    "encoder-frozen": ("merged", {"training.freeze": "[vision]"}, 3, 3),
    "encoder-partly": ("merged", {"training.freeze": "[vision]", "training.unfreeze.vision": 1}, 3, 3),
    "qformer": ("qformer", FROZEN, 3, 3),
    "flamingo": ("cross_attention", {}, 3, 3),
    "idefics": ("idefics", {}, 3, 3),
    "lora": ("merged", {**LORA, "model.lora.dropout": 0}, 3, 3),
    "full": ("merged", {"training.recompute.language": "full"}, 4, 4),
    "full-flamingo": ("cross_attention", {"training.recompute.language": "full"}, 4, 4),
    "full-in-part": (
        "merged",
        {"training.recompute.language": "full", "training.recompute.layers": 1},
        3.25,
        3.25,
    ),
    "selective": (
        "idefics",
        {"training.recompute.language": "selective", "training.recompute.modules": "[core_attn, mlp]"},
        4,
        3,
    ),
    "encoder": ("qformer", {"training.recompute.vision": True, "training.recompute.connector": True}, 3, 3),
    "projector": ("merged", {"training.recompute.vision": True, "training.recompute.connector": True}, 3, 3),
}


@pytest.mark.parametrize("case", CASES)
def test_whole_steps(case: str, layout: Groups) -> None:
    kind, overrides, times, cross_times = CASES[case]
    recipe = tiny_recipe(kind, overrides)
    batch = tiny_batch(recipe, 0)
    assert batch.images_per_sample.min() > 0
    num_labels = int((batch.labels != IGNORE_INDEX).sum())
    sizes = (batch.input_ids.numel(), batch.num_images, num_labels)
    measured = counted(build(recipe, layout), batch) - unneeded(recipe, batch, times, cross_times)
    again = {"full": 4, "full-flamingo": 4, "full-in-part": 1, "selective": 4}.get(case, 0)
    wanted = hardware_flops_per_step(recipe, *sizes) - last_products(recipe, batch, again)
    assert wanted == pytest.approx(measured, rel=1e-9)
    if case.startswith(("full", "selective", "encoder", "projector")) and "recompute" in str(overrides):
        assert flops_per_step(recipe, *sizes) < 0.99 * measured


def test_frozen_layers_below_the_first_trained_one_are_not_computed_again(layout: Groups) -> None:
    """No gradient crosses them, so nothing of them was to be kept."""
    overrides = {
        "training.freeze": "[vision, connector, language]",
        "training.unfreeze.language": 3,
        "training.recompute.language": "full",
    }
    recipe = tiny_recipe("merged", overrides)
    batch = tiny_batch(recipe, 0)
    sizes = (batch.input_ids.numel(), batch.num_images, int((batch.labels != IGNORE_INDEX).sum()))
    # forward through all layers, backward and again through the last of four
    square = unneeded(recipe, batch, 1 + 3 / 4, 0)
    wanted = hardware_flops_per_step(recipe, *sizes) - last_products(recipe, batch, 1)
    assert wanted == counted(build(recipe, layout), batch) - square
    assert recomputed_flops(recipe, *sizes[:2])["language"] > 0


def test_new_tokens_in_a_frozen_language_model(layout: Groups) -> None:
    """Gradients go down to the embedding; of the output layer, the added rows are trained."""
    frozen = {"training.freeze": "[vision, connector, language]", "training.unfreeze.language": 3}
    with_tokens = {**frozen, "training.unfreeze.new_tokens": True, "model.language.added_vocab": 5}
    recipe = tiny_recipe("merged", with_tokens)
    batch = tiny_batch(recipe, 0)
    sizes = (batch.input_ids.numel(), batch.num_images, int((batch.labels != IGNORE_INDEX).sum()))
    model = build(tiny_recipe("merged", frozen), layout)
    model.language.embedding.requires_grad_(True)
    measured = counted(model, batch) - unneeded(recipe, batch, 3, 3)
    # trained along with the last layer, the output layer has its whole gradient already
    assert flops_per_step(recipe, *sizes) == measured
    frozen = tiny_recipe("merged", {**FROZEN, "model.language.added_vocab": 5})
    tokens = tiny_recipe(
        "merged", {**FROZEN, "training.unfreeze.new_tokens": True, "model.language.added_vocab": 5}
    )
    rows = 2 * sizes[2] * recipe.model.language.hidden_size * 5
    assert flops_per_step(tokens, *sizes) == flops_per_step(frozen, *sizes) + rows
