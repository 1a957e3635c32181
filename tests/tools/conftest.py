"""The scripts in tools/benchmark import each other by their names, as a script's own folder allows."""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "tools" / "benchmark"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))
