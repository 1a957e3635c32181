"""Fixtures of these tests."""

from __future__ import annotations

import pytest

from megamm.data.tokenizer import Tokenizer
from tests.convert.helpers import train_tiny_tokenizer
from tests.one_process import layout

__all__ = ["layout"]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
