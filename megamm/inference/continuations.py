"""How likely given answers are: what multiple-choice questions are scored by.

Shapes: B conversations, S positions of the longest, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megamm.data.templates import Template, Turn
from megamm.errors import InputError
from megamm.inference.asking import Asking, Picture, evaluation_loader, load_pictures, padded
from megamm.inference.model import Model
from megamm.inference.questions import words


@dataclass(frozen=True)
class Likelihood:
    """Of an answer, given the conversation before it.

    Attributes:
        log_probability: of all its tokens together, in nats; not of what ends an answer.
        is_greedy: whether greedy decoding begins with exactly these tokens.
        num_tokens: of the answer.
    """

    log_probability: float
    is_greedy: bool
    num_tokens: int


@torch.no_grad()
def likelihoods(
    model: Model,
    conversations: Sequence[Sequence[Turn]],
    images: Sequence[Sequence[Picture]],
    answers: Sequence[str],
) -> list[Likelihood]:
    """How likely each answer is behind its conversation, all in one batch.

    Args:
        conversations: turns that end with a question, with `<image>` where a picture stands.
        images: the pictures of each conversation, in the order of their placeholders.
        answers: words, one for each conversation. Spaces in front are those of the template.
    Raises:
        InputError: a picture is unreadable, placeholders and pictures differ, an answer ends behind the
            model's last position, or the checkpoint has no tokenizer.
    """
    asking = model.asking()
    rows = [_ids(asking, turns, answer) for turns, answer in zip(conversations, answers, strict=True)]
    for prompt, ids in rows:
        if len(prompt) + len(ids) > asking.max_positions:
            raise InputError(
                f"a prompt of {len(prompt)} positions and an answer of {len(ids)} exceed the model's "
                f"{asking.max_positions} positions; shorten them"
            )
    loader = evaluation_loader(model.recipe)
    pixels = torch.cat([load_pictures(pictures, loader) for pictures in images])
    sequences = [[*prompt, *ids] for prompt, ids in rows]
    logits = model.logits(padded(sequences, asking.tokenizer.pad_id), pixels)  # [B, S, V]
    found = []
    for row, (prompt, ids) in zip(logits, rows, strict=True):
        scores = row[len(prompt) - 1 : len(prompt) - 1 + len(ids)].float()
        found.append(_likelihood(scores, ids, asking))
    return found


def _ids(asking: Asking, turns: Sequence[Turn], answer: str) -> tuple[list[int], list[int]]:
    """Ids of the prompt, and of the answer behind it."""
    prompt = asking.prompt(turns)
    rendered, _ = _open_ended(asking.template).render(
        [*turns, Turn("assistant", words(answer.lstrip()))], asking.tokenizer
    )
    whole = asking.with_image_positions(rendered)
    assert whole[: len(prompt)] == prompt, "prompt and answer are encoded apart"
    return prompt, whole[len(prompt) :]


def _open_ended(template: Template) -> Template:
    """The template without what stands behind an answer."""
    before, _, _ = template.answer.partition("{answer}")
    return replace(template, answer=f"{before}{{answer}}", after="")


def _likelihood(scores: torch.Tensor, ids: Sequence[int], asking: Asking) -> Likelihood:
    """From the [tokens, V] scores before each token of the answer."""
    tokens = torch.tensor(ids, device=scores.device, dtype=torch.long)
    log_probability = scores.log_softmax(dim=-1).gather(-1, tokens[:, None]).double().sum()
    greedy = asking.words.silence(scores.clone()).argmax(dim=-1)
    return Likelihood(float(log_probability), bool((greedy == tokens).all()), len(ids))
