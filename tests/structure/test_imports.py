"""Importing megamm is cheap: the heavy libraries are imported where they are used."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "megatron", "transformers", "numpy", "nvidia")


def imported_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `statement`."""
    code = f"{statement}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize("module", ["megamm", "megamm.errors", "megamm.config"])
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    loaded = imported_by(f"import {module}")
    assert "megamm" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_the_probe_sees_heavy_imports() -> None:
    assert "torch" in imported_by("import megamm.device")
