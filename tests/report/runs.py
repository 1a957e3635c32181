"""Run directories as training leaves them, written in a moment."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megamm.engine.manifest import FileEntry, Manifest, hash_file, step_directory
from tests.data.helpers import encode, picture

EVIL = "<script>alert('x')</script> \u202e\x07 </td></script> & \"quoted\" 中文"


def row(step: int, **changes: Any) -> dict[str, Any]:
    """A row of metrics.jsonl."""
    return {
        "step": step,
        "consumed_samples": 16 * step,
        "loss": 2.0 + 4.0 * math.exp(-step / 50),
        "lr": 1e-5,
        "grad_norm": 0.5,
        "num_tokens": 1000,
        "num_images": 3,
        "seconds": 2.0,
        "data_wait": 0.1,
        "skipped_samples": 2,
        "skipped_steps": 0,
        "memory": 2**30,
        "num_padding": 10,
        "tokens_per_s": 500.0,
        "tflops_per_device": 300.0,
        "mfu": 0.4,
        "hfu": 0.5,
    } | changes


def write_rows(path: Path, rows: list[dict[str, Any]], end: str = "") -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)


def start(step: int, world_size: int = 8, **changes: Any) -> dict[str, Any]:
    """An entry of environment.json."""
    return {
        "time": "2026-01-02T03:04:05Z",
        "step": step,
        "world_size": world_size,
        "hosts": {EVIL: world_size},
        "devices": {"NVIDIA H100 80GB HBM3": world_size},
        "command": ["python", "-m", "megamm", "train", EVIL],
        "git": {"revision": "0123456789abcdef" * 2, "dirty": True},
        "versions": {"megamm": "9.9", "torch": "2.9.1"},
        "variables": {"SLURM_JOB_ID": "4711", "NCCL_DEBUG": EVIL},
    } | changes


def write_checkpoint(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / step_directory(step)
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(3 << 20))
    files: dict[str, FileEntry] = {"weights": hash_file(folder / "weights")}
    manifest = Manifest(step, 16 * step, {"tensor": 2, "data": 4}, "0" * 64, True, files)
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def write_panels(run: Path, step: int, panels: list[dict[str, Any]]) -> Path:
    folder = run / "samples" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    for number, name in enumerate(name for panel in panels for name in panel["images"]):
        if "/" not in name:
            (folder / name).write_bytes(encode(picture(number, 300, 200), "JPEG"))
    (folder / "samples.json").write_text(json.dumps(panels))
    return folder


def write_run(run: Path, steps: int = 300, total: int = 300) -> Path:
    """A run with everything in it, resumed at step 100."""
    run.mkdir()
    (run / "recipe.yaml").write_text(
        json.dumps({"name": EVIL, "stage": "instruct", "training": {"steps": total, "freeze": ["vision"]}})
    )
    write_rows(run / "metrics.jsonl", [row(step) for step in range(1, steps + 1)])
    losses = [
        {"step": step, "validation_loss": 3.0 - step / 1000, "seconds": 1.0} for step in (100, 200, 300)
    ]
    write_rows(run / "validation.jsonl", losses)
    (run / "environment.json").write_text(json.dumps([start(0, 4), start(100, versions={"torch": "2.10"})]))
    bad = {"source": EVIL, "key": "a.png", "reason": "cannot be decoded"}
    write_rows(run / "quarantine.jsonl", [bad | {"key": f"{n}.png"} for n in range(60)])
    told = [
        {"time": "2026-01-02T03:04:05Z", "kind": "slow_rank", "sentence": f"{n}: {EVIL}"} for n in range(51)
    ]
    write_rows(run / "incidents.jsonl", told)
    lines = ["step   1/300 | 16 samples | loss 6", f"warning: {EVIL}", "resumed at step 100", "saved it"]
    (run / "log.txt").write_text("".join(f"2026-01-02T03:04:05Z {line}\n" for line in lines))
    write_checkpoint(run, 200)
    write_checkpoint(run, 300)
    for step in (100, 200):
        panel = {"question": EVIL, "answer": "A house.", "prediction": f"said at {step}"}
        write_panels(run, step, [panel | {"images": [f"{step}.jpg"]}, panel | {"images": []}])
    return run
