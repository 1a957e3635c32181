"""Each remedy against a trap of megatron-core: with it the numbers are right (test_layouts), without it
they are wrong. A trap that disappears with another version of megatron-core fails here."""

from __future__ import annotations

from typing import Any

import pytest

from megamm.engine.transformer_config import decoder_config
from tests.dist.harness import run_distributed
from tests.dist.test_layouts import TOLERANCE, reference, run, worst_difference
from tests.dist.tiny import tiny_recipe


def test_two_interleaved_stages_need_overlapped_p2p() -> None:
    overrides = {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}
    results = run(2, "merged", overrides, sabotage="without_overlapped_p2p")
    difference, _ = worst_difference(results, reference("merged"))
    assert difference > 100 * TOLERANCE, "batched p2p is right now: the remedy can go"


def test_sent_tensors_are_freed_only_without_overlap() -> None:
    """Freeing the output while an asynchronous send still reads it gives NaN now and then; only the
    setting can be tested."""
    interleaved = tiny_recipe("merged", {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2})
    assert not decoder_config(interleaved).deallocate_pipeline_outputs
    assert decoder_config(tiny_recipe("merged", {"parallel.pipeline": 2})).deallocate_pipeline_outputs


def test_replicated_parameters_on_sequence_shards_need_their_mark() -> None:
    overrides = {"parallel.tensor": 2, "parallel.sequence": True}
    with pytest.raises(AssertionError, match="replicas of .* differ"):
        worst_difference(
            run(2, "cross_attention", overrides, sabotage="without_sequence_parallel_marks"),
            reference("cross_attention"),
        )


def test_gradient_norm_needs_the_marks_of_sharded_weights() -> None:
    results = run(2, "merged", {"parallel.tensor": 2}, sabotage="without_tensor_parallel_marks")
    assert results[0]["grad_norm"] < 0.99 * reference("merged")["grad_norm"]


def test_dealt_images_need_their_gradients_shared() -> None:
    with pytest.raises(AssertionError, match="replicas of vision.* differ"):
        worst_difference(
            run(2, "merged", {"parallel.tensor": 2}, sabotage="without_shared_encoder_gradients"),
            reference("merged"),
        )


def sharding_of_lists() -> dict[str, Any]:
    """Whole shape of a parallel linear below a ShardedModuleList and below a plain ModuleList."""
    import torch

    from megamm.layers.module import MegatronModule, ShardedModuleList
    from tests.dist.workers import Run

    run_ = Run(tiny_recipe("cross_attention", {"parallel.tensor": 2}))
    resampler = run_.models[0].connector
    name, key = "layers.0.attention.to_q.weight", "layers.0.attention.to_q.weight"
    right = resampler.sharded_state_dict()[name].global_shape
    assert isinstance(resampler.layers, ShardedModuleList)
    resampler.layers = torch.nn.ModuleList(resampler.layers)
    assert isinstance(resampler, MegatronModule)
    return {"sharded": tuple(right), "plain": tuple(resampler.sharded_state_dict()[key].global_shape)}


def test_parallel_linears_in_a_list_are_saved_whole() -> None:
    result = run_distributed(2, "tests.dist.test_traps:sharding_of_lists")[0]
    assert result["sharded"] == (32, 48)
    assert result["plain"] == (16, 48), "megatron records plain ModuleLists correctly now: ShardedModuleList can go"


def adam_steps(ours: bool) -> dict[str, Any]:
    """The step count that Adam has after two steps, a round trip through a state dict, and one more."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from tests.dist.workers import Run

    run_ = Run(tiny_recipe("merged", {} if ours else {"parallel.distributed_optimizer": True}))
    run_.step(0)
    run_.step(1)
    optimizer = run_.optimizer
    state = optimizer.state_dict()
    steps = [group.get("step") for group in state["optimizer"]["param_groups"]]
    assert list(nested_values(state))
    return {"steps": steps}


def test_step_count_lies_in_the_parameter_groups() -> None:
    """torch's Adam keeps one step per parameter, which megatron's loading then shares between them."""
    steps = run_distributed(1, "tests.dist.test_traps:adam_steps", {"ours": True})[0]["steps"]
    assert steps and all(step == 2 for step in steps)
