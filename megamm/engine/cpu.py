"""megatron-core without CUDA: every patch it needs, with the reason.

megatron-core 0.16 assumes CUDA in a few dozen places (`torch.cuda.current_device()`, literal
`device="cuda"`, `.cuda()`, type names). Instead of patching torch for everybody, each megatron module
is given a stand-in for the name `torch`: the real module with a CPU behind the word "cuda". Only
`torch.Tensor.cuda` and `torch.Tensor.type` must be patched for real; they look at their caller and
change nothing for code outside megatron.

Never active when CUDA is available. Every replaced symbol is checked to exist, so that another version
of megatron-core fails here, by name, and not somewhere inside a training step.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import logging
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

# Tensor factories that megatron calls with an explicit device.
_FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
    "zeros_like",
)

# What megatron calls the type of a tensor it accepts as fp32/bf16/fp16 (it compares these strings).
_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}

_installed = False


def install_if_needed() -> None:
    """Prepare megatron-core for a machine without CUDA; does nothing where CUDA is, or the second time."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    stand_in = _torch_stand_in()
    sys.meta_path.insert(0, _PatchingFinder(stand_in))
    _patch_tensor_methods()
    _import_without_compile()
    _patch_megatron()


def is_installed() -> bool:
    """Whether megatron-core runs on the CPU through these patches."""
    return _installed


# --- the stand-in for the name `torch` inside megatron ------------------------------------------------


def _to_cpu(device: Any) -> Any:
    """`device` with CUDA replaced by the CPU; anything else, None included, unchanged."""
    if isinstance(device, int):
        return torch.device("cpu")
    if isinstance(device, str | torch.device) and torch.device(device).type == "cuda":
        return torch.device("cpu")
    return device


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its `device` argument mapped to the CPU, where no memory is pinned."""

    @functools.wraps(function)
    def mapped(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _to_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return mapped


class _StandIn(types.ModuleType):
    """A module that answers like `real`, apart from the names given to it."""

    def __init__(self, real: types.ModuleType, **replacements: Any) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(real.__dict__)
        self.__dict__["_real"] = real
        for name, value in replacements.items():
            if not hasattr(real, name):
                raise RuntimeError(
                    f"{real.__name__}.{name} no longer exists; megamm/engine/cpu.py replaces it"
                )
            self.__dict__[name] = value

    def __getattr__(self, name: str) -> Any:  # names the real module resolves lazily
        return getattr(self.__dict__["_real"], name)


def _torch_stand_in() -> types.ModuleType:
    cuda = _StandIn(
        torch.cuda,
        current_device=lambda: torch.device("cpu"),
        synchronize=lambda *args, **kwargs: None,  # CPU work is done when the call returns
        current_stream=lambda *args: None,
        empty_cache=lambda: None,
        # one generator serves as "the GPU's": RNG tracking (dropout, initialisation) needs these three
        get_rng_state=lambda device="cuda": torch.get_rng_state(),
        set_rng_state=lambda state, device="cuda": torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
    )
    factories = {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}
    # compile would spend a minute of Inductor per process on ops that gain nothing on the CPU
    return _StandIn(torch, cuda=cuda, compile=_no_compile, **factories)


def _no_compile(model: Any = None, **kwargs: Any) -> Any:
    """torch.compile as identity, in both of its forms (call and decorator with options)."""
    return model if model is not None else lambda function: function


class _PatchingFinder(importlib.abc.MetaPathFinder):
    """Lets megatron modules load normally, then puts the stand-in where they bound the name torch."""

    def __init__(self, stand_in: types.ModuleType) -> None:
        self.stand_in = stand_in

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if not name.startswith("megatron."):
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    self._wrap(spec.loader)
                return spec
        return None

    def _wrap(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            if module.__dict__.get("torch") is torch:
                module.__dict__["torch"] = self.stand_in

        loader.exec_module = exec_module


# --- the two methods of Tensor ------------------------------------------------------------------------


def _called_from_megatron() -> bool:
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("megatron.")


def _patch_tensor_methods() -> None:
    real_cuda, real_type = torch.Tensor.cuda, torch.Tensor.type

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if _called_from_megatron() else real_cuda(self, *args, **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs and _called_from_megatron():
            return _CUDA_TYPE_NAMES.get(self.dtype) or real_type(self)
        return real_type(self, *args, **kwargs)

    torch.Tensor.cuda = cuda  # type: ignore[method-assign, assignment]
    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]


# --- megatron itself ----------------------------------------------------------------------------------


def _import_without_compile() -> None:
    """Import megatron.core while torch.compile is the identity: its decorators run at import, before
    the stand-in is in place, and cost a second of Inductor imports."""
    real = torch.compile
    torch.compile = _no_compile  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Apex/TE is not installed": said once by `megamm doctor`
            for name in (
                "megatron.core.models.gpt",
                "megatron.core.optimizer",
                "megatron.core.distributed",
                "megatron.core.pipeline_parallel.schedules",
                "megatron.core.dist_checkpointing",
            ):
                importlib.import_module(name)
    finally:
        torch.compile = real


def _patch_megatron() -> None:
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    # these two reach for torch.cuda's C-level generators
    replace_symbol(
        random, "_set_cuda_rng_state", lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    )
    replace_symbol(
        random,
        "_get_cuda_rng_state",
        lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state(),
    )
    # with one generator for both, the tracker reports "CPU RNG state changed" at every fork
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


def replace_symbol(owner: Any, name: str, value: Any) -> None:
    """Set `owner.name`, insisting that it exists: a renamed symbol must not turn a patch into nothing."""
    if not hasattr(owner, name):
        raise RuntimeError(
            f"{owner.__name__}.{name} does not exist in this megatron-core; megamm needs 0.16.x"
        )
    setattr(owner, name, value)
