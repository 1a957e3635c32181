#!/usr/bin/env python
"""The time of a training step on the CPU against transformers and plain PyTorch, on the same weights and
batches.

    python tools/benchmark/step.py [--sizes tiny 100m] [--cases alignment finetuning flamingo frozen]
                                   [--precision bf16] [--rounds 5] [--threads 2] [--json FILE]

alignment: LLaVA's first stage: the projector is trained, encoder and language model are frozen. An image of
    576 positions and a caption of a fifth of all positions, which carries the loss; vocabulary of 32,000.
    Peers: transformers' LlavaForConditionalGeneration, given the labels and trained with torch.optim.AdamW,
    and the same with the output layer at positions with loss alone.
finetuning: LLaVA's second stage, encoder frozen, on samples with the proportions of its 665k conversations
    (an image of 144 positions, texts a quarter as long): megamm packs them, transformers pads them to the
    longest. Counted are positions of samples, not padding.
flamingo: gated cross-attention before every second layer and a resampler are trained, the rest is frozen;
    the peer is plain PyTorch with a dense mask over all media (`plain_flamingo.py`). Once on rows of equal
    length, once packed against padded.
frozen: what knowing the frozen parts saves, and what the output layer at positions with loss alone saves
    (`frozen_parts.py`).

A step is forward, backward, clipping and update. The sides take turns, the first round warms up, every
second round goes in the other order; times are medians. Loss and one trained gradient of every peer must be
ours. Sizes: tiny (8 M and an encoder), 100m, 1b (needs 16 GB), smoke (for the tests)."""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from common import Aim, Result, Table, load, machine, milliseconds, parser_of
from step_cases import OURS, Comparison, flamingo, llava_alignment, llava_finetuning
from step_sizes import SIZES

from megamm.engine import groups

TARGET = 2.5  # times transformers, in PERFORMANCE.md
COLUMNS = ["side", "ms per step", "positions/s", "side / megamm"]


def alignment(args: argparse.Namespace, size: str, folder: Path) -> list[Comparison]:
    return [llava_alignment(size, args.precision, args.rounds, folder)]


def finetuning(args: argparse.Namespace, size: str, folder: Path) -> list[Comparison]:
    return [llava_finetuning(size, args.precision, args.rounds, folder)]


def flamingos(args: argparse.Namespace, size: str, folder: Path) -> list[Comparison]:
    return [flamingo(size, args.precision, args.rounds, packed) for packed in (False, True)]


CASES: dict[str, Callable[[argparse.Namespace, str, Path], list[Comparison]]] = {
    "alignment": alignment,
    "finetuning": finetuning,
    "flamingo": flamingos,
}
FROZEN = "frozen"  # measured once, at its own sizes


def table_of(found: Comparison) -> Table:
    """Sides, ours first."""
    table = Table(
        found.what,
        COLUMNS,
        note=f"{found.parameters / 1e6:.1f} M parameters; a gradient of the peer's departs by "
        f"{found.departure:.1e}.",
    )
    for side, seconds in found.seconds.items():
        rate = found.positions / seconds
        table.add(side, milliseconds(seconds).removesuffix(" ms"), f"{rate:,.0f}", f"{found.ratio(side):.2f}")
    return table


def aim_of(found: Comparison) -> Aim:
    """The target of the alignment stage."""
    peers = {side: seconds for side, seconds in found.seconds.items() if side != OURS}
    ratio = found.ratio("transformers")
    return Aim(
        "tiny LLaVA, language model frozen, bf16 step",
        f">= {TARGET} times transformers",
        f"{milliseconds(found.seconds[OURS])}, {ratio:.2f} times",
        ", ".join(f"{side} {milliseconds(seconds)}" for side, seconds in peers.items()),
        ratio >= TARGET,
    )


def measure(args: argparse.Namespace) -> Result:
    """All cases that are asked for."""
    torch.set_num_threads(args.threads)
    result = Result(f"{machine()}; {args.precision}, median of {args.rounds}; load {load()}")
    for size in args.sizes:
        for case in args.cases:
            if case == FROZEN:
                continue
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                for found in CASES[case](args, size, Path(folder)):
                    result.tables.append(table_of(found))
                    print(result.tables[-1].markdown(), flush=True)
                    if case == "alignment" and size == "tiny" and args.precision == "bf16":
                        result.aims.append(aim_of(found))
            groups.shutdown()
    if FROZEN in args.cases:
        import frozen_parts

        result.tables.append(frozen_parts.table_of(frozen_parts.one_process(args.rounds)))
    return result


def main() -> None:
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "100m"], choices=list(SIZES))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=[*CASES, FROZEN])
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where models are written (default: the system's)")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    measure(args).write(args.json)


if __name__ == "__main__":
    main()
