"""What a frozen part does not cost: weight-gradient products, gradient buffers, optimizer state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megamm.engine.groups import Groups
from megamm.engine.optimizer import build_optimizer, wrap_data_parallel
from megamm.engine.pipeline import forward_backward
from tests.dist.tiny import tiny_batch, tiny_recipe
from tests.one_process import build

FROZEN = {
    "nothing": "[]",
    "language": "[language]",
    "vision_and_language": "[vision, language]",
    "all_but_the_connector": "[vision, language, cross_attention]",
}
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


class CountProducts(TorchDispatchMode):
    """Shapes of the results of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in PRODUCTS:
            self.shapes.append(tuple(sorted(result.shape)))
        return result


def linear_weights(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """2-D weights that take part in a product (embeddings and latents do not)."""
    left_out = ("embedding", "latents", "unused")
    unused = {id(p) for module in model.vision.unused_modules() for p in module.parameters()}  # type: ignore
    return {
        name: p
        for name, p in model.named_parameters()
        if p.ndim == 2 and id(p) not in unused and not any(word in name for word in left_out)
    }


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("kind", ["merged", "cross_attention"])
def test_products_buffers_and_states(layout: Groups, kind: str, frozen: str) -> None:
    freeze = FROZEN[frozen]
    if kind == "merged":
        freeze = freeze.replace(", cross_attention", "")
    # a length at which no activation has the shape of a weight
    overrides = {"training.freeze": freeze, "training.global_batch_size": 2, "data.sequence_length": 25}
    recipe = tiny_recipe(kind, overrides)
    model = build(recipe, layout)
    wrapped = wrap_data_parallel([model], recipe, layout)
    optimizer = build_optimizer(wrapped, recipe, layout)
    weights = linear_weights(model)
    shapes = {tuple(sorted(p.shape)) for p in weights.values()}

    # (without gradients: the output layer's are computed in the forward pass, with the loss)
    with CountProducts() as forward, torch.no_grad():
        model(tiny_batch(recipe, 0))
    with CountProducts() as both:
        forward_backward(wrapped, [tiny_batch(recipe, 0)], layout)
    assert not shapes & set(forward.shapes), "an activation has the shape of a weight: choose other sizes"
    gradients = [shape for shape in both.shapes if shape in shapes]
    trained = [p for p in weights.values() if p.requires_grad]
    assert sorted(gradients) == sorted(tuple(sorted(p.shape)) for p in trained)

    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < num_trained <= sum(p.numel() for p in model.parameters())
    buffers = [buffer.grad_data for model in wrapped for buffer in model.buffers]
    # the distributed optimizer rounds parameters and buckets up
    num_parameters = sum(p.requires_grad for p in model.parameters())
    assert num_trained <= sum(b.numel() for b in buffers) <= num_trained + 64 * num_parameters + 128
    assert all(b.dtype == torch.float32 for b in buffers)

    optimizer.step()
    states = [state for part in optimizer.chained_optimizers for state in part.optimizer.state.values()]
    kept = sum(x.numel() for state in states for x in state.values() if torch.is_tensor(x) and x.numel() > 1)
    assert kept <= 2 * num_trained
    assert kept >= 2 * (num_trained - 64)  # moments of one-element tensors are left out of the sum
