"""Is a checkpoint the same model as a Hugging Face directory? Logits of both on random inputs, in fp32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megamm.convert.engine import read_json
from megamm.convert.files import SourceFiles
from megamm.errors import InputError
from megamm.inference.model import Model, load

# model_type -> name of the class in transformers that gives logits
CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "idefics": "IdeficsForVisionText2Text",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}
_TEXT = 16  # positions besides those of the image


@dataclass(frozen=True)
class Comparison:
    """How far two models are apart.

    Attributes:
        difference: largest one of two logits.
        scale: largest logit of the reference.
        num_images: that were shown; 0 for language models.
    """

    difference: float
    scale: float
    num_sequences: int
    num_positions: int
    num_images: int

    def is_within(self, tolerance: float) -> bool:
        """Whether no logits differ by more than `tolerance`, or that times the largest logit above 1."""
        return self.difference <= tolerance * max(1.0, self.scale)


@torch.no_grad()
def compare_with_reference(checkpoint: Path, directory: Path, seed: int = 0) -> Comparison:
    """Compare the logits of a checkpoint with those of transformers; both models are in memory at once.

    Raises:
        InputError: one of them cannot be read, transformers has no class for the model (nothing from the
            directory is ever executed), or the two do not even take the same inputs.
    """
    theirs = _reference(directory)
    # any placeholder will do: the inputs are random, and both models are shown the same
    ours = load(checkpoint, device="cpu", precision="fp32", image_token_id=-1)
    ids, images, images_of = _inputs(ours, seed)
    found = ours.logits(ids, images)
    try:
        wanted = _logits(theirs, ids, images, images_of)
    except (IndexError, ValueError, RuntimeError) as error:
        line = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{directory}: does not take the ids and images of the checkpoint ({line}); compare it with the"
            " model that it was made of"
        ) from None
    if found.shape != wanted.shape:
        raise InputError(
            f"{directory}: gives logits for {wanted.shape[-1]} tokens, the checkpoint for {found.shape[-1]};"
            " compare it with the model that it was made of"
        )
    difference = (found - wanted).abs().max()
    return Comparison(
        difference=float(difference) if difference.isfinite() else float("inf"),
        scale=float(wanted.abs().max()),
        num_sequences=ids.shape[0],
        num_positions=ids.shape[1],
        num_images=0 if images is None else len(images),
    )


def _reference(directory: Path) -> Any:
    try:
        import transformers
    except ImportError:
        raise InputError("transformers: not installed; pip install 'megamm[hf]'") from None
    transformers.utils.logging.disable_progress_bar()
    kind = read_json(directory / "config.json").get("model_type")
    if kind not in CLASSES:
        raise InputError(
            f"{directory / 'config.json'}: transformers has no class of its own with logits for model_type"
            f" {kind!r}; compare with one of {', '.join(CLASSES)}"
        )
    SourceFiles(directory)  # says more clearly than transformers what is wrong with files of weights
    try:
        model, info = getattr(transformers, CLASSES[kind]).from_pretrained(
            directory, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # foreign files and foreign code lead to errors of any kind
        line = str(error).strip().partition("\n")[0]
        raise InputError(f"{directory}: transformers cannot load it ({line}); fetch it again") from None
    if info["missing_keys"]:
        missing = min(info["missing_keys"])
        raise InputError(f"{directory}: has no weights for {missing}; compare with a complete model")
    return model.eval()


def _inputs(model: Model, seed: int) -> tuple[torch.Tensor, torch.Tensor | None, list[int]]:
    """([B, S] ids, [N, 3, h, w] images, images of each sequence): text behind an image, and text alone."""
    config, image_id = model.recipe.model, model.network.image_token_id
    generator = torch.Generator().manual_seed(seed)
    has_images = config.assembly != "language"
    span = config.tokens_per_image if has_images else 0
    ids = torch.randint(1, config.language.vocab_size, (2, span + _TEXT), generator=generator)
    ids[ids == image_id] = 1 if image_id != 1 else 2
    if not has_images:
        return ids, None, [0, 0]
    ids[0, 2 : 2 + span] = image_id
    size = config.vision.image_size
    return ids, torch.randn(1, 3, size, size, generator=generator), [1, 0]


def _logits(model: Any, ids: torch.Tensor, images: torch.Tensor | None, images_of: list[int]) -> torch.Tensor:
    """[B, S, V] of a class of transformers."""
    inputs: dict[str, torch.Tensor] = {"input_ids": ids}
    if images is not None and model.config.model_type == "idefics":
        rows = [F.pad(own, (0, 0) * 3 + (0, 1 - len(own))) for own in images.split(images_of)]
        inputs["pixel_values"] = torch.stack(rows)
        mask = torch.zeros(*ids.shape, 1, dtype=torch.bool)
        mask[0, 2:] = True  # from the placeholder on
        inputs["image_attention_mask"] = mask
    elif images is not None:
        inputs["pixel_values"] = images
    logits: torch.Tensor = model(**inputs).logits
    return logits
