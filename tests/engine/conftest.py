"""Fixtures of these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megamm.config import ParallelConfig
from megamm.engine import groups
from megamm.engine.groups import Groups
from tests.one_process import CPU


@pytest.fixture
def layout() -> Iterator[Groups]:
    """Process groups of one, made for each test: writing a checkpoint of weights leaves them."""
    yield groups.initialize(ParallelConfig(), CPU, "gloo")
    groups.shutdown()
