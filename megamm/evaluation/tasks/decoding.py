"""How an answer is chosen from what the model computes; what `megamm.inference.Decoding` takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from megamm.errors import InputError


@dataclass(frozen=True)
class Decoding:
    """Greedy search, unless something else is asked for.

    Attributes:
        max_new_tokens: longest answer.
        beams: of beam search.
        sample: draw tokens at random instead of taking the likeliest.
        temperature: of sampling.
        top_p: sample from the likeliest tokens that have this share of the probability.
        length_penalty: exponent of the length by which scores of beams are divided.
        repetition_penalty: by which logits of tokens that stand there already are divided.
        stop: texts that end an answer, besides those of the template.
        seed: of sampling.
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

    def changed(self, values: Mapping[str, Any], where: str) -> Decoding:
        """With other values; those that are None stay.

        Raises:
            InputError: there is no such setting; `where` names what holds it.
        """
        known = {field.name for field in fields(self)}
        for name in values:
            if name not in known:
                raise InputError(f"{where}: {name} is no setting of decoding; use {', '.join(sorted(known))}")
        given = {name: value for name, value in values.items() if value is not None}
        if "stop" in given:
            given["stop"] = tuple(given["stop"])
        return replace(self, **given)
