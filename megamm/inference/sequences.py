"""Logits of growing sequences, through the stages of a pipeline, with or without a cache.

Shapes: R rows, V tokens of the vocabulary, S positions of the longest prompt, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from megamm.engine.groups import Groups
from megamm.inference.asking import padded, question_batch
from megamm.layers.cache import DecodingCache
from megamm.models.vlm import CrossAttentionModel, VisionLanguageModel

# [R, V] logits behind R sequences of ids, given with the number of the prompt that each goes on from
NextLogits = Callable[[list[list[int]], list[int]], torch.Tensor]


class RecomputedSequences:
    """Computes the whole sequence again for every token: for layouts that the cache does not cover."""

    def __init__(self, prompts: Sequence[Sequence[int]], next_logits: NextLogits) -> None:
        self._sequences = [list(prompt) for prompt in prompts]
        self._prompts = list(range(len(prompts)))
        self._next_logits = next_logits

    def start(self) -> torch.Tensor:
        """As search.Scorer."""
        return self._next_logits(self._sequences, self._prompts)

    def step(self, tokens: Sequence[int], rows: Sequence[int]) -> torch.Tensor:
        """As search.Scorer."""
        self._sequences = [[*self._sequences[row], token] for row, token in zip(rows, tokens, strict=True)]
        self._prompts = [self._prompts[row] for row in rows]
        return self._next_logits(self._sequences, self._prompts)


class CachedSequences:
    """Computes one position for every token; all ranks of a copy of the model take part.

    With pipeline stages the prompts are dealt into as many parts, so that the stages work side by side.

    Args:
        network: this rank's part of the model, in evaluation mode; neither sequence nor context parallel.
        prompts: ids, with every position of an image.
        images: [n, 3, H, W] pixels of each prompt.
        room: positions that are kept for answers.
        pad_id: fills up shorter prompts.
    """

    def __init__(
        self,
        network: VisionLanguageModel,
        groups: Groups,
        prompts: Sequence[Sequence[int]],
        images: Sequence[torch.Tensor],
        room: int,
        pad_id: int,
    ) -> None:
        num_parts = min(groups.pp_size, len(prompts))
        bounds = [len(prompts) * part // num_parts for part in range(num_parts + 1)]
        self._groups = groups
        self._vocab_size = network.model_config.language.vocab_size
        self._parts = [
            _Part(network, groups, prompts[start:end], images[start:end], room, pad_id)
            for start, end in pairwise(bounds)
        ]

    def start(self) -> torch.Tensor:
        """As search.Scorer."""
        return self._shared([part.start() for part in self._parts])

    def step(self, tokens: Sequence[int], rows: Sequence[int]) -> torch.Tensor:
        """As search.Scorer."""
        first, offset, found = 0, 0, []
        for part in self._parts:
            size, last = part.num_rows, first
            while last < len(rows) and rows[last] < offset + size:
                last += 1
            own = slice(first, last)
            if first < last:
                found.append(part.step(tokens[own], [row - offset for row in rows[own]]))
            else:
                part.num_rows = 0
            first, offset = last, offset + size
        assert first == len(rows), "rows of a prompt stay side by side, in the order of the prompts"
        return self._shared(found)

    def _shared(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """[R, V] on every rank of the copy, from each part's [R', V / tp] on the last stage."""
        groups, tp = self._groups, self._groups.collection.tp
        mine = torch.cat(list(parts)).float()
        logits = mine.new_empty(len(mine), mine.shape[1] * groups.tp_size)
        if groups.is_last_stage:
            if groups.tp_size > 1:
                gathered = [torch.empty_like(mine) for _ in range(groups.tp_size)]
                dist.all_gather(gathered, mine, group=tp)
                logits = torch.cat(gathered, dim=-1)
            else:
                logits = mine
        if groups.pp_size > 1:
            last = dist.get_global_rank(groups.collection.pp, groups.pp_size - 1)
            dist.broadcast(logits, last, group=groups.collection.pp)
        return logits[:, : self._vocab_size]  # what pads it for the ranks must not count in a softmax


class _Part:
    """Some of the prompts, on this rank's stage."""

    def __init__(
        self,
        network: VisionLanguageModel,
        groups: Groups,
        prompts: Sequence[Sequence[int]],
        images: Sequence[torch.Tensor],
        room: int,
        pad_id: int,
    ) -> None:
        self._network, self._groups = network, groups
        self._owners = list(range(len(prompts)))
        self._start = min(map(len, prompts))  # from here on rows of one prompt may differ
        model = network.model_config
        ids = padded(prompts, pad_id)
        batch = question_batch(ids, torch.cat(list(images)), network.image_token_id, model.tokens_per_image)
        if not groups.is_first_stage:
            batch.images = batch.images[:0]
        self._batch = batch.to(groups.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=groups.device)
        window = network.config.window_size[0] if network.config.window_size else None
        capacity = ids.shape[1] + room
        self._cache = DecodingCache(lengths, capacity, self._batch.images_per_sample, window)
        self.num_rows = len(prompts)

    def start(self) -> torch.Tensor:
        """[R, V / tp] logits behind the prompts (on earlier stages: room for them, unset)."""
        network, positions = self._network, self._batch.input_ids.shape[1]

        def run() -> torch.Tensor:
            return network(self._batch, return_logits=True)

        if not isinstance(network, CrossAttentionModel) or self._groups.pp_size == 1:
            return self._pass(positions, run)
        in_training = network.fixed_num_images
        network.fixed_num_images = max(1, int(self._batch.images_per_sample.max()))
        try:
            return self._pass(positions + network.pipeline_rows(), run)
        finally:
            network.fixed_num_images = in_training

    def step(self, tokens: Sequence[int], rows: Sequence[int]) -> torch.Tensor:
        """As search.Scorer, within the part."""
        device = self._groups.device
        if list(rows) != list(range(self.num_rows)):
            owners = [self._owners[row] for row in rows]
            start = self._start if owners == self._owners else 0
            self._cache.select(torch.tensor(rows, device=device), start)
            self._owners, self.num_rows = owners, len(rows)
        ids = torch.tensor(tokens, device=device)
        return self._pass(1, lambda: self._network.decode_next(ids))

    def _pass(self, positions: int, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        groups, network = self._groups, self._network
        pp: Any = groups.collection.pp
        config = network.config
        with network.language.caching(self._cache):
            if not groups.is_first_stage:
                shape = (positions, self.num_rows, config.hidden_size)
                received = torch.empty(shape, dtype=config.params_dtype, device=groups.device)
                dist.recv(received, dist.get_global_rank(pp, groups.pp_rank - 1), group=pp)
                network.set_input_tensor(received)
            out = run()
        if groups.is_last_stage:
            return out[:, 0]
        dist.send(out.contiguous(), dist.get_global_rank(pp, groups.pp_rank + 1), group=pp)
        width = network.language.vocab_size // groups.tp_size
        return out.new_empty(self.num_rows, width)
