"""Answers of a model that lies over the ranks of a layout, as in training: all ranks of a copy take part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megamm.config import Recipe
from megamm.data.tokenizer import Tokenizer
from megamm.engine.groups import Groups
from megamm.engine.pipeline import labelled_logits
from megamm.inference.asking import Asking, padded, question_batch
from megamm.inference.decoding import Decoding
from megamm.inference.search import Scorer, search
from megamm.inference.sequences import CachedSequences, RecomputedSequences


class LayoutModel:
    """The chunks of one rank, asked together with those of the other ranks of the same copy of the model.

    Its modules are used as they are: whoever asks puts them into evaluation mode.

    Args:
        models: chunks, wrapped for data parallelism.
        recipe: whose layout they have.
    """

    def __init__(self, models: list[Any], groups: Groups, recipe: Recipe, tokenizer: Tokenizer) -> None:
        self._models, self._groups, self._recipe = models, groups, recipe
        self.asking = Asking.of(recipe, tokenizer)
        # what sequence and context parallelism divide sequences by
        shards = groups.tp_size if recipe.parallel.sequence else 1
        contexts = groups.collection.cp.size()
        self._multiple = shards * (2 * contexts if contexts > 1 else 1)

    def generate(
        self, prompts: Sequence[Sequence[int]], images: Sequence[torch.Tensor], max_new_tokens: int
    ) -> list[str]:
        """Greedy answers, the same on all ranks of the copy (collective over them).

        Args:
            prompts: ids, with every position of an image.
            images: [n, 3, H, W] pixels of each prompt.
        """
        if not prompts:
            return []
        decoding = Decoding(max_new_tokens)
        if self._is_cached:
            network = self._models[0].module
            pad_id = self.asking.tokenizer.pad_id
            scorer: Scorer = CachedSequences(network, self._groups, prompts, images, max_new_tokens, pad_id)
        else:
            scorer = RecomputedSequences(
                prompts, lambda rows, owners: self._next_logits(rows, [images[owner] for owner in owners])
            )
        answers = search(scorer, prompts, decoding, self.asking.words)
        return [self.asking.text(answer, decoding) for answer in answers]

    @property
    def _is_cached(self) -> bool:
        """Whether the layers can remember: a cache holds whole sequences, and Transformer Engine's attention
        takes none."""
        parallel = self._recipe.parallel
        is_whole = not parallel.sequence and parallel.context == 1
        return is_whole and len(self._models) == 1 and self._models[0].module.backend_name == "local"

    def _next_logits(
        self, sequences: Sequence[Sequence[int]], images: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """[B, V] logits behind each sequence. Each is a micro-batch: a pipeline works on several at once."""
        tokenizer, model = self.asking.tokenizer, self._recipe.model
        ids = padded(sequences, tokenizer.pad_id, self._multiple)
        batches = []
        for row, (sequence, pixels) in enumerate(zip(sequences, images, strict=True)):
            batch = question_batch(
                ids[row : row + 1], pixels, tokenizer.image_id, self.asking.tokens_per_image
            )
            batch.labels[0, len(sequence) - 1] = 0  # any label: it marks the position
            if not self._groups.is_first_stage:
                batch.images = pixels[:0]
            batches.append(batch.to(self._groups.device))
        if len(self._models) > 1:  # the interleaved schedule takes whole rounds
            batches += [batches[-1]] * (-len(batches) % self._groups.pp_size)
        logits = labelled_logits(self._models, batches, self._groups)
        return logits[: len(sequences), : model.language.vocab_size]
