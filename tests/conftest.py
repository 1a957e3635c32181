"""Shared fixtures: random state, a small trained tokenizer, a folder of pictures, a prepared dataset."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megamm.data.templates import Template, Turn
from megamm.data.tokenizer import Tokenizer, train_tokenizer
from tests import forks
from tests.data.helpers import VOCAB_SIZE, conversations, prepared, write_images

MANY_THREADS = 150
TEXTS = [
    "Look at the picture and name the thing that stands in the middle of it.",
    "It is a small house with a red roof, 12 windows and 3 doors.",
    "Describe what the people do; who holds the dog, and where does it run?",
    "The dog runs over the grass towards the river, 45 metres away.\nNobody holds it.",
]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(1234)
    yield


@pytest.fixture(autouse=True)
def signals_mean_what_they_did() -> Iterator[None]:
    """A run that was asked to stop ignores later signals to its end; what a later test starts would inherit
    that."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    """Groups of runs within this process go with the next collection of garbage; until then gloo's threads
    wake up a hundred times a second each, which is felt when there are hundreds."""
    yield
    if len(os.listdir("/proc/self/task")) > MANY_THREADS:
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def no_process_left() -> Iterator[None]:
    """The interpreters that processes are forked from end with the tests."""
    yield
    forks.close()


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    template = Template.by_name("vicuna")
    turns = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(TEXTS)]  # type: ignore[arg-type]
    texts = [segment.text for segment in template.segments(turns)]
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts * 4, out, VOCAB_SIZE)
    return out


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_dir)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 good pictures; tests only read it."""
    folder = tmp_path_factory.mktemp("pictures")
    write_images(folder, 12)
    return folder


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, image_folder: Path) -> Path:
    """50 samples with no, one and two images; tests only read it."""
    names = sorted(path.name for path in image_folder.iterdir())
    root = tmp_path_factory.mktemp("dataset")
    return prepared(root, conversations(names, 50), tokenizer_dir, [image_folder]).out
