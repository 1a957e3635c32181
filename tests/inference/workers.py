"""What the processes of the generation tests run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megamm.inference import Decoding, load
from megamm.inference.asking import padded
from megamm.inference.search import Vocabulary, search
from megamm.inference.sequences import RecomputedSequences


def answer(
    path: str, questions: str, decodings: list[dict[str, Any]], image_id: int, tensor: int, pipeline: int
) -> list[list[list[int]]]:
    """For each way of decoding the ids of the answers to the questions of a file (`save_questions`), all
    asked at once."""
    model = load(path, "cpu", image_token_id=image_id, tensor=tensor, pipeline=pipeline)
    prompts, images, words = _questions(questions)
    return [model.generate_ids(prompts, images, Decoding(**options), words) for options in decodings]


def recompute(path: str, questions: str, decodings: list[dict[str, Any]]) -> list[list[list[int]]]:
    """As `answer`, in one process and without a cache: from the logits of whole sequences."""
    model = load(path, "cpu")
    prompts, images, words = _questions(questions)

    def next_logits(sequences: list[list[int]], owners: list[int]) -> torch.Tensor:
        logits = model.logits(padded(sequences, 0), torch.cat([images[owner] for owner in owners]))
        return logits[torch.arange(len(sequences)), [len(sequence) - 1 for sequence in sequences]]

    return [
        search(RecomputedSequences(prompts, next_logits), prompts, Decoding(**options), words)
        for options in decodings
    ]


def save_questions(
    path: Path, prompts: list[list[int]], images: list[torch.Tensor], words: dict[str, Any]
) -> str:
    """Prompts with the pixels of their pictures, and the arguments of the vocabulary."""
    torch.save({"prompts": prompts, "images": images, "words": words}, path)
    return str(path)


def _questions(path: str) -> tuple[list[list[int]], list[torch.Tensor], Vocabulary]:
    saved = torch.load(path, weights_only=True)
    return saved["prompts"], saved["images"], Vocabulary(**saved["words"])
