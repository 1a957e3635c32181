"""Damaged source files of every format: entries, or an error for the user, and nothing else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megamm.data.conversation import Conversation, Skipped
from megamm.data.formats import make_format
from megamm.errors import InputError
from tests.data.formats.examples import EXAMPLES
from tests.data.mutations import mutated_bytes, mutated_json

MANY = pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])


@pytest.mark.parametrize("rounds", [500, MANY])
def test_damaged_sources(rounds: int, tmp_path: Path) -> None:
    draw, outcomes = random.Random(rounds), {"refused": 0, "read": 0}
    examples = []
    for name, write in EXAMPLES.items():
        (tmp_path / name).mkdir()
        examples.append(write(tmp_path / name))
    for number in range(rounds):
        example = examples[number % len(examples)]
        source = draw.choice(example.sources)
        whole = source.read_bytes()
        is_json = source.suffix == ".json" and draw.random() < 0.5
        source.write_bytes((mutated_json if is_json else mutated_bytes)(whole, draw))
        form, read = make_format(example.format, example.options), 0
        try:
            for chunk in form.chunks(example.sources):
                for entry in form.read(chunk):
                    assert isinstance(entry, Conversation | Skipped)
                    read += 1
            outcomes["read"] += 1
        except InputError as error:
            assert "\n" not in str(error), example.format
            outcomes["refused"] += 1
        finally:
            source.write_bytes(whole)
        assert read < 1000
    assert min(outcomes.values()) > rounds / 20
