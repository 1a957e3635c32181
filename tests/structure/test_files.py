"""What every source file must be: small, introduced by a sentence; scripts that are sound and executable."""

from __future__ import annotations

import ast
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 450
SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h", ".sh")
FOLDERS = ("megamm", "csrc", "tests", "tools", "examples")


def files(*suffixes: str) -> list[Path]:
    found = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*"))]
    return [path for path in found if path.suffix in suffixes and "__pycache__" not in path.parts]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_files_are_short() -> None:
    sizes = {relative(path): len(path.read_text().splitlines()) for path in files(*SUFFIXES)}
    assert len(sizes) >= 15
    tables = {name for name in sizes if "/tables/" in name}
    assert {name: size for name, size in sizes.items() if size > MAX_LINES and name not in tables} == {}


def test_every_test_is_found(request: pytest.FixtureRequest) -> None:
    """pytest leaves out folders with certain names, without a word."""
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")}
    assert Path("tests/dist") in folders
    left_out = request.config.getini("norecursedirs")
    assert [f for f in folders for part in f.parts for name in left_out if fnmatch(part, name)] == []


def test_modules_have_a_docstring() -> None:
    modules = [path for path in files(".py") if path.stat().st_size]
    assert len(modules) >= 10
    assert [relative(path) for path in modules if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_kernels_say_what_they_compute_and_move() -> None:
    kernels = files(".cu")
    assert kernels
    for path in kernels:
        header = path.read_text().split("#include")[0]
        for word in ("Math", "Bytes moved", "Versions"):
            assert word in header, f"{relative(path)}: no {word!r} in the header comment"


def test_scripts_are_executable_and_parse() -> None:
    scripts = [*files(".sh"), ROOT / ".ci" / "run"]
    assert len(scripts) >= 3
    for path in scripts:
        assert path.stat().st_mode & 0o111, f"{relative(path)} is not executable"
        assert path.read_text().startswith("#!/usr/bin/env bash\n"), relative(path)
        subprocess.run(["bash", "-n", path], check=True, timeout=30)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_pass_shellcheck() -> None:
    scripts = [*files(".sh"), ROOT / ".ci" / "run"]
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
