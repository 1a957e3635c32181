"""RUN_DIR/incidents.jsonl: what went wrong and was survived, a row of JSON each: updates that were left out,
ways back to an earlier checkpoint, ranks that hung or were slow, saves that failed."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from megamm.training.metrics import row_line

FILE = "incidents.jsonl"


def record_incident(run_dir: str | Path, kind: str, step: int, **details: Any) -> None:
    """Append a row; where it cannot be written, what is being survived goes on all the same.

    Args:
        kind: "skipped_step", "rollback", "hang", "slow_rank".
        step: the one it was noticed in.
        details: whatever helps to find the cause.
    """
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with contextlib.suppress(OSError), open(Path(run_dir) / FILE, "a", encoding="utf-8") as file:
        file.write(row_line({"time": now, "kind": kind, "step": step, **details}))
