"""F9: every layout of up to four ranks loads the checkpoints of every other, also those that the ordinary
tests leave out: whole tensors bitwise equal, weights and optimizer, and the next loss within 1e-6."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.dist import test_checkpoint_layouts as layouts
from tests.dist.harness import run_distributed

MORE: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2sp": (2, {"parallel.tensor": 2, "parallel.sequence": True}),
    "cp2": (2, {"parallel.context": 2}),
    "tp4": (4, {"parallel.tensor": 4}),
    "pp4": (4, {"parallel.pipeline": 4}),
    "dp4": (4, {}),
    "tp2sp_pp2": (4, {"parallel.tensor": 2, "parallel.sequence": True, "parallel.pipeline": 2}),
    "tp2cp2": (4, {"parallel.tensor": 2, "parallel.context": 2}),
}
ALL = {**layouts.LAYOUTS, **MORE}
HEADS = {"model.language.num_kv_heads": 4}  # as many as four ranks can share
CASES = {
    "merged": ("merged", HEADS),
    "frozen": ("cross_attention", {**HEADS, "training.freeze": "[language]"}),
}


def save_all(world_size: int, directory: str) -> Any:
    """See test_checkpoint_layouts."""
    _widen()
    return layouts.save_all(world_size, directory)


def load_all(world_size: int, directory: str) -> Any:
    """See test_checkpoint_layouts."""
    _widen()
    return layouts.load_all(world_size, directory)


def _widen() -> None:
    layouts.LAYOUTS, layouts.CASES, layouts.ONLY_PAIR = ALL, CASES, {}


@pytest.mark.faults
@pytest.mark.timeout(2400)
def test_all_pairs_of_layouts(tmp_path: Path) -> None:
    pairs: dict[str, Any] = {}
    for work in ("save_all", "load_all"):
        for size in layouts.WORLDS:
            args = {"world_size": size, "directory": str(tmp_path)}
            found = run_distributed(size, f"tests.faults.test_layouts:{work}", args, timeout=1200)
            if work == "save_all":
                assert found == [[]] * size
            else:
                pairs |= found[0]
    assert len(pairs) == len(ALL) ** 2 * len(CASES)
    for pair, (names, loss, expected) in pairs.items():
        assert names == [], pair
        assert loss == pytest.approx(expected, rel=1e-6), pair
