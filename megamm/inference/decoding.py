"""How the next token is chosen: what is asked for, and the scores that follow from the logits.

Shapes: R rows, V tokens of the vocabulary.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megamm.errors import InputError


@dataclass(frozen=True)
class Decoding:
    """How answers are chosen. The meaning of every option is that of transformers' `generate`.

    Attributes:
        max_new_tokens: longest answer, the token that ends it included.
        beams: width of the beam search; 1: none.
        sample: draw the next token instead of taking the likeliest. With beams, the candidates of each step
            are drawn, without replacement (transformers' beam sampling).
        temperature: divides the scores before drawing. Without `sample` it changes nothing: neither the
            likeliest token nor, so it is in transformers and therefore here, the beams.
        top_p: draw from the likeliest tokens that together have at least this probability
            (Holtzman et al. 2020, arXiv:1904.09751, section 3.1).
        length_penalty: beams compare log-probabilities divided by length to this power (above 0 favours long
            answers).
        repetition_penalty: divides the positive and multiplies the negative scores of tokens that prompt or
            answer have already (Keskar et al. 2019, arXiv:1909.05858, section 4.1).
        stop: texts that end an answer, and are cut off.
        seed: of what is drawn. It decides together with the prompt, so an answer does not depend on what else
            is in the batch.
    """

    max_new_tokens: int = 64
    beams: int = 1
    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise InputError if a value is out of its range."""
        for name in ("max_new_tokens", "beams"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)}; use 1 or more")
        for name in ("temperature", "repetition_penalty"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}: {getattr(self, name)}; use a number above 0")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: {self.top_p}; use a number above 0, at most 1")
        if "" in self.stop:
            raise InputError("stop: an empty text would end every answer; leave it out")

    @classmethod
    def chosen(cls, defaults: Mapping[str, Any], given: Mapping[str, Any], seed: int) -> Decoding:
        """What a user asks for. Tokens are drawn if `sample` is given, or if temperature or top_p are and
        there are no beams; a temperature of 0 is the likeliest token each time.

        Args:
            defaults: values by name, for what is not given; their `stop` counts besides the user's.
            given: likewise; None is not given.
        Raises:
            InputError: a value is out of its range.
        """
        said = {name: value for name, value in given.items() if value is not None}
        values = {**defaults, **said, "stop": (*defaults.get("stop", ()), *said.get("stop", ()))}
        is_cold = values.get("temperature") == 0
        if is_cold:
            del values["temperature"]
        asked = "temperature" in said or "top_p" in said
        draws = bool(said.get("sample")) or (asked and values.get("beams", 1) == 1)
        return cls(**{**values, "sample": draws and not is_cold, "seed": seed})

    def generator(self, prompt: Sequence[int]) -> torch.Generator:
        """What the answer to a prompt is drawn with."""
        return torch.Generator().manual_seed(zlib.crc32(array("q", [self.seed, *prompt]).tobytes()))


def penalized(
    scores: torch.Tensor, sequences: Sequence[Sequence[int]], repetition_penalty: float
) -> torch.Tensor:
    """[R, V] scores with those of the tokens in each row's sequence made less attractive."""
    if repetition_penalty == 1:
        return scores
    scores = scores.clone()
    for row, sequence in enumerate(sequences):
        ids = torch.tensor(sorted(set(sequence)), device=scores.device)
        found = scores[row, ids]
        scores[row, ids] = torch.where(found < 0, found * repetition_penalty, found / repetition_penalty)
    return scores


def warped(scores: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """[R, V] scores to draw from, by softmax: sharpened, unlikely tokens left out."""
    scores = scores / temperature
    if top_p < 1:
        ordered, order = scores.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        is_out = probabilities.cumsum(dim=-1) - probabilities >= top_p  # what stands before is enough
        is_out[:, 0] = False
        scores = scores.masked_fill(is_out.scatter(-1, order, is_out), -torch.inf)
    return scores


def draw(scores: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Indices of `count` different ones among the scores, [count], drawn by softmax."""
    probabilities = scores.float().softmax(dim=-1).cpu()  # a generator of the CPU: the same on every device
    available = int((probabilities > 0).sum())
    return torch.multinomial(probabilities, min(count, available), generator=generator).to(scores.device)
