"""What each process of a comparison runs: one step of the recipe in its layout, all of it written down."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megamm.batch import IGNORE_INDEX, Batch
from megamm.config import Recipe
from megamm.device import choose_backend, distributed_backend, pick_device, seed_everything
from megamm.engine import groups
from megamm.engine.groups import Groups
from megamm.engine.optimizer import build_optimizer, wrap_data_parallel
from megamm.engine.pipeline import forward_backward
from megamm.engine.weights import initialize, named_shards
from megamm.models.initialization import weight_drawer
from megamm.models.vlm import build_model
from megamm.parity.batches import synthetic_batch
from megamm.parity.shrink import IMAGE_ID
from megamm.recipe import load_recipe

# The modules whose outputs are compared, by their names in a model chunk.
_MODULES = re.compile(
    r"vision\.(patch_embedding|blocks\.\d+)|connector(\.layers\.\d+)?|language\.embedding"
    r"|language\.decoder\.layers\.\d+(\.(gated_cross_attention|self_attention|mlp))?"
    r"|language\.decoder\.final_layernorm"
)
_LOCAL_LAYER = re.compile(r"(?<=^language\.decoder\.layers\.)\d+")
LOSS = "loss"


def run(recipe: str, alter: Callable[[list[Any]], None] | None = None) -> dict[str, Any]:
    """One step: forward, backward, gradient norm.

    Args:
        recipe: its file.
        alter: does something to the model chunks of this rank before the step (tests of the comparison).
    Returns:
        loss, grad_norm: numbers.
        tensor, context: coordinates of this rank, which decide its share of the outputs.
        gradients: name -> [(place in the whole tensor as (start, stop) per dimension, values)].
        backward_order: names of the gradients as they came into being.
        activations: micro-batch -> module -> output.
    """
    return _step(load_recipe(Path(recipe)), alter)


def _step(recipe: Recipe, alter: Callable[[list[Any]], None] | None) -> dict[str, Any]:
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    device = pick_device(recipe.training.device)
    seed_everything(recipe.seed)
    layout = groups.initialize(recipe.parallel, device, distributed_backend(device))
    models = build_model(recipe, layout, choose_backend(recipe.parallel.backend)[0], IMAGE_ID)
    initialize(models, _draw_visible(recipe))
    if alter is not None:
        alter(models)
    wrapped = wrap_data_parallel(models, recipe, layout)
    optimizer = build_optimizer(wrapped, recipe, layout)
    activations = _record_activations(models)
    order = _record_backward_order(models)
    for model in wrapped:
        model.zero_grad_buffer()
    loss = forward_backward(wrapped, list(_batches(recipe, layout)), layout)
    if recipe.parallel.distributed_optimizer:
        gather_gradients(wrapped, layout)
    gradients = _gradients(models)
    _, grad_norm, _ = optimizer.step()
    result = {
        "loss": loss,
        "grad_norm": float(grad_norm or 0.0),
        "tensor": layout.tp_rank,
        "context": layout.collection.cp.rank(),
        "gradients": gradients,
        "backward_order": _names_in_order(models, order),
        "activations": activations,
    }
    groups.shutdown()
    return result


def _draw_visible(recipe: Recipe) -> Callable[[str, tuple[int, ...]], torch.Tensor]:
    """Initial weights of which none is neutral: shut gates, zero biases and norms of ones would hide what
    happens to them and behind them."""
    draw = weight_drawer(recipe.model, recipe.seed)

    def visible(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        value = draw(name, shape)
        if value.min() < value.max():
            return value
        digest = hashlib.sha256(name.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        opened = 0.5 if name.endswith("_gate") else 0.0
        return value + opened + 0.1 * torch.randn(shape, generator=generator)

    return visible


def _batches(recipe: Recipe, layout: Groups) -> Iterator[Batch]:
    """The micro-batches of this data-parallel rank, dealt in turn."""
    num_micro_batches = recipe.training.global_batch_size // recipe.training.micro_batch_size
    for index in range(layout.dp_rank, num_micro_batches, layout.dp_size):
        yield synthetic_batch(recipe, index).to(layout.device)


def gather_gradients(wrapped: list[Any], layout: Groups) -> None:
    """Give every data-parallel rank the whole reduced gradients, of which the distributed optimizer leaves
    each only its part."""
    for model in wrapped:
        for buffer in model.buffers:
            for bucket in buffer.buckets:
                group = layout.collection.dp_cp
                mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)


def _gradients(models: list[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for model in models:
        for shard in named_shards(model, lambda parameter: getattr(parameter, "main_grad", None)):
            place = [(part.start, part.stop) for part in shard.index]
            values = shard.data.detach().cpu().clone().reshape([stop - start for start, stop in place])
            found.setdefault(shard.name, []).append((place, values))
    return found


# --- what happened in which order -------------------------------------------------------------------------


def _record_activations(models: list[Any]) -> dict[int, dict[str, torch.Tensor]]:
    """Filled during the step: micro-batch -> module -> output. Modules that run again while gradients are
    computed (recomputation) are not recorded again."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    running: list[dict[str, torch.Tensor]] = []  # of the micro-batch whose forward pass is under way

    def start(chunk: nn.Module, arguments: tuple[Batch, ...]) -> None:
        running.append(found.setdefault(int(arguments[0].sample_ids[0]), {}))

    def end(chunk: Any, arguments: tuple[Batch, ...], output: torch.Tensor) -> None:
        record = running.pop()
        if chunk.post_process:
            carries_loss = chunk.own_labels(arguments[0]) != IGNORE_INDEX
            # sequence first, like all outputs
            record[LOSS] = torch.where(carries_loss, output.detach(), 0.0).t().cpu()

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if running:
                value = output[0] if isinstance(output, tuple) else output
                running[0][name] = value.detach().cpu().clone()

        return hook

    for model in models:
        model.register_forward_pre_hook(start)
        for name, module in _compared_modules(model):
            module.register_forward_hook(keep(name))
        model.register_forward_hook(end)
    return found


def _compared_modules(chunk: Any) -> Iterator[tuple[str, nn.Module]]:
    """(name with the layer number of the whole model, module)."""
    numbers = [layer.layer_number - 1 for layer in chunk.language.decoder.layers]
    for name, module in chunk.named_modules():
        if _MODULES.fullmatch(name):
            yield _LOCAL_LAYER.sub(lambda local: str(numbers[int(local[0])]), name), module


def _record_backward_order(models: list[Any]) -> dict[int, int]:
    """Filled during the step: id of a parameter -> when its first gradient came into being."""
    order: dict[int, int] = {}

    def note(parameter: nn.Parameter) -> Callable[[torch.Tensor], None]:
        def hook(gradient: torch.Tensor) -> None:
            order.setdefault(id(parameter), len(order))

        return hook

    for model in models:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(note(parameter))
    return order


def _names_in_order(models: list[Any], order: dict[int, int]) -> list[str]:
    """The checkpoint names of the parameters in `order`."""

    def when(parameter: nn.Parameter) -> torch.Tensor | None:
        if id(parameter) not in order:
            return None
        return torch.full(parameter.shape, float(order[id(parameter)]))

    found = [(float(s.data.flatten()[0]), s.name) for model in models for s in named_shards(model, when)]
    return [name for _, name in sorted(found)]
