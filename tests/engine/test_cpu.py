"""megatron-core without CUDA: what is patched exists, and nobody else notices."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from megamm.engine import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for machines without CUDA")


def in_megatron(source: str) -> types.ModuleType:
    """A module of megatron's that was loaded with the patches, running `source`."""
    from megatron.core import utils

    name = "megatron.core.made_up"
    module = types.ModuleType(name)
    module.__dict__.update(torch=utils.torch, __name__=name)
    exec(source, module.__dict__)
    return module


def test_torch_outside_megatron_is_untouched() -> None:
    assert cpu.is_installed()
    assert torch.cuda.current_device.__module__ == "torch.cuda"
    for act in (
        lambda: torch.zeros(1, device="cuda"),
        lambda: torch.tensor([1.0], device="cuda:0"),
        lambda: torch.zeros(1).cuda(),
        lambda: torch.cuda.current_device(),
    ):
        with pytest.raises((AssertionError, RuntimeError), match=r"(?i)cuda|nvidia"):
            act()
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64
    assert torch.compile.__module__ == "torch"


def test_inside_megatron_cuda_is_the_cpu() -> None:
    made = in_megatron(
        "a = torch.zeros(2, device='cuda'), torch.empty(1, device=torch.cuda.current_device())\n"
        "b = torch.ones(3).cuda(), torch.rand(1).to(torch.cuda.current_device())\n"
        "types = [torch.zeros(1, dtype=d).type() for d in (torch.float32, torch.bfloat16, torch.float16)]\n"
        "same = torch.zeros(1).type(torch.int32).dtype, torch.zeros(1, dtype=torch.int64).type()\n"
        "torch.cuda.synchronize(); torch.cuda.empty_cache()\n"
        "state = torch.cuda.get_rng_state(); x = torch.rand(4)\n"
        "torch.cuda.set_rng_state(state); y = torch.rand(4)\n"
    )
    assert all(tensor.device.type == "cpu" for tensor in (*made.a, *made.b))
    assert made.types == [f"torch.cuda.{kind}Tensor" for kind in ("Float", "BFloat16", "Half")]
    assert made.same == (torch.int32, "torch.LongTensor")
    assert torch.equal(made.x, made.y)


def test_every_megatron_module_has_the_stand_in() -> None:
    names = [name for name in sys.modules if name.startswith("megatron.")]
    with_torch = [name for name in names if "torch" in vars(sys.modules[name])]
    assert len(with_torch) > 50
    real = [name for name in with_torch if vars(sys.modules[name])["torch"] is torch]
    assert real == []


def test_every_replaced_name_exists() -> None:
    stand_in = cpu._torch_stand_in()  # refuses names that torch does not have
    assert isinstance(stand_in, cpu._StandIn) and len(cpu._FACTORIES) > 15
    assert all(vars(stand_in)[name] is not getattr(torch, name) for name in cpu._FACTORIES)
    assert stand_in.nn is torch.nn and stand_in.float32 is torch.float32
    with pytest.raises(RuntimeError, match=r"torch\.cuda\.no_such_thing no longer exists"):
        cpu._StandIn(torch.cuda, no_such_thing=None)


def test_replace_symbol_insists_that_it_exists() -> None:
    module = types.ModuleType("some_module")
    module.known = 1  # type: ignore[attr-defined]
    cpu.replace_symbol(module, "known", 2)
    assert module.known == 2
    with pytest.raises(RuntimeError, match=r"some_module\.unknown does not exist"):
        cpu.replace_symbol(module, "unknown", 2)
    assert not hasattr(module, "unknown")


def test_installing_twice_changes_nothing() -> None:
    before = list(sys.meta_path), torch.Tensor.cuda
    cpu.install_if_needed()
    assert (sys.meta_path, torch.Tensor.cuda) == before
    assert sum(isinstance(finder, cpu._PatchingFinder) for finder in sys.meta_path) == 1
