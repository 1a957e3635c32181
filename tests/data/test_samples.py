"""Several samples at once are those that are read one by one, of one dataset or of several."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megamm.data.indexed import PreparedDataset
from megamm.data.samples import Samples
from megamm.ops.documents import gather_documents
from tests.data.helpers import varied


@pytest.fixture(scope="module")
def datasets(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, image_folder: Path
) -> list[PreparedDataset]:
    root = tmp_path_factory.mktemp("varied")
    return [PreparedDataset(varied(root / str(n), n, image_folder, tokenizer_dir)) for n in (9, 5)]


def check(found: Samples, wanted: list[tuple[PreparedDataset, int]]) -> None:
    assert len(found.stretches.starts) == len(wanted)
    for number, (dataset, row) in enumerate(wanted):
        one, (tokens, learnt, starts, ends) = dataset[row], found.stretches
        piece = slice(int(starts[number]), int(ends[number]))
        assert np.array_equal(tokens.numpy()[piece], one.tokens)
        assert np.array_equal(learnt.numpy()[piece], one.learnt)
        assert found.images(number) == one.images


def test_of_one_dataset(datasets: list[PreparedDataset]) -> None:
    dataset, rows = datasets[0], np.array([8, 0, 3, 3])
    found = dataset.samples(rows)
    check(found, [(dataset, row) for row in rows])
    tokens, lengths = gather_documents(found.stretches.tokens, found.stretches.starts, found.stretches.ends)
    assert np.array_equal(tokens.numpy(), np.concatenate([dataset[row].tokens for row in rows]))
    assert torch.equal(lengths, found.stretches.ends - found.stretches.starts)


def test_of_several_datasets(datasets: list[PreparedDataset]) -> None:
    one, other = datasets
    parts = [one.samples(np.array([2, 7])), other.samples(np.array([4, 0, 1]))]
    found = Samples.joined(parts, np.array([3, 0, 4, 2, 1]))
    check(found, [(other, 0), (one, 2), (other, 1), (other, 4), (one, 7)])
    check(Samples.joined(parts[:1], np.array([1, 0])), [(one, 7), (one, 2)])
