"""Damaged tokenizer files give a tokenizer that works, or an InputError; nothing else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megamm.data.tokenizer import Tokenizer
from megamm.errors import InputError
from tests.data import huggingface
from tests.data.mutations import mutated_bytes, mutated_json

TEXTS = ("the dog runs 12\n日本😀", "", " a ", "<image>\x00 don't</s>")


def use(model: bytes, companions: dict[str, bytes] | None = None) -> bool:
    """Whether a tokenizer came of it, which then has to work. A tokenizer.json that is readable but wrong may
    be found when it is used."""
    try:
        tokenizer = Tokenizer(model, companions=companions)
        assert 0 <= tokenizer.image_id < tokenizer.vocab_size
        for text in TEXTS:
            ids = tokenizer.encode(text, bos=True) + tokenizer.encode_parts([text], prefix=False)
            assert all(0 <= i < tokenizer.vocab_size for i in ids)
            tokenizer.decode(ids)
        tokenizer.decode(range(tokenizer.vocab_size), skip_special=False)
        return True
    except InputError as error:
        assert str(error).count("\n") == 0
        return False


def try_models(model: bytes, count: int) -> None:
    worked = sum(use(mutated_bytes(model, random.Random(seed))) for seed in range(count))
    assert 0 < worked < count


def try_json(directory: Path, count: int) -> None:
    names = ("tokenizer.json", "tokenizer_config.json")
    model, config = ((directory / name).read_bytes() for name in names)
    worked = 0
    for seed in range(count):
        draw = random.Random(seed)
        how = draw.randrange(3)
        changed = mutated_bytes(model, draw) if how == 0 else mutated_json(model, draw)
        companion = mutated_json(config, draw) if how == 2 else config
        worked += use(changed, {"tokenizer_config.json": companion})
    assert 0 < worked < count


def test_damaged_models(tokenizer_dir: Path) -> None:
    try_models((tokenizer_dir / "tokenizer.model").read_bytes(), 500)


@pytest.mark.parametrize("kind", ["prepend", "qwen"])
def test_damaged_json(kind: str, tmp_path: Path) -> None:
    try_json(huggingface.write(kind, tmp_path), 500)


@pytest.mark.slow
def test_many_damaged_models(tokenizer_dir: Path) -> None:
    try_models((tokenizer_dir / "tokenizer.model").read_bytes(), 10_000)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prepend", "qwen"])
def test_much_damaged_json(kind: str, tmp_path: Path) -> None:
    """Among them decoders with which the library panics."""
    try_json(huggingface.write(kind, tmp_path), 10_000)
