"""Who may import whom. The floors of the package, checked on every import of every module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megamm"
# A module may import from floors below its own, and from its own folder.
FLOORS = [
    {
        *("", "config", "recipe", "recipe_checks", "recipe_presets", "errors", "batch", "device", "ops"),
        *("pages", "whole_files"),
    },
    {"engine"},
    {"layers"},
    {"models", "data"},
    {"convert", "planning", "inference"},
    {"training", "evaluation", "parity", "chat", "integrations"},
    {"report"},
    {"cli"},
    {"__main__"},
]
GROUND = FLOORS[0]  # its modules may import each other
FLOOR_OF = {part: number for number, parts in enumerate(FLOORS) for part in parts}
MEGATRON = {"engine", "layers"}  # may import megatron
CUDA = {"engine", "device"}  # may use torch.cuda

Imports = list[tuple[int, str]]


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The folder or module directly below megamm/ that a file belongs to."""
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


def imports(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, also within functions and by importlib.import_module("...")."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, [above, node.module]))
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _name(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, str(arg.value)) for arg in node.args if isinstance(arg, ast.Constant))


def cuda_uses(tree: ast.AST) -> Iterator[int]:
    """Lines that name torch.cuda."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _name(node).startswith("torch.cuda"):
            yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            if any(name == "torch.cuda" or name.startswith("torch.cuda.") for name in names):
                yield node.lineno
        elif isinstance(node, ast.Import) and any(
            alias.name.startswith("torch.cuda") for alias in node.names
        ):
            yield node.lineno


def floor_faults(tree: ast.AST, path: Path) -> list[str]:
    """What a module imports and may not."""
    part, faults = part_of(path), []
    for line, name in imports(tree, path):
        top, _, rest = name.partition(".")
        if top == "megatron" and part not in MEGATRON:
            faults.append(f"line {line}: {name} (only {', '.join(sorted(MEGATRON))} may import megatron)")
        target = rest.partition(".")[0]
        if top != "megamm" or target not in FLOOR_OF or target == part:
            continue
        if FLOOR_OF[target] > FLOOR_OF[part] or (FLOOR_OF[target] == FLOOR_OF[part] and target not in GROUND):
            faults.append(f"line {line}: {name} (floor {FLOOR_OF[target]}) from floor {FLOOR_OF[part]}")
    return sorted(set(faults))


def _name(node: ast.AST) -> str:
    """The dotted name of an expression, or nothing."""
    if isinstance(node, ast.Attribute):
        base = _name(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def test_every_part_has_a_floor() -> None:
    parts = {part_of(path) for path in modules()}
    assert len(modules()) >= 6 and {"errors", "device", "ops"} <= parts
    assert parts <= set(FLOOR_OF), f"no floor for {parts - set(FLOOR_OF)}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    assert floor_faults(ast.parse(path.read_text()), path) == []


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_cuda_is_used_where_it_may(path: Path) -> None:
    if part_of(path) not in CUDA:
        assert list(cuda_uses(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    ("module", "code", "fault"),
    [
        ("models/x.py", "import megatron.core", "may import megatron"),
        ("layers/x.py", "from megatron.core import tensor_parallel", ""),
        ("models/x.py", "def f():\n    from megamm.data import loader", "megamm.data"),
        ("data/x.py", "from megamm import models", "megamm.models"),
        ("engine/x.py", "from ..layers import norm", "megamm.layers"),
        ("ops/x.py", "import importlib\nimportlib.import_module('megamm.engine')", "megamm.engine"),
        ("convert/x.py", "import megamm.planning.memory", "megamm.planning"),
        ("training/x.py", "from megamm.models import language\nfrom megamm.training import loop", ""),
        ("config.py", "from megamm.errors import InputError", ""),
        ("errors.py", "from megamm.cli import main", "megamm.cli"),
    ],
)
def test_the_walk_finds_what_it_should(module: str, code: str, fault: str) -> None:
    faults = floor_faults(ast.parse(code), PACKAGE / module)
    assert (fault in faults[0]) if fault else faults == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import torch\ntorch.cuda.synchronize()", True),
        ("from torch import cuda", True),
        ("from torch.cuda import Stream", True),
        ("import torch.cuda.nvtx", True),
        ("import torch\nx.cuda()\ntorch.version.cuda", False),
    ],
)
def test_the_walk_finds_cuda(code: str, found: bool) -> None:
    assert bool(list(cuda_uses(ast.parse(code)))) == found
