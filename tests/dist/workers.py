"""What the processes of the layout tests run: one step of a tiny model, or a few with a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megamm.config import Recipe
from megamm.engine import checkpoint, groups
from megamm.engine.optimizer import build_optimizer, build_schedule, wrap_data_parallel
from megamm.engine.pipeline import forward_backward
from megamm.engine.weights import initialize, named_shards
from megamm.models.freezing import part_of
from megamm.models.vlm import build_model
from tests.dist.tiny import IMAGE_ID, draw_visible, tiny_batch, tiny_recipe


def without_overlapped_p2p(models: list[Any]) -> None:
    """Undo the remedy for two interleaved stages."""
    for model in models:
        model.config.overlap_p2p_comm, model.config.batch_p2p_comm = False, True


def without_sequence_parallel_marks(models: list[Any]) -> None:
    """Undo the marks on replicated parameters that act on sequence shards."""
    for model in models:
        for parameter in model.parameters():
            parameter.sequence_parallel = False


def without_tensor_parallel_marks(models: list[Any]) -> None:
    """What a model looks like when megatron's initialisation is switched off."""
    for model in models:
        for parameter in model.parameters():
            parameter.tensor_model_parallel = False


def without_shared_encoder_gradients(models: list[Any]) -> None:
    """Keep each rank's own gradient of the encoder, of the images it was dealt."""
    for model in models:
        for parameter in model.parameters():
            parameter.average_gradients_across_tp_domain = False


def without_summed_head_norms(models: list[Any]) -> None:
    """Keep each rank's own gradient of the norms over a head's queries and keys, of its own heads."""
    for model in models:
        model.config.qk_layernorm = False


SABOTAGE: dict[str, Callable[[list[Any]], None]] = {
    f.__name__: f
    for f in (
        without_overlapped_p2p,
        without_sequence_parallel_marks,
        without_tensor_parallel_marks,
        without_shared_encoder_gradients,
        without_summed_head_norms,
    )
}


class Run:
    """A tiny model in the layout of `recipe`, with optimizer, ready to step."""

    def __init__(self, recipe: Recipe, sabotage: str | None = None) -> None:
        self.recipe = recipe
        self.layout = groups.initialize(recipe.parallel, torch.device("cpu"), "gloo")
        self.models = build_model(recipe, self.layout, "local", IMAGE_ID)
        initialize(self.models, draw_visible(recipe))
        if sabotage:
            SABOTAGE[sabotage](self.models)
        self.wrapped = wrap_data_parallel(self.models, recipe, self.layout)
        self.optimizer = build_optimizer(self.wrapped, recipe, self.layout)
        self.schedule = build_schedule(self.optimizer, recipe.optimizer, recipe.training.steps)

    def checkpoints(self, directory: Path, report: Callable[[str], None] = print) -> checkpoint.Checkpoints:
        """The checkpoints in `directory`, of this run."""
        state = (self.models, self.optimizer, self.recipe)
        return checkpoint.Checkpoints(directory, *state, lambda d: d.mkdir(), self.layout, report)

    def forward_backward(self, step: int) -> float:
        """Loss of a step; gradients stay in the buffers."""
        for model in self.wrapped:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        training, dp_size = self.recipe.training, self.layout.dp_size
        per_step = training.global_batch_size // training.micro_batch_size
        mine = range(step * per_step + self.layout.dp_rank, (step + 1) * per_step, dp_size)
        batches = [tiny_batch(self.recipe, i) for i in mine]
        return forward_backward(self.wrapped, batches, self.layout)

    def step(self, step: int) -> tuple[float, float]:
        """One optimizer step: (loss, gradient norm)."""
        loss = self.forward_backward(step)
        _, grad_norm, _ = self.optimizer.step()
        self.schedule.step(1)
        return loss, float(grad_norm)

    def gather_gradients(self) -> None:
        """The distributed optimizer leaves each data-parallel rank its part of the reduced gradients."""
        group = self.layout.collection.dp_cp
        for model in self.wrapped:
            for buffer in model.buffers:
                for bucket in buffer.buckets:
                    mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)

    def shards(self, select: Callable[[Any], Any] | None = None) -> list[Any]:
        """(name, whole shape, index, data) of this rank's parameters or of what `select` takes of them."""
        found = []
        for model in self.models:
            for s in named_shards(model, select):
                found.append((s.name, s.global_shape, s.index, s.data.detach().clone()))
        return found


def gradients_of(run: Run) -> list[Any]:
    """The shards of all gradients, after the backward pass."""
    if run.recipe.parallel.distributed_optimizer:
        run.gather_gradients()
    return run.shards(lambda p: getattr(p, "main_grad", None))


def one_step(assembly: str, overrides: dict[str, Any], sabotage: str | None = None) -> dict[str, Any]:
    """Loss, gradients and gradient norm of the first step."""
    run = Run(tiny_recipe(assembly, overrides), sabotage)
    loss = run.forward_backward(0)
    gradients = gradients_of(run)
    _, grad_norm, _ = run.optimizer.step()
    return {"loss": loss, "gradients": gradients, "grad_norm": float(grad_norm)}


def one_step_each(
    assemblies: list[str], overrides: dict[str, Any], sabotage: str | None = None
) -> dict[str, Any]:
    """`one_step` for several assemblies: starting processes takes longer than running them."""
    results = {assembly: one_step(assembly, overrides, sabotage) for assembly in assemblies}
    groups.shutdown()
    return results


def one_step_of_cases(cases: dict[str, list[Any]], overrides: dict[str, Any]) -> dict[str, Any]:
    """`one_step` of each (kind, overrides) in one layout."""
    results = {name: one_step(kind, {**own, **overrides}) for name, (kind, own) in cases.items()}
    groups.shutdown()
    return results


def save_after(
    assembly: str, overrides: dict[str, Any], directory: str, steps: int, more: int
) -> dict[str, Any]:
    """Train `steps`, save, train `more`."""
    run = Run(tiny_recipe(assembly, overrides))
    for step in range(steps):
        run.step(step)
    checkpoints = run.checkpoints(Path(directory))
    checkpoints.save(checkpoint.Progress(steps, steps * run.recipe.training.global_batch_size))
    checkpoints.wait()
    return _go_on(run, steps, more)


def load_and_go_on(assembly: str, overrides: dict[str, Any], directory: str, more: int) -> dict[str, Any]:
    """Load the newest checkpoint into another layout and train `more` steps."""
    run = Run(tiny_recipe(assembly, {"seed": 99, **overrides}))  # other weights than the saved ones
    progress = run.checkpoints(Path(directory)).load_newest()
    assert progress is not None
    run.schedule.step(progress.step)
    return _go_on(run, progress.step, more)


def load_only_weights(assembly: str, overrides: dict[str, Any], directory: str) -> dict[str, Any]:
    """Start from the weights of a checkpoint of another layout."""
    run = Run(tiny_recipe(assembly, {"seed": 99, **overrides}))
    source = checkpoint.resolve(directory)
    missing = checkpoint.load_weights(source, run.models, run.layout, part_of)
    result = {"missing": missing, "weights": run.shards()}
    groups.shutdown()
    return result


def _go_on(run: Run, start: int, more: int) -> dict[str, Any]:
    weights = run.shards()
    curve = [run.step(step) for step in range(start, start + more)]
    result = {"weights": weights, "curve": curve, "last": run.shards()}
    groups.shutdown()
    return result


def whole_tensors(results: list[dict[str, Any]], key: str) -> dict[str, torch.Tensor]:
    """Put the shards of all ranks together; replicas must agree, nothing may be missing."""
    whole: dict[str, torch.Tensor] = {}
    for result in results:
        for name, shape, index, data in result[key]:
            tensor = whole.setdefault(name, torch.full(shape, float("nan")))
            piece = data.reshape(tensor[index].shape).to(tensor.dtype)
            known = tensor[index]
            if not known.isnan().any():
                torch.testing.assert_close(
                    piece, known, rtol=1e-5, atol=1e-7, msg=f"replicas of {name} differ"
                )
            tensor[index] = piece
    for name, tensor in whole.items():
        assert not tensor.isnan().any(), f"{name}: no rank holds all of it"
    return whole
