"""What runs under FP8 and what does not, as far as a CPU can tell.

megatron-core's TransformerBlock enters its FP8 contexts for real; the two functions of Transformer Engine
that it and megamm call are stand-ins that record. What those compute is for tools/fp8_check.sh.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import transformer_block
from torch.utils.checkpoint import checkpoint

from megamm.config import Recipe
from megamm.engine.groups import Groups
from megamm.models.vlm import VisionLanguageModel
from tests.dist.tiny import LORA, tiny_batch, tiny_recipe
from tests.one_process import build, whole

FP8 = {"training.precision": "bf16", "training.fp8.scaling": "delayed"}
KINDS = {"merged": {}, "cross_attention": {"model.connector.num_latents": 8}}


class Contexts:
    """megatron-core's FP8 contexts, counted instead of computed in."""

    def __init__(self) -> None:
        self.depth = 0
        self.groups_of_layers: list[int] = []

    def __call__(self, config: Any, layer_no: int = -1, is_init: bool = False) -> Any:
        wanted = config.fp8 and not is_init and not is_first_last_bf16_layer(config, layer_no)
        return self.entered(layer_no) if wanted else contextlib.nullcontext()

    @contextlib.contextmanager
    def entered(self, layer_no: int) -> Iterator[None]:
        self.groups_of_layers.append(layer_no)
        self.depth += 1
        yield
        self.depth -= 1


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> Contexts:
    found = Contexts()
    monkeypatch.setattr(transformer_block, "get_fp8_context", found)
    return found


def linears(model: VisionLanguageModel, recipe: Recipe, contexts: Contexts) -> dict[str, bool]:
    """Name -> whether it ran under FP8, of everything with a weight matrix."""
    found: dict[str, bool] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda *_: found.__setitem__(name, contexts.depth > 0)

    hooks = []
    for name, module in model.named_modules():
        if any(p.ndim > 1 for p in module.parameters(recurse=False)):
            hooks.append(module.register_forward_pre_hook(note(name)))
    model(tiny_batch(recipe, 0))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("scaling", ["delayed", "current"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_linears_of_the_decoder_alone(
    kind: str, scaling: str, layout: Groups, contexts: Contexts
) -> None:
    recipe = tiny_recipe(kind, {**FP8, **KINDS[kind], "training.fp8.scaling": scaling})
    model = build(recipe, layout)
    found = linears(model, recipe, contexts)
    decoder = {name for name in found if name.startswith("language.decoder.")}
    assert {name for name, inside in found.items() if inside} == decoder
    assert len(decoder) == 4 * 4 + (2 * 5 if kind == "cross_attention" else 0)  # (of 4 layers, 2 gated)
    for name in decoder:
        assert isinstance(model.get_submodule(name), ColumnParallelLinear | RowParallelLinear), name
    outside = {name.partition(".")[0] for name in found.keys() - decoder}
    assert outside >= {"vision", "connector", "language"}
    assert contexts.groups_of_layers == ([-1] if scaling == "delayed" else [0, 1, 2, 3])
    assert contexts.depth == 0


def test_layers_in_bf16(layout: Groups, contexts: Contexts) -> None:
    keys = {"training.fp8.scaling": "current", "training.fp8.bf16_layers_at_start": 2}
    recipe = tiny_recipe("cross_attention", {**FP8, **KINDS["cross_attention"], **keys})
    found = linears(build(recipe, layout), recipe, contexts)
    layers = {name.split(".")[3] for name, inside in found.items() if inside}
    assert layers == {"2", "3"}


def test_evaluation_is_in_bf16_and_training_goes_on_in_fp8(layout: Groups, contexts: Contexts) -> None:
    recipe = tiny_recipe("merged", FP8)
    model = build(recipe, layout)
    assert not any(linears(model.eval(), recipe, contexts).values())
    assert any(linears(model.train(), recipe, contexts).values())
    plain = build(tiny_recipe("merged", {"training.precision": "bf16"}), layout)
    assert not any(linears(plain.eval().train(), recipe, contexts).values())


class SetAside:
    """Transformer Engine's checkpoint under delayed scaling, as far as its bookkeeping goes: the forward pass
    sets scaling factors aside, computing again takes them back, in order."""

    def __init__(self) -> None:
        self.waiting: list[object] = []
        self.calls = 0

    def checkpoint(self, function: Callable[..., Any], *args: Any, use_reentrant: bool, **kwargs: Any) -> Any:
        assert not use_reentrant
        function.fsdp_group = None  # type: ignore[attr-defined]
        token, runs = object(), 0
        self.waiting.append(token)
        self.calls += 1

        def twice(*args: Any, **kwargs: Any) -> Any:
            nonlocal runs
            runs += 1
            if runs == 2:
                self.waiting.remove(token)
            return function(*args, **kwargs)

        return checkpoint(twice, *args, use_reentrant=False, **kwargs)


@pytest.fixture
def set_aside(monkeypatch: pytest.MonkeyPatch) -> SetAside:
    found = SetAside()
    engine, torch_half = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    torch_half.checkpoint = found.checkpoint  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", engine)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", torch_half)
    return found


FROZEN_IN_FRONT = {
    "training.freeze": "[vision, connector, language]",
    "training.unfreeze.language": 2,
}
RECOMPUTED: dict[str, tuple[str, dict[str, Any], int]] = {
    # kind, overrides, how many of its layers have a backward pass
    "trained": ("merged", {}, 4),
    "frozen in front": ("merged", FROZEN_IN_FRONT, 2),
    "frozen decoder": ("cross_attention", {"training.freeze": "[vision, connector, language]"}, 3),
    "adapters": ("merged", {**LORA, "training.freeze": "[vision, connector, language]"}, 4),
}


@pytest.mark.parametrize("granularity", ["full", "selective"])
@pytest.mark.parametrize("case", RECOMPUTED)
def test_scaling_factors_that_are_set_aside_are_taken_back(
    case: str, granularity: str, layout: Groups, contexts: Contexts, set_aside: SetAside
) -> None:
    kind, overrides, num_layers = RECOMPUTED[case]
    how = {"training.recompute.language": granularity, "training.recompute.connector": True}
    if granularity == "selective":
        how["training.recompute.modules"] = "[mlp]"
    recipe = tiny_recipe(kind, {**FP8, **KINDS[kind], **overrides})
    gradients = []
    for settings in ({}, how):
        recipe = tiny_recipe(kind, {**FP8, **KINDS[kind], **overrides, **settings})
        model = build(recipe, layout)
        model(tiny_batch(recipe, 0)).sum().backward()
        gradients.append(whole(model, lambda p: p.grad))
    assert set_aside.calls == num_layers and set_aside.waiting == []
    plain, again = gradients
    assert plain.keys() == again.keys() and plain
    for name, gradient in plain.items():
        assert torch.equal(gradient, again[name]), name
