"""A random LLaVA of transformers -> our converter -> our model: the same logits, loss, gradients, answers.

Proves model, converter and the reading of checkpoints at once, in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from megamm.batch import IGNORE_INDEX, Batch
from megamm.config import Recipe
from megamm.convert import export_checkpoint, import_checkpoint, import_llava
from megamm.convert.tables import llava
from megamm.data.templates import Turn
from megamm.data.tokenizer import Tokenizer
from megamm.engine import checkpoint, groups
from megamm.engine.groups import Groups
from megamm.errors import InputError
from megamm.inference import load
from tests.convert.helpers import (
    VOCAB_SIZE,
    assert_bitwise_equal,
    hf_llava,
    hub_layout,
    read_tensors,
    recipe_for,
    save_hf,
)
from tests.one_process import build, whole

IMAGE_ID = VOCAB_SIZE - 1
LENGTH = 24
ATOL = 1e-5

VARIANTS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "multi-head, last layer": dict(text=dict(num_key_value_heads=4), vision_feature_layer=-1),
    "one kv head, class token kept": dict(
        text=dict(num_key_value_heads=1), vision_feature_select_strategy="full", image_seq_length=5
    ),
    "odd vocabulary, other theta and eps": dict(
        text=dict(vocab_size=VOCAB_SIZE + 13, rope_theta=500.5, rms_norm_eps=1e-3),
        vision=dict(layer_norm_eps=1e-3),
    ),
    "tied": dict(text=dict(tie_word_embeddings=True), tie_word_embeddings=True),
    "gelu, first layer": dict(vision=dict(hidden_act="gelu"), vision_feature_layer=1),
    "sliding window": dict(text=dict(sliding_window=7)),
    "attention biases": dict(text=dict(attention_bias=True)),
}


@dataclass
class Pair:
    """The same model on both sides."""

    theirs: torch.nn.Module
    source: Path
    checkpoint: Path

    @property
    def recipe(self) -> Recipe:
        return checkpoint.read_recipe(self.checkpoint)


def mute(model: torch.nn.Module) -> None:
    """Logits of zero, never the largest, for what random weights would say and a trained model would not:
    lone bytes (which tokenizers show differently), `<image>`, ids that the tokenizer does not have."""
    with torch.no_grad():
        model.lm_head.weight[3:259] = 0  # LLaMA's byte pieces
        model.lm_head.weight[IMAGE_ID:] = 0


@pytest.fixture(scope="module")
def pairs(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Pair]]:
    """All variants; imported before any groups exist, because importing makes and leaves its own."""
    found = {}
    for variant, config in VARIANTS.items():
        root = tmp_path_factory.mktemp("pair")
        theirs = hf_llava(**config)
        if variant != "tied":
            mute(theirs)
        source = save_hf(theirs, tokenizer, root / "hf")
        recipe = recipe_for(import_llava(source).model)
        recipe.training.precision = "fp32"
        found[variant] = Pair(theirs, source, import_checkpoint([source], root / "checkpoint", recipe))
    yield found
    groups.shutdown()


def ids_and_images(theirs: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Two samples: two images and then text only, one image at the very start."""
    span = theirs.config.image_seq_length
    ids = torch.randint(3, IMAGE_ID, (3, LENGTH))
    for row, start in ((0, 2), (0, 3 + span), (2, 0)):
        ids[row, start : start + span] = IMAGE_ID
    return ids, torch.randn(3, 3, 28, 28)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_logits(variant: str, pairs: dict[str, Pair]) -> None:
    pair = pairs[variant]
    ids, images = ids_and_images(pair.theirs)
    with torch.no_grad():
        wanted = pair.theirs(input_ids=ids, pixel_values=images).logits
    found = load(pair.checkpoint, "cpu").logits(ids, images)
    assert found.shape == wanted.shape and found.dtype == torch.float32
    assert wanted.std() > 0.1  # the comparison is not one of zeros
    torch.testing.assert_close(found, wanted, atol=ATOL, rtol=1e-5)


@pytest.mark.parametrize("variant", ["grouped queries", "one kv head, class token kept", "tied"])
def test_export_gives_back_every_bit(variant: str, pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs[variant]
    report = export_checkpoint(pair.checkpoint, tmp_path / "out")
    assert_bitwise_equal(read_tensors(report.out), hub_layout(read_tensors(pair.source)))


@pytest.fixture(scope="module")
def layout(pairs: dict[str, Pair]) -> Groups:
    """Groups of one, joined after all imports are done."""
    from megamm.config import ParallelConfig

    return groups.initialize(ParallelConfig(), torch.device("cpu"), "gloo")


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_loss_and_gradients(variant: str, pairs: dict[str, Pair], layout: Groups) -> None:
    pair = pairs[variant]
    ids, images = ids_and_images(pair.theirs)
    labels = ids.clone()
    labels[ids == IMAGE_ID] = IGNORE_INDEX
    labels[:, : LENGTH // 3] = IGNORE_INDEX
    labels[1, -4:] = IGNORE_INDEX

    theirs = pair.theirs.train()
    theirs.zero_grad()
    output = theirs(input_ids=ids, pixel_values=images, labels=labels)
    output.loss.backward()

    weights = checkpoint.read_weights(pair.checkpoint)
    ours = build(pair.recipe, layout, weights, image_id=IMAGE_ID).train()
    shifted = torch.cat([labels[:, 1:], torch.full((3, 1), IGNORE_INDEX)], dim=1)
    positions = torch.arange(LENGTH).expand(3, -1)
    batch = Batch(ids, shifted, positions, images, torch.tensor([2, 0, 1]), torch.arange(3))
    losses = ours(batch)
    loss = losses[shifted != IGNORE_INDEX].mean()
    loss.backward()

    torch.testing.assert_close(loss, output.loss, rtol=1e-6, atol=0)
    compare_gradients(pair, whole(ours, lambda p: p.grad))


def compare_gradients(pair: Pair, ours: dict[str, torch.Tensor]) -> None:
    """Every gradient of theirs has its counterpart, equal beside its largest element."""
    table = llava.table(pair.recipe.model)
    theirs = {table.canonical(name): p.grad for name, p in pair.theirs.named_parameters()}
    num_compared = 0
    for rule in table.rules:
        wanted = [theirs.pop(key) for key in rule.theirs]
        if rule.ours not in ours:  # behind the feature layer
            assert rule.ours.startswith("vision.") and wanted == [None] * len(wanted), rule.ours
            continue
        for key, found, gradient in zip(rule.theirs, rule.to_theirs(ours[rule.ours]), wanted, strict=True):
            # (without rotary positions a key bias moves all scores of a query alike: 1e-8 is for its zeros)
            difference, size = (found - gradient).abs().max(), gradient.abs().max()
            assert size > 0 and difference <= 1e-5 * size + 1e-8, (key, float(difference), float(size))
            num_compared += 1
    assert not theirs and num_compared > 30


PROMPTS = [
    ("<image>\nwhat is shown in this picture?", 1),
    ("<image><image>\ndescribe", 2),
    ("a red circle", 0),
]


@pytest.mark.parametrize("variant", ["grouped queries", "odd vocabulary, other theta and eps"])
def test_greedy_answers(variant: str, pairs: dict[str, Pair], tmp_path: Path) -> None:
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    pair = pairs[variant]
    out = export_checkpoint(pair.checkpoint, tmp_path / "out").out
    theirs = LlavaForConditionalGeneration.from_pretrained(out).eval()
    processor = AutoProcessor.from_pretrained(out)
    files = []
    for index, (width, height) in enumerate([(28, 28), (61, 40)]):
        noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).numpy()
        files.append(tmp_path / f"{index}.png")
        Image.fromarray(noise).save(files[-1])

    conversations = [[Turn("user", text)] for text, _ in PROMPTS]
    pictures = [files[:count] for _, count in PROMPTS]
    answers = load(pair.checkpoint, "cpu").generate(conversations, pictures, max_new_tokens=12)

    wanted = []
    for (text, count), paths in zip(PROMPTS, pictures, strict=True):
        messages = [{"role": "user", "content": text}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(
            text=prompt, images=[Image.open(path) for path in paths] or None, return_tensors="pt"
        )
        assert (inputs["input_ids"] == IMAGE_ID).sum() == 4 * count
        with torch.no_grad():
            ids = theirs.generate(**inputs, do_sample=False, max_new_tokens=12)
        new = ids[0, inputs["input_ids"].shape[1] :]
        wanted.append(processor.decode(new, skip_special_tokens=True).strip())
    assert answers == wanted
    assert len(set(answers)) == len(answers) and all(answers)


def test_a_model_without_a_tokenizer(pairs: dict[str, Pair], tmp_path: Path) -> None:
    """Weights and config.json are enough for logits and for the way back."""
    pair = pairs["grouped queries"]
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(pair.source / name)
    imported = import_checkpoint([bare], tmp_path / "checkpoint")
    model, (ids, images) = load(imported, "cpu"), ids_and_images(pair.theirs)
    with torch.no_grad():
        wanted = pair.theirs(input_ids=ids, pixel_values=images).logits
    torch.testing.assert_close(model.logits(ids, images), wanted, atol=ATOL, rtol=1e-5)
    with pytest.raises(InputError, match="without a tokenizer; import it again with --tokenizer"):
        model.generate([[Turn("user", "What is it?")]], [[]])
    report = export_checkpoint(imported, tmp_path / "out")
    assert_bitwise_equal(read_tensors(report.out), hub_layout(read_tensors(pair.source)))
    again = LlavaForConditionalGeneration.from_pretrained(report.out)
    assert again.config.image_token_id == IMAGE_ID and report.notes


def test_fp32_weights_are_computed_in_fp32(pairs: dict[str, Pair], tmp_path: Path) -> None:
    imported = import_checkpoint([pairs["grouped queries"].source], tmp_path / "checkpoint")
    assert load(imported, "cpu").logits(torch.full((1, 5), 7)).dtype == torch.float32


def test_importing_leaves_a_loaded_model_usable(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs["grouped queries"]
    model, ids = load(pair.checkpoint, "cpu"), torch.full((1, 5), 7)
    before = model.logits(ids)
    import_checkpoint([pair.source], tmp_path / "checkpoint", pair.recipe)
    assert torch.equal(model.logits(ids), before)
