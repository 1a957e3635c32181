"""Fixtures of the conversion tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamm.data.tokenizer import Tokenizer
from tests.convert.helpers import hf_llava, save_hf, train_tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    train_tiny_tokenizer(out)
    return out


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_dir)


@pytest.fixture(scope="session")
def llava_dir(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA directory as transformers 5 saves it. Not to be changed."""
    return save_hf(hf_llava(), tokenizer, tmp_path_factory.mktemp("llava") / "hf")
