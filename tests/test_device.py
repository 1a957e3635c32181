"""Choosing device, dtype and backend."""

from __future__ import annotations

import importlib.machinery
import random
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil
import pytest
import torch

from megamm import device
from megamm.errors import InputError


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine with two GPUs; holds the index that was made current."""
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


def install_te(monkeypatch: pytest.MonkeyPatch, folder: Path, compiled: bool, works: bool = True) -> None:
    """A transformer_engine as the import system finds it: with or without its compiled core."""
    package = folder / "transformer_engine"
    (package / "pytorch").mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '2.11.0'\n")
    (package / "pytorch" / "__init__.py").write_text(
        "" if works else "raise OSError('libcudnn is missing')\n"
    )
    if compiled:
        (package / "wheel_lib").mkdir()
        (package / "wheel_lib" / "libtransformer_engine.so").touch()
    monkeypatch.syspath_prepend(str(folder))
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture(autouse=True)
def forget_te() -> object:
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        del sys.modules[name]


def test_without_cuda(no_cuda: None) -> None:
    assert device.pick_device("auto") == device.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match=r"training\.device: cuda was asked for but .*; use device=cpu"):
        device.pick_device("cuda")


@pytest.mark.parametrize("choice", ["auto", "cuda"])
def test_each_local_rank_takes_its_gpu(
    choice: str, two_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert device.pick_device(choice) == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device.pick_device(choice) == torch.device("cuda", 1)
    assert two_gpus == [0, 1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match=r"LOCAL_RANK: process 2 .* has 2; start at most 2"):
        device.pick_device(choice)


def test_cpu_wins_where_it_is_asked_for(two_gpus: list[int]) -> None:
    assert device.pick_device("cpu") == torch.device("cpu") and two_gpus == []


def test_unknown_names_are_refused() -> None:
    for call in (device.pick_device, device.dtype_of, device.choose_backend):
        with pytest.raises(InputError, match="'tpu' is unknown; use "):
            call("tpu")


def test_distributed_backend_and_dtype() -> None:
    assert device.distributed_backend(torch.device("cpu")) == "gloo"
    assert device.distributed_backend(torch.device("cuda", 3)) == "nccl"
    assert (device.dtype_of("fp32"), device.dtype_of("bf16")) == (torch.float32, torch.bfloat16)


def test_te_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "transformer_engine" else find_spec(name)
    )
    assert device.backend_status()["te"].reason == "Transformer Engine is not installed"
    name, reason = device.choose_backend("auto")
    assert name == "local" and "te does not work here" in reason
    with pytest.raises(InputError, match=r"parallel\.backend: te does not work here: .*; install"):
        device.choose_backend("te")


def test_te_meta_package_is_recognised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, two_gpus: list[int]
) -> None:
    install_te(monkeypatch, tmp_path, compiled=False)
    status = device.backend_status()["te"]
    assert not status.works and "meta package" in status.reason and "uninstall" in status.remedy


def test_te_without_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_cuda: None) -> None:
    install_te(monkeypatch, tmp_path, compiled=True)
    assert "needs CUDA" in device.backend_status()["te"].reason


def test_te_whose_import_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, two_gpus: list[int]) -> None:
    install_te(monkeypatch, tmp_path, compiled=True, works=False)
    assert "libcudnn is missing" in device.backend_status()["te"].reason
    assert device.choose_backend("auto")[0] == "local"


def test_te_that_works_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, two_gpus: list[int]) -> None:
    install_te(monkeypatch, tmp_path, compiled=True)
    assert device.choose_backend("auto") == ("te", "auto: Transformer Engine 2.11.0")
    assert device.choose_backend("te") == ("te", "asked for: Transformer Engine 2.11.0")
    assert device.choose_backend("local")[0] == "local"


def test_local_works_here() -> None:
    status = device.backend_status()["local"]
    assert status.works and "0.16.1" in status.reason
    assert device.choose_backend("local") == ("local", f"asked for: {status.reason}")


def test_flash_attn(monkeypatch: pytest.MonkeyPatch, two_gpus: list[int]) -> None:
    flash = ModuleType("flash_attn")
    flash.__version__ = "2.8.3"  # type: ignore[attr-defined]
    flash.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    assert device.backend_status()["flash-attn"] == device.BackendStatus(True, "flash-attn 2.8.3")


def test_seed_everything() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    device.seed_everything(7)
    first = draw()
    device.seed_everything(8)
    other = draw()
    device.seed_everything(7)
    assert draw() == first
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_memory_used_is_the_peak() -> None:
    block = torch.ones(2**28, dtype=torch.uint8)
    resident = psutil.Process().memory_info().rss
    held = device.memory_used("cpu")
    del block
    assert held >= resident > 2**28
    assert device.memory_used() > held - 2**22  # the kernel keeps the peak to some pages only


def working_te(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    capability: tuple[int, int],
    version: str = "2.11.0",
    cuda: str = "13.0",
    verdict: str = "",
) -> None:
    """A transformer_engine that works, with a GPU of this compute capability."""
    install_te(monkeypatch, folder, compiled=True)
    (folder / "transformer_engine" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    (folder / "transformer_engine" / "pytorch" / "__init__.py").write_text(
        f"def is_fp8_available(return_reason=False):\n    return {not verdict}, {verdict!r}\n"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA X")
    monkeypatch.setattr(torch.version, "cuda", cuda)


@pytest.mark.parametrize(
    "capability, works",
    [
        ((8, 0), []),
        ((8, 9), ["delayed", "current"]),
        ((9, 0), ["delayed", "current", "blockwise"]),
        ((10, 0), ["delayed", "current", "blockwise", "mxfp8"]),
    ],
)
def test_fp8_by_gpu(
    capability: tuple[int, int],
    works: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    two_gpus: list[int],
) -> None:
    working_te(monkeypatch, tmp_path, capability)
    assert [scaling for scaling, status in device.fp8_status().items() if status.works] == works
    for scaling, status in device.fp8_status().items():
        if scaling in works:
            device.require_fp8(scaling, "te", torch.device("cuda", 0))
        else:
            assert re.search(rf"NVIDIA X has compute capability {capability[0]}\.", status.reason)
            with pytest.raises(
                InputError, match=rf"fp8\.scaling: {scaling} does not work here: .* or newer; "
            ):
                device.require_fp8(scaling, "te", torch.device("cuda", 0))


def test_fp8_needs_more_than_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, two_gpus: list[int]
) -> None:
    working_te(monkeypatch, tmp_path, (9, 0), version="2.1.0", cuda="12.8")
    status = device.fp8_status()
    assert status["delayed"].works
    assert status["current"].reason == "it needs Transformer Engine 2.2 or newer, not 2.1.0"
    assert "Transformer Engine 2.3" in status["blockwise"].reason
    with pytest.raises(InputError, match=r"delayed does not work here: it does not run on parallel\.backend"):
        device.require_fp8("delayed", "local", torch.device("cuda", 0))
    with pytest.raises(InputError, match="delayed does not work here: it does not run on the CPU"):
        device.require_fp8("delayed", "te", torch.device("cpu"))


def test_fp8_where_cuda_is_too_old_or_te_says_no(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, two_gpus: list[int]
) -> None:
    working_te(monkeypatch, tmp_path, (9, 0), cuda="12.8", verdict="no cuBLAS.")
    assert (
        device.fp8_status()["blockwise"].reason == "it needs a torch built with CUDA 12.9 or newer, not 12.8"
    )
    assert device.fp8_status()["delayed"].reason == "Transformer Engine says: no cuBLAS"


def test_fp8_without_te(no_cuda: None) -> None:
    device.require_fp8("off", "local", torch.device("cpu"))
    with pytest.raises(InputError, match=r"training\.fp8\.scaling: current does not work here: .*; install"):
        device.require_fp8("current", "local", torch.device("cpu"))


def test_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = device.memory_limit(torch.device("cpu"))
    assert 0 < alone <= psutil.virtual_memory().total
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert device.memory_limit(torch.device("cpu")) < alone / 2


def test_memory_limit_of_a_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Cached files are no memory that is taken."""
    monkeypatch.setattr(device, "_CGROUP", tmp_path)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name, text in {"max": "4000", "current": "3900", "stat": "anon 900\ninactive_file 3000\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert device.memory_limit(torch.device("cpu")) == 3100
    (tmp_path / "memory.max").write_text("max\n")
    assert device.memory_limit(torch.device("cpu")) > 4000
