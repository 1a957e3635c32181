"""Decoding with a cache, token by token, against whole sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megamm.engine.groups import Groups
from megamm.inference.asking import padded, question_batch
from megamm.layers.cache import DecodingCache
from tests.dist.tiny import IMAGE_ID, VOCAB, tiny_recipe
from tests.one_process import build

LENGTHS = (9, 14, 6)
STEPS = 6
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "merged": ("merged", {}),
    "qformer": ("qformer", {}),
    "window": ("merged", {"model.language.sliding_window": 4}),
    "tied, many groups": (
        "merged",
        {"model.language.tie_embeddings": True, "model.language.num_kv_heads": 4},
    ),
    "flamingo": ("cross_attention", {}),
    "idefics": ("idefics", {}),
    "lora": (
        "merged",
        {"model.lora.rank": 4, "model.lora.targets": "[q, v]", "training.freeze": "[language]"},
    ),
}


class Growing:
    """A model and sequences with 1, 0 and 2 images; what follows the prompts is drawn."""

    def __init__(self, kind: str, layout: Groups, lengths: tuple[int, ...] = LENGTHS) -> None:
        name, overrides = KINDS[kind]
        recipe = tiny_recipe(name, overrides)
        self.network = build(recipe, layout).eval()
        generator = torch.Generator().manual_seed(1)
        self.span, size = recipe.model.tokens_per_image, recipe.model.vision.image_size
        self.sequences = []
        for length, count in zip(lengths, (1, 0, 2), strict=True):
            words = torch.randint(5, VOCAB, (length + STEPS,), generator=generator).tolist()
            self.sequences.append([*words[:1], *([IMAGE_ID] * self.span * count), *words[1:]])
        self.images = torch.randn(3, 3, size, size, generator=generator)
        window = self.network.config.window_size
        self.window = window[0] if window else None

    def whole(self, sequence: list[int], row: int) -> torch.Tensor:
        """[V] logits behind a sequence of one row."""
        own = {0: self.images[:1], 1: self.images[:0], 2: self.images[1:]}[row]
        batch = question_batch(torch.tensor([sequence]), own, IMAGE_ID, self.span)
        return self.network(batch, return_logits=True)[0, -1]

    def begin(self, prompts: list[list[int]]) -> tuple[DecodingCache, torch.Tensor]:
        """A cache filled with the prompts, and the logits behind them."""
        batch = question_batch(padded(prompts, 0), self.images, IMAGE_ID, self.span)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        capacity = int(lengths.max()) + STEPS
        cache = DecodingCache(lengths, capacity, batch.images_per_sample, self.window)
        with self.network.language.caching(cache):
            return cache, self.network(batch, return_logits=True)[:, 0]

    def further(self, cache: DecodingCache, tokens: list[int]) -> torch.Tensor:
        with self.network.language.caching(cache):
            return self.network.decode_next(torch.tensor(tokens))[:, 0]


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [LENGTHS, (8, 8, 8)], ids=["ragged", "even"])
@torch.no_grad()
def test_token_by_token_is_as_good_as_all_at_once(
    kind: str, lengths: tuple[int, ...], layout: Groups
) -> None:
    growing = Growing(kind, layout, lengths)
    sequences = growing.sequences
    cache, logits = growing.begin([sequence[:-STEPS] for sequence in sequences])
    for step in range(STEPS):
        ends = [len(sequence) - STEPS + step for sequence in sequences]
        wanted = [
            growing.whole(s[:end], row) for row, (s, end) in enumerate(zip(sequences, ends, strict=True))
        ]
        assert_close(logits, torch.stack(wanted))
        logits = growing.further(cache, [s[end] for s, end in zip(sequences, ends, strict=True)])


@pytest.mark.parametrize("kind", ["merged", "window", "idefics"])
@torch.no_grad()
def test_rows_are_chosen_repeated_and_left_out(kind: str, layout: Groups) -> None:
    growing = Growing(kind, layout)
    prompts = [sequence[:-STEPS] for sequence in growing.sequences]
    cache, _ = growing.begin(prompts)
    cache.select(torch.tensor([0, 0, 2, 2]))  # two beams for each of two prompts
    growing.further(cache, [11, 12, 13, 14])
    first = min(len(prompts[0]), len(prompts[2]))
    cache.select(torch.tensor([1, 0, 2, 2]), start=first)
    found = growing.further(cache, [21, 22, 23, 24])
    wanted = [(0, 12, 21), (0, 11, 22), (2, 13, 23), (2, 13, 24)]
    assert_close(found, torch.stack([growing.whole([*prompts[row], *more], row) for row, *more in wanted]))
    cache.select(torch.tensor([3, 1]))
    found = growing.further(cache, [31, 32])
    wanted = [(2, 13, 24, 31), (0, 11, 22, 32)]  # type: ignore[list-item]
    assert_close(found, torch.stack([growing.whole([*prompts[row], *more], row) for row, *more in wanted]))


@torch.no_grad()
def test_nothing_is_left_behind(layout: Groups) -> None:
    """Training goes on as if nobody had asked, also after an error."""
    growing = Growing("idefics", layout)
    sequences = growing.sequences
    before = growing.whole(sequences[2], 2)
    cache, _ = growing.begin(sequences)
    with pytest.raises(RuntimeError), growing.network.language.caching(cache):
        raise RuntimeError
    assert torch.equal(growing.whole(sequences[2], 2), before)
