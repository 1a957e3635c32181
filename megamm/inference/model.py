"""A checkpoint, ready to answer: logits for given ids and images, answers to conversations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from megamm.batch import Batch
from megamm.config import ParallelConfig, Recipe
from megamm.data.images import ImageLoader
from megamm.data.templates import Template, Turn
from megamm.data.tokenizer import Tokenizer
from megamm.device import distributed_backend, pick_device
from megamm.engine import checkpoint, groups
from megamm.engine.groups import Groups
from megamm.errors import InputError
from megamm.inference.asking import (
    Asking,
    Picture,
    check_length,
    check_placeholders,
    evaluation_loader,
    load_pictures,
    question_batch,
)
from megamm.inference.decoding import Decoding
from megamm.inference.search import Listener, Vocabulary, search
from megamm.inference.sequences import CachedSequences
from megamm.models.freezing import part_of
from megamm.models.vlm import VisionLanguageModel, build_model
from megamm.recipe_checks.layout import check_layout


def load(
    path: str | Path,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] | None = None,
    image_token_id: int | None = None,
    tensor: int = 1,
    pipeline: int = 1,
) -> Model:
    """Load a checkpoint of any parallel layout into this process, or spread over the processes of a launcher,
    all of which call this.

    Args:
        path: a checkpoint, or a run directory (its newest checkpoint).
        device: "auto", "cpu" or "cuda".
        precision: of weights and activations; None means the one that it was trained in.
        image_token_id: placeholder of an image, for a checkpoint that came without a tokenizer and does not
            say; negative ids count from the end of the vocabulary.
        tensor, pipeline: processes that each layer, and the layers, are divided over, whatever they were
            in training. There are as many copies of the model as the processes allow.
    Returns:
        The model in evaluation mode.
    Raises:
        InputError: no checkpoint there, a damaged one, or one that cannot be divided so.
    """
    where = checkpoint.resolve(path)
    stored = checkpoint.read_recipe(where)
    recipe = replace(
        stored,
        # (its own attention: Transformer Engine's takes no cache)
        parallel=ParallelConfig(tensor=tensor, pipeline=pipeline, backend="local"),
        training=replace(stored.training, freeze=[], precision=precision or stored.training.precision),
    )
    for problem in check_layout(recipe):
        raise InputError(problem)
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
    models = build_model(recipe, layout, "local", image_id)
    missing = checkpoint.load_weights(where, models, layout, part_of)
    if missing:
        raise InputError(
            f"{where}: has no weights for {', '.join(missing)}; use a checkpoint of the whole model"
        )
    model = models[0].eval()
    assert isinstance(model, VisionLanguageModel)
    return Model(model, recipe, tokenizer, layout)


class Model:
    """A vision-language model, in one process or as one process's part of it.

    Attributes:
        recipe: that it was trained with, but for the layout.
        tokenizer: of the checkpoint; None if it was imported without one.
        template: prompt template for `generate`.
    """

    def __init__(
        self, network: VisionLanguageModel, recipe: Recipe, tokenizer: Tokenizer | None, layout: Groups
    ) -> None:
        self.network, self.recipe, self.tokenizer, self.layout = network, recipe, tokenizer, layout
        self.device = layout.device
        self.template = Template.by_name(recipe.template)
        self._image_loader: ImageLoader | None = None

    @property
    def num_copies(self) -> int:
        """Copies of the model, which answer independently of each other."""
        return self.layout.dp_size

    @property
    def copy(self) -> int:
        """Which of them this process is part of."""
        return self.layout.dp_rank

    @property
    def is_spokesman(self) -> bool:
        """Whether this process speaks for its copy, all processes of which have the same answers."""
        return self.layout.is_model_leader

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor, images: torch.Tensor | None = None) -> torch.Tensor:
        """Next-token logits, of a model in one process.

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

    def generate(
        self,
        conversations: Sequence[Sequence[Turn]],
        images: Sequence[Sequence[Picture]],
        max_new_tokens: int | None = None,
        decoding: Decoding | None = None,
        listener: Callable[[int, str], None] | None = None,
    ) -> list[str]:
        """Answers to conversations that end with a question (collective over the processes of a copy).

        Args:
            conversations: turns, with `<image>` where a picture stands.
            images: the pictures of each conversation, in the order of their placeholders.
            max_new_tokens: longest answer, if not that of `decoding`.
            decoding: how answers are chosen; None: greedily.
            listener: is told, with the number of the conversation, of the whole answer so far whenever that
                has grown (not with beams).
        Raises:
            InputError: a picture is missing or unreadable, counts differ, a prompt is too long, or the
                checkpoint has no tokenizer.
        """
        asking = self.asking()
        self._check_counts(["".join(turn.text for turn in turns) for turns in conversations], images)
        prompts = [asking.prompt(turns) for turns in conversations]
        return self._answers(prompts, images, _with_length(decoding, max_new_tokens), listener)

    def complete(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Picture]],
        decoding: Decoding | None = None,
    ) -> list[str]:
        """What the model writes behind texts that stand as they are, without a template: few-shot prompts.

        Args:
            prompts: with `<image>` where a picture stands, and control tokens such as `<|endofchunk|>`.
        Raises:
            InputError: as `generate`.
        """
        self._check_counts(prompts, images)
        ids = [self.asking().raw_prompt(prompt) for prompt in prompts]
        return self._answers(ids, images, decoding or Decoding(), None)

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        images: Sequence[torch.Tensor],
        decoding: Decoding,
        words: Vocabulary,
        listener: Listener | None = None,
    ) -> list[list[int]]:
        """The ids of answers to prompts of ids (collective over the processes of a copy).

        Args:
            prompts: ids, with every position of an image.
            images: [n, 3, H, W] normalised pixels of each prompt.
            words: which tokens end an answer, and which it cannot have.
        Raises:
            InputError: a prompt leaves no room for the answer, or placeholders and images do not agree.
        """
        if not prompts:
            return []
        if not all(map(len, prompts)):
            raise InputError("prompt: is empty; give at least one token")
        limit = self.recipe.model.language.max_positions
        check_length(max(map(len, prompts)), decoding.max_new_tokens, limit, "--max-new-tokens")
        pad_id = self.tokenizer.pad_id if self.tokenizer else next(i for i in (0, 1) if i != self._image_id)
        sequences = CachedSequences(
            self.network, self.layout, prompts, images, decoding.max_new_tokens, pad_id
        )
        return search(sequences, prompts, decoding, words, listener)

    @property
    def _image_id(self) -> int:
        return self.network.image_token_id

    def _answers(
        self,
        prompts: Sequence[Sequence[int]],
        images: Sequence[Sequence[Picture]],
        decoding: Decoding,
        listener: Callable[[int, str], None] | None,
    ) -> list[str]:
        asking = self.asking()
        loader = self._image_loader = self._image_loader or evaluation_loader(self.recipe)
        pixels = [load_pictures(pictures, loader) for pictures in images]
        said: dict[int, list[int]] = {}

        def tell(prompt: int, token: int) -> None:
            assert listener is not None
            answer = said.setdefault(prompt, [])
            answer.append(token)
            listener(prompt, asking.text(answer, decoding))

        ids = self.generate_ids(prompts, pixels, decoding, asking.words, tell if listener else None)
        return [asking.text(answer, decoding) for answer in ids]

    def asking(self) -> Asking:
        """How prompts are made for this model.

        Raises:
            InputError: the checkpoint has no tokenizer.
        """
        if self.tokenizer is None:
            raise InputError(
                "the checkpoint was imported without a tokenizer; import it again with --tokenizer"
            )
        return Asking.of(self.recipe, self.tokenizer, self.template)

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

    def _check_counts(self, texts: Sequence[str], images: Sequence[Sequence[Picture]]) -> None:
        if len(images) != len(texts):
            raise InputError(
                f"{len(texts)} conversations, but images for {len(images)}; give a list for each"
            )
        for row, (text, pictures) in enumerate(zip(texts, images, strict=True)):
            check_placeholders(text, len(pictures), f"conversation {row}")


def _with_length(decoding: Decoding | None, max_new_tokens: int | None) -> Decoding:
    decoding = decoding or Decoding()
    return decoding if max_new_tokens is None else replace(decoding, max_new_tokens=max_new_tokens)
