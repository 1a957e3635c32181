"""`megamm`, with a note of the samples that every step is trained on."""

from __future__ import annotations

import json
import os
from pathlib import Path

from megamm.batch import Batch
from megamm.training.feed import BatchFeed
from tests.training import runs

FOLDER = "MEGAMM_TEST_SAMPLES"  # environment variable: where the notes are kept
# samples used before a step -> those of the step, sorted, and the data-parallel ranks that took them
Notes = dict[int, tuple[list[int], list[int]]]


def megamm(*arguments: str) -> int:
    """A target of tests.forks."""
    next_step = BatchFeed.next_step

    def noted(feed: BatchFeed) -> list[Batch]:
        batches = next_step(feed)
        if feed.groups.is_model_leader:
            ids = [int(i) for batch in batches for i in batch.sample_ids]
            line = {"start": batches[0].step_start, "dp_rank": feed.groups.dp_rank, "ids": ids}
            with open(Path(os.environ[FOLDER]) / f"{os.getpid()}.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        return batches

    BatchFeed.next_step = noted  # type: ignore[method-assign]
    return runs.megamm(*arguments)


def read(files: set[Path]) -> Notes:
    """What the processes of one attempt were given."""
    steps: dict[int, dict[int, list[int]]] = {}
    for file in files:
        for text in file.read_text().split("\n"):
            if text.endswith("}"):  # a kill may have cut the last one
                line = json.loads(text)
                steps.setdefault(line["start"], {})[line["dp_rank"]] = line["ids"]
    return {
        start: (sorted(i for ids in parts.values() for i in ids), sorted(parts))
        for start, parts in steps.items()
    }
