"""The reference implementations that transformers has not: timm, open_clip, open_flamingo and peft.

`tools/bootstrap.sh` puts them into a folder of their own in the virtual environment, which joins the module
search path here. The first three import torchvision, whose compiled operators need CUDA; where they cannot be
loaded, their schemas are declared instead, which is all that importing torchvision asks for.
"""

from __future__ import annotations

import importlib
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(sys.prefix) / "references"
_declared: list[torch.library.Library] = []  # what is declared lasts as long as its library


@cache
def _join_search_path() -> None:
    if not FOLDER.is_dir():
        raise ModuleNotFoundError(
            f"{FOLDER} is missing: run tools/bootstrap.sh in the environment that is used"
        )
    _keep_transformers_as_it_is()
    sys.path.append(str(FOLDER))
    _make_torchvision_importable(FOLDER / "torchvision")


def _keep_transformers_as_it_is() -> None:
    """Have transformers look for its optional packages (it does so once) before they can be found: with
    torchvision it takes other image processors, and tests would depend on which of them ran first."""
    from transformers.utils import import_utils

    for package in ("torchvision", "torchvision_v2", "timm", "accelerate", "peft"):
        getattr(import_utils, f"is_{package}_available")()


def _make_torchvision_importable(package: Path) -> None:
    try:
        torch.ops.load_library(str(package / "_C.so"))
    except OSError:
        source = (package / "_meta_registrations.py").read_text()
        library = torch.library.Library("torchvision", "DEF")
        for name in re.findall(r'(?:register_meta\("|register_fake\("torchvision::)(\w+)"', source):
            library.define(f"{name}(Tensor a) -> Tensor")
        _declared.append(library)


def _module(name: str) -> Any:
    _join_search_path()
    return importlib.import_module(name)


def timm() -> Any:
    """The module timm."""
    return _module("timm")


def open_clip() -> Any:
    """The module open_clip."""
    return _module("open_clip")


def open_flamingo() -> Any:
    """The module open_flamingo."""
    return _module("open_flamingo")


def peft() -> Any:
    """The module peft."""
    return _module("peft")
