#!/usr/bin/env python
"""How fast weights are converted, and in how much memory, on this machine.

    python tools/benchmark/convert.py [--rounds 5] [--gigabytes 1.5] [--folder /tmp] [--json FILE]

A LLaMA of random bf16 weights goes from Hugging Face format to a checkpoint for two tensor-parallel ranks
and back. Peers load and save the same file: transformers, safetensors, and a plain copy. All take turns, each
in a process of its own; what was imported before the clock starts does not count, neither as time nor as
memory. All read from the page cache and leave it to the kernel when the disk gets what they wrote. megamm
hashes what it writes and verifies what it reads, the peers do neither. The weights that come back are
compared bit by bit.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import Aim, Result, Table, add_json, load, machine

WEIGHTS = "model.safetensors"
HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 2048, 5632, 32, 4, 32000


# --- what is measured: each prepares itself, and returns what the clock is for ---------------------------


def import_tp2(source: Path, out: Path) -> Callable[[], object]:
    from megamm.config import ParallelConfig
    from megamm.convert import import_checkpoint
    from megamm.engine import checkpoint  # noqa: F401 (imported when needed, which takes a second)

    return lambda: import_checkpoint([source], out, parallel=ParallelConfig(tensor=2))


def export_llama(source: Path, out: Path) -> Callable[[], object]:
    from megamm.convert import export_checkpoint
    from megamm.engine import checkpoint  # noqa: F401

    return lambda: export_checkpoint(source, out, "llama")


def transformers_load_save(source: Path, out: Path) -> Callable[[], object]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model_class = transformers.LlamaForCausalLM
    return lambda: model_class.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(out)


def safetensors_load_save(source: Path, out: Path) -> Callable[[], object]:
    from safetensors.torch import load_file, save_file

    out.mkdir()
    return lambda: save_file(load_file(source / WEIGHTS), out / WEIGHTS)


def raw_copy(source: Path, out: Path) -> Callable[[], object]:
    out.mkdir()
    return lambda: shutil.copyfile(source / WEIGHTS, out / WEIGHTS)


SIDES = {
    side.__name__: side
    for side in (import_tp2, export_llama, transformers_load_save, safetensors_load_save, raw_copy)
}


def measure(side: str, source: Path, out: Path) -> dict[str, float]:
    """Seconds of wall clock and of processors, and bytes of memory above what the process had before."""
    work = SIDES[side](source, out)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, start, cpu = _memory("VmHWM"), time.perf_counter(), time.process_time()
    work()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": seconds, "cpu": cpu, "memory": _memory("VmHWM") - before, "whole": _memory("VmHWM")}


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


# --- the rounds -----------------------------------------------------------------------------------------


def make_llama(out: Path, gigabytes: float) -> None:
    """A random LLaMA of about that size, saved by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layer = HIDDEN * HIDDEN * 2 * (1 + KV_HEADS / HEADS) + 3 * HIDDEN * FFN
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * VOCAB * HIDDEN) / layer))
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
    model.save_pretrained(out, max_shard_size="100GB")


def run_side(side: str, source: Path, out: Path) -> dict[str, float]:
    """`measure` in a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, __file__, "--side", side, str(source), str(out)]
    root = str(Path(__file__).resolve().parents[2])
    env = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def check(source: Path, back: Path) -> None:
    """Raises AssertionError unless the weights came back bit by bit."""
    from safetensors.torch import load_file

    wanted, found = load_file(source / WEIGHTS), load_file(back / WEIGHTS)
    assert wanted.keys() == found.keys()
    for key, tensor in wanted.items():
        assert torch.equal(tensor.view(torch.int16), found[key].view(torch.int16)), key


def run(rounds: int, gigabytes: float, folder: Path) -> Result:
    source = folder / "source"
    make_llama(source, gigabytes)
    size = (source / WEIGHTS).stat().st_size
    outputs = {side: folder / side for side in SIDES}
    results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for turn in range(rounds + 1):  # the first one warms up
        for side in outputs if turn % 2 else sorted(outputs, key=backwards):
            out = outputs[side]
            found = run_side(side, outputs["import_tp2"] if side == "export_llama" else source, out)
            if turn:
                results[side].append(found)
        os.sync()
    check(source, outputs["export_llama"])
    assert filecmp.cmp(source / WEIGHTS, outputs["raw_copy"] / WEIGHTS, shallow=False)
    largest = 2 * VOCAB * HIDDEN
    setting = (
        f"{size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, median of {rounds} turns; load {load()}"
    )
    columns = ["side", "GB/s", "seconds", "of processors", "peak memory"]
    result = Result(f"{machine()}; {setting}", [Table("", columns)])
    rates, memories = {}, {}
    for side, rows in results.items():
        seconds = statistics.median(row["seconds"] for row in rows)
        cpu = statistics.median(row["cpu"] for row in rows)
        rates[side], memories[side] = size / seconds / 1e9, max(row["memory"] for row in rows)
        memory = f"+{memories[side] / 1e6:.0f} MB"
        result.tables[0].add(side, f"{rates[side]:.2f}", f"{seconds:.2f}", f"{cpu:.2f}", memory)
    ratio, limit = rates["import_tp2"] / rates["transformers_load_save"], 2 * largest + 200_000_000
    found = f"{rates['import_tp2']:.2f} GB/s, {ratio:.2f} times; +{memories['import_tp2'] / 1e6:.0f} MB"
    peers = f"transformers {rates['transformers_load_save']:.2f} GB/s, copy {rates['raw_copy']:.2f}"
    target = f">= 3 times transformers; <= {limit / 1e6:.0f} MB"
    met = ratio >= 3 and memories["import_tp2"] <= limit
    result.aims.append(Aim("HF -> TP2 conversion, bf16", target, found, peers, met))
    return result


def backwards(side: str) -> int:
    """The other order; an export still comes behind the import whose checkpoint it reads."""
    order = ["raw_copy", "safetensors_load_save", "transformers_load_save", "import_tp2", "export_llama"]
    return order.index(side)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (median)")
    parser.add_argument("--gigabytes", type=float, default=1.5, help="of weights")
    parser.add_argument(
        "--folder", type=Path, help="where files are written (default: the system's for such)"
    )
    add_json(parser)
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side, source, out = args.side
        print(json.dumps(measure(side, Path(source), Path(out))))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = run(args.rounds, args.gigabytes, Path(folder))
    print(result.text())
    result.write(args.json)


if __name__ == "__main__":
    main()
