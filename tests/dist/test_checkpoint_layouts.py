"""A checkpoint of any layout loads into any other: every weight and all optimizer state, bit by bit.

Starting processes takes longer than running them, so each world size is started once to save and once to
load, and goes through its layouts in the same processes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.dist.harness import run_distributed
from tests.dist.tiny import LORA

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"parallel.tensor": 2}),
    "pp2": (2, {"parallel.pipeline": 2}),
    "dp2": (2, {}),
    "pp2vpp2": (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}),
    "tp2pp2": (4, {"parallel.tensor": 2, "parallel.pipeline": 2}),
    "tp2dp2": (4, {"parallel.tensor": 2}),
    "pp2dp2": (4, {"parallel.pipeline": 2}),
}
WORLDS = (1, 2, 4)
# model and settings; 67 tokens, so that layouts differ in how they pad the vocabulary
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "merged": ("merged", {}),
    "frozen": ("cross_attention", {"training.freeze": "[language]"}),
    "bf16": ("merged", {"training.precision": "bf16"}),
    "lora": ("merged", {**LORA, "model.lora.dropout": 0.0}),  # dropout goes by the seed
}
ONLY_PAIR = {"bf16": ("tp2dp2", "pp2"), "lora": ("tp2pp2", "dp2")}  # cases of one source and one target
LOSS_TOLERANCE = {"bf16": 2e-3}  # relative; 1e-6 otherwise

Whole = dict[str, torch.Tensor]


def cases(layout: str, role: int) -> list[str]:
    """The cases in which a layout is a source (role 0) or a target (role 1)."""
    return [case for case in CASES if case not in ONLY_PAIR or ONLY_PAIR[case][role] == layout]


# --- in the processes -------------------------------------------------------------------------------------


def runs(world_size: int, role: int) -> Iterator[tuple[str, str, Any]]:
    """(layout, case, run) of everything that has this world size."""
    from megatron.core import parallel_state

    from tests.dist.tiny import tiny_recipe
    from tests.dist.workers import Run

    gc.freeze()  # megatron collects garbage at every load; what was imported need not be looked through
    for number, (layout, (size, parallel)) in enumerate(LAYOUTS.items()):
        if size != world_size:
            continue
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        for case in cases(layout, role):
            kind, settings = CASES[case]
            # every source has weights of its own: what a load leaves out is then seen
            seed = {"seed": 10 * role + number}
            yield layout, case, Run(tiny_recipe(kind, {**settings, **parallel, **seed}))


def whole_state(state: dict[str, Any]) -> Whole:
    """A sharded state dict put together: whole tensors, on rank 0. Replicas must agree."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    pieces = []
    for entry in nested_values(state):
        parts = nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
        for part in parts:
            if isinstance(part, ShardedTensor):
                pieces.append((part.key, part.global_shape, part.global_slice(), part.data.detach().clone()))
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, pieces)
    whole: Whole = {}
    for name, shape, index, data in (piece for part in everywhere for piece in part):
        tensor = whole.setdefault(name, torch.full(shape, float("nan"), dtype=data.dtype))
        known = tensor[index]
        assert known.isnan().all() or torch.equal(known, data), f"replicas of {name} differ"
        tensor[index] = data
    for name, tensor in whole.items():
        assert not tensor.isnan().any(), f"{name}: no rank holds all of it"
    return whole


def current_state(run: Any) -> Whole:
    """Weights and optimizer state of a run, as whole tensors."""
    from megamm.engine.sharded_state import state_to_save

    return whole_state(state_to_save(run.models, run.optimizer, run.layout))


def different(one: Whole, other: Whole) -> list[str]:
    """Names of tensors that differ; rows that only pad the vocabulary do not count."""
    names = sorted(one.keys() ^ other.keys())
    for name in one.keys() & other.keys():
        a, b = one[name], other[name]
        rows = 67 if "word_embeddings" in name or "output_layer" in name else len(a)
        if a.dtype != b.dtype or not torch.equal(a[:rows], b[:rows]):
            names.append(name)
    return names


def save_all(world_size: int, directory: str) -> list[str]:
    """Train two steps and save, in every layout; returns where the state differs from megatron's own."""
    from megamm.engine import groups
    from megamm.engine.checkpoint import Progress
    from megamm.engine.sharded_state import CONTENT, model_state

    wrong = []
    for layout, case, run in runs(world_size, 0):
        for step in range(2):
            run.step(step)
        folder = Path(directory) / layout / case
        checkpoints = run.checkpoints(folder)
        checkpoints.save(Progress(2, 16))
        checkpoints.wait()
        state = current_state(run)
        model = model_state(run.models, run.layout)
        metadata = {**CONTENT, "dp_cp_group": run.layout.collection.dp_cp}
        theirs = whole_state(
            {**model, "optimizer": run.optimizer.sharded_state_dict(model, metadata=metadata)}
        )
        wrong += [f"{layout} {case} {name}" for name in different(state, theirs)]
        loss = run.forward_backward(2)
        if dist.get_rank() == 0:
            torch.save({"state": state, "loss": loss}, folder / "expected.pt")
    groups.shutdown()
    return wrong


def load_all(world_size: int, directory: str) -> dict[str, tuple[list[str], float, float]]:
    """Load every checkpoint into every layout: names of tensors that differ, next loss, expected loss."""
    from megamm.engine import groups

    found = {}
    for target, case, run in runs(world_size, 1):
        for source in LAYOUTS:
            if case not in cases(source, 0):
                continue
            folder = Path(directory) / source / case
            assert run.checkpoints(folder).load_newest() is not None
            expected = torch.load(folder / "expected.pt")
            names = different(current_state(run), expected["state"])
            found[f"{source} to {target}, {case}"] = (names, run.forward_backward(2), expected["loss"])
    groups.shutdown()
    return found


# --- the tests ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a checkpoint of each layout and case, and what it must hold."""
    directory = tmp_path_factory.mktemp("layouts")
    for size in WORLDS:
        args = {"world_size": size, "directory": str(directory)}
        results = run_distributed(size, "tests.dist.test_checkpoint_layouts:save_all", args, timeout=240)
        assert results == [[]] * size, "optimizer state is not what megatron would have gathered"
    return directory


@pytest.mark.parametrize("world_size", WORLDS)
def test_every_layout_loads_every_other(world_size: int, saved: Path) -> None:
    args = {"world_size": world_size, "directory": str(saved)}
    results = run_distributed(world_size, "tests.dist.test_checkpoint_layouts:load_all", args, timeout=240)
    targets = sum(size == world_size for size, _ in LAYOUTS.values())
    assert len(results[0]) == targets * len(LAYOUTS) * 2 + 2 * (world_size == 2)  # bf16, lora: one pair each
    for pair, (names, loss, expected) in results[0].items():
        assert names == [], pair
        tolerance = LOSS_TOLERANCE.get(pair.split(", ")[1], 1e-6)
        assert loss == pytest.approx(expected, rel=tolerance), pair
