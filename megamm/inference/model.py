"""A checkpoint, ready to answer: logits for given ids and images, greedy answers to conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from megamm.batch import Batch
from megamm.config import ParallelConfig, Recipe
from megamm.data.images import ImageLoader
from megamm.data.templates import Template, Turn
from megamm.data.tokenizer import Tokenizer
from megamm.device import choose_backend, distributed_backend, pick_device
from megamm.engine import checkpoint, groups
from megamm.errors import InputError
from megamm.inference.greedy import (
    Asking,
    NextLogits,
    check_placeholders,
    evaluation_loader,
    load_pictures,
    padded,
    question_batch,
)
from megamm.models.freezing import part_of
from megamm.models.vlm import VisionLanguageModel, build_model


def load(
    path: str | Path,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] | None = None,
    image_token_id: int | None = None,
) -> Model:
    """Load a checkpoint of any parallel layout into this process.

    Args:
        path: a checkpoint, or a run directory (its newest checkpoint).
        device: "auto", "cpu" or "cuda".
        precision: of weights and activations; None means the one that it was trained in.
        image_token_id: placeholder of an image, for a checkpoint that came without a tokenizer and does not
            say; negative ids count from the end of the vocabulary.
    Returns:
        The model in evaluation mode.
    Raises:
        InputError: no checkpoint there, or a damaged one.
    """
    where = checkpoint.resolve(path)
    stored = checkpoint.read_recipe(where)
    recipe = replace(
        stored,
        parallel=ParallelConfig(backend=stored.parallel.backend),
        training=replace(stored.training, freeze=[], precision=precision or stored.training.precision),
    )
    target = pick_device(device)
    layout = groups.initialize(recipe.parallel, target, distributed_backend(target))
    words = checkpoint.tokenizer_directory(where)
    tokenizer = Tokenizer.load(words) if words.is_dir() else None
    image_id = tokenizer.image_id if tokenizer else recipe.model.image_token_id
    if image_id is None and image_token_id is not None:
        image_id = image_token_id % recipe.model.language.vocab_size
    if recipe.model.assembly == "language":
        image_id = -1  # it has no placeholder for images
    if image_id is None:
        raise InputError(
            f"{words}: missing, and the recipe has no model.image_token_id; restore the tokenizer"
        )
    backend_name, _ = choose_backend("auto")
    models = build_model(recipe, layout, backend_name, image_id)
    missing = checkpoint.load_weights(where, models, layout, part_of)
    if missing:
        raise InputError(
            f"{where}: has no weights for {', '.join(missing)}; use a checkpoint of the whole model"
        )
    model = models[0].eval()
    assert isinstance(model, VisionLanguageModel)
    return Model(model, recipe, tokenizer, target)


class Model:
    """A vision-language model in one process.

    Attributes:
        recipe: that it was trained with, for one process.
        tokenizer: of the checkpoint; None if it was imported without one.
        template: prompt template for `generate`.
    """

    def __init__(
        self,
        network: VisionLanguageModel,
        recipe: Recipe,
        tokenizer: Tokenizer | None,
        device: torch.device,
    ) -> None:
        self.network, self.recipe, self.tokenizer, self.device = network, recipe, tokenizer, device
        self.template = Template.by_name(recipe.template)
        self._image_loader: ImageLoader | None = None

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor, images: torch.Tensor | None = None) -> torch.Tensor:
        """Next-token logits.

        Args:
            input_ids: [B, S] int64. Merged models: one image token per image feature, as transformers'
                LLaVA takes them; cross-attention models: one per image.
            images: [N, 3, H, W] already normalised, in the order of their placeholders; None for text only.
        Returns:
            [B, S, V] without vocabulary padding; fp32 for fp32 weights.
        Raises:
            InputError: placeholders and images do not agree.
        """
        batch = self._batch(input_ids, images)
        vocab_size = self.recipe.model.language.vocab_size
        return self.network(batch, return_logits=True)[..., :vocab_size]

    @torch.no_grad()
    def generate(
        self,
        conversations: Sequence[Sequence[Turn]],
        images: Sequence[Sequence[str | Path]],
        max_new_tokens: int = 64,
    ) -> list[str]:
        """Greedy answers to conversations that end with a question.

        The whole sequence is computed again for every new token (there is no key/value cache).

        Args:
            conversations: turns, with `<image>` where a picture stands.
            images: the picture files of each conversation, in the order of their placeholders.
            max_new_tokens: longest answer.
        Raises:
            InputError: a picture is missing or unreadable, counts differ, a prompt is too long, or the
                checkpoint has no tokenizer.
        """
        asking = self._asking()
        if not conversations:
            return []
        prompts = [asking.prompt(turns) for turns in conversations]
        self._check_counts(conversations, images)
        pixels = self._load_images(images)
        asking.check_length(max(map(len, prompts)), max_new_tokens, "--max-new-tokens")
        return asking.answer(prompts, self._next_logits(pixels), max_new_tokens)

    def _asking(self) -> Asking:
        return Asking.of(self.recipe, self._need_tokenizer(), self.template)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(
                "the checkpoint was imported without a tokenizer; import it again with --tokenizer"
            )
        return self.tokenizer

    def _next_logits(self, images: torch.Tensor | None) -> NextLogits:
        """What computes the logits behind sequences that show `images`, all of them in one batch."""

        def next_logits(sequences: list[list[int]]) -> torch.Tensor:
            logits = self.logits(padded(sequences, self._need_tokenizer().pad_id), images)
            ends = torch.tensor([len(sequence) - 1 for sequence in sequences], device=logits.device)
            return logits[torch.arange(len(sequences)), ends]

        return next_logits

    def _batch(self, input_ids: torch.Tensor, images: torch.Tensor | None) -> Batch:
        if input_ids.dim() != 2:
            raise InputError(f"input_ids: shape {tuple(input_ids.shape)}, expected [batch, sequence]")
        vision = self.recipe.model.vision
        size = vision.image_size
        if images is None:
            images = torch.empty(0, 3, size, size)
        if images.dim() != 4 or images.shape[1:] != (3, size, size):
            raise InputError(f"images: shape {tuple(images.shape)}, expected [images, 3, {size}, {size}]")
        per_image = self.recipe.model.tokens_per_image
        return question_batch(input_ids, images, self.network.image_token_id, per_image).to(self.device)

    def _load_images(self, images: Sequence[Sequence[str | Path]]) -> torch.Tensor | None:
        paths = [path for row in images for path in row]
        if not paths:
            return None
        if self._image_loader is None:
            self._image_loader = evaluation_loader(self.recipe)
        return load_pictures(paths, self._image_loader)

    def _check_counts(
        self, conversations: Sequence[Sequence[Turn]], images: Sequence[Sequence[str | Path]]
    ) -> None:
        if len(images) != len(conversations):
            raise InputError(
                f"{len(conversations)} conversations, but images for {len(images)}; give a list for each"
            )
        for row, (turns, files) in enumerate(zip(conversations, images, strict=True)):
            check_placeholders(turns, len(files), f"conversation {row}")
