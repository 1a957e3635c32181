#!/usr/bin/env python
"""How fast samples are read, assembled and packed on this machine, against other loaders of tokens.

    python tools/benchmark/data.py [--only documents,samples,packing,images] [--rounds 9]
                                   [--documents 200000] [--folder /tmp] [--out table.md]
                                   [--json FILE]

documents: token sequences at random places of one file, against megatron-core's IndexedDataset and, where it
    is installed, Hugging Face datasets.
samples: rows of 2048 positions with labels, against megatron-core's GPTDataset over the same file.
packing: the share of positions that hold a sample.
images: tools/benchmark/images.py.

All sides read the same files from the page cache, take turns in one process on one core, and must give the
same ids. Times are those of the processor, so that waiting for a core does not count, medians over the turns.
The limit is a plain copy of the bytes that a side has to write, from memory to memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from common import Aim, Result, Table, add_json, load, machine
from step_sizes import text_lengths

from megamm.batch import Batch
from megamm.data.assemble import Assembler
from megamm.data.token_file import TokenFile
from megamm.ops import extension_status
from megamm.ops.crc32 import Part, crc32_rows
from megamm.ops.documents import Stretches, as_tensor, gather_documents

Sides = dict[str, Callable[[], object]]
Found = tuple[list[Table], list[Aim]]
VOCAB, LENGTH, SECONDS_PER_TURN = 32000, 2048, 0.1
ROWS_AT_ONCE, DOCUMENTS_AT_ONCE = 8, 1024
OURS, COPY, MCORE = "megamm", "plain copy", "megatron-core"


# --- clocks and tables ----------------------------------------------------------------------------------


def take_turns(sides: Sides, rounds: int) -> dict[str, float]:
    """Median over the rounds of the seconds of one call of each side; each begins a round in its turn."""
    counts = {}
    for name, side in sides.items():
        side()
        started = time.process_time()
        side()
        counts[name] = max(1, int(SECONDS_PER_TURN / max(time.process_time() - started, 1e-7)))
    found: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started = time.process_time()
            for _ in range(counts[name]):
                sides[name]()
            found[name].append((time.process_time() - started) / counts[name])
    return {name: statistics.median(times) for name, times in found.items()}


def table(title: str, unit: str, seconds: dict[str, float], per_call: int, peer: str) -> Table:
    """Microseconds and number per second of one `unit`, times as fast as the peer, share of the copy."""
    columns = ["side", f"us per {unit}", "per second", f"{peer} / side", "% of the copy's speed"]
    found = Table(title, columns)
    for name, time_of in seconds.items():
        each = time_of / per_call
        ratio, copy = seconds[peer] / time_of, 100 * seconds[COPY] / time_of
        found.add(name, f"{each * 1e6:.2f}", f"{1 / each:,.0f}", f"{ratio:.2f}", f"{copy:.0f}")
    return found


def copy_of(*shape_and_dtype: object) -> Callable[[], object]:
    """A plain copy into memory that is used again."""
    source = np.ones(*shape_and_dtype)  # type: ignore[call-overload]
    target = np.ones_like(source)
    return lambda: np.copyto(target, source)


# --- documents ------------------------------------------------------------------------------------------


def write_documents(folder: Path, lengths: np.ndarray) -> Path:
    """Random sequences of these lengths, written by megatron-core; the path without .bin and .idx."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = folder / f"documents{len(lengths)}x{lengths[0]}"
    draw = np.random.default_rng(len(lengths))
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in lengths.tolist():
        builder.add_document(draw.integers(0, VOCAB, length), [length])
    builder.finalize(f"{prefix}.idx")
    return prefix


def open_ours(prefix: Path) -> tuple[TokenFile, Stretches, torch.Tensor]:
    """(the file, all of its documents with everything learnt, checksums of ids and mask)."""
    file = TokenFile(prefix.with_suffix(".bin"), prefix.with_suffix(".idx"))
    spans = [torch.from_numpy(x) for x in file.spans(np.arange(len(file)))]
    learnt = torch.ones(len(file.tokens), dtype=torch.uint8)
    everything = Stretches(as_tensor(file.tokens), learnt, *spans)
    return file, everything, checksums(everything, torch.arange(len(file)))


def checksums(samples: Stretches, rows: torch.Tensor) -> torch.Tensor:
    parts = [Part(array, samples.starts, samples.ends) for array in samples[:2]]
    return crc32_rows(parts, rows)


def documents(folder: Path, rounds: int, count: int) -> Found:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    draw = np.random.default_rng(0)
    prefix = write_documents(folder, text_lengths(draw, count))
    peer = IndexedDataset(str(prefix))
    file, everything, sums = open_ours(prefix)
    rows = np.stack([draw.choice(count, DOCUMENTS_AT_ONCE, replace=False) for _ in range(64)])
    turn = {"next": 0}

    def next_rows() -> np.ndarray:
        turn["next"] = (turn["next"] + 1) % len(rows)
        return rows[turn["next"]]

    def views() -> list[np.ndarray]:
        return [peer[row] for row in next_rows().tolist()]

    def read(wanted: np.ndarray) -> Stretches:
        starts, ends = file.spans(wanted)
        return everything._replace(starts=torch.from_numpy(starts), ends=torch.from_numpy(ends))

    def batched(wanted: np.ndarray) -> torch.Tensor:
        found = read(wanted)
        return gather_documents(found.tokens, found.starts, found.ends)[0]

    def verified(wanted: np.ndarray) -> torch.Tensor:
        numbers = torch.from_numpy(wanted)
        assert torch.equal(checksums(read(wanted), numbers), sums[numbers])
        return batched(wanted)

    for wanted in rows:
        ids = np.concatenate([peer[row] for row in wanted.tolist()])
        assert np.array_equal(batched(wanted).numpy(), ids) and np.array_equal(verified(wanted).numpy(), ids)
        assert np.array_equal(np.concatenate([file[row] for row in wanted.tolist()]), ids)
    size = int(np.mean([len(batched(wanted)) for wanted in rows]))
    sides: Sides = {
        f"{MCORE} IndexedDataset": lambda: np.concatenate(views()),
        f"{MCORE} IndexedDataset, views that nobody reads": views,
        f"{OURS}, batched": lambda: batched(next_rows()),
        f"{OURS}, batched, checksums of ids and mask verified": lambda: verified(next_rows()),
        f"{OURS}, one by one": lambda: np.concatenate([file[row] for row in next_rows().tolist()]),
        COPY: copy_of(size, np.uint16),
    }
    if importlib.util.find_spec("datasets") is not None:
        sides["Hugging Face datasets"] = hugging_face(peer, next_rows)
    title = (
        f"Documents: {count:,} of {size / DOCUMENTS_AT_ONCE:.0f} tokens on average, {DOCUMENTS_AT_ONCE} "
        "random ones per call, their ids in one array"
    )
    seconds, peer = take_turns(sides, rounds), f"{MCORE} IndexedDataset"
    rate = {name: DOCUMENTS_AT_ONCE / seconds[name] for name in (peer, f"{OURS}, batched")}
    ratio = seconds[peer] / seconds[f"{OURS}, batched"]
    aim = Aim(
        "random document read, batched",
        ">= 5 times megatron-core",
        f"{rate[f'{OURS}, batched'] / 1e6:.2f} M/s, {ratio:.1f} times",
        f"{peer} {rate[peer] / 1e6:.2f} M/s",
        ratio >= 5,
    )
    return [table(title, "document", seconds, DOCUMENTS_AT_ONCE, peer)], [aim]


def hugging_face(peer: object, next_rows: Callable[[], np.ndarray]) -> Callable[[], object]:
    """The same documents in a memory-mapped Arrow table."""
    import datasets

    ids = [peer[row] for row in range(len(peer))]  # type: ignore[index, arg-type]
    found = datasets.Dataset.from_dict({"ids": ids}).with_format("numpy")
    assert np.array_equal(found[5]["ids"], ids[5])
    return lambda: np.concatenate(found[next_rows()]["ids"])


# --- samples --------------------------------------------------------------------------------------------


def samples(folder: Path, rounds: int, count: int) -> Found:
    tables, aims = [], []
    for per_row in (1, 4):
        found, seconds = samples_of(folder, rounds, count // 4, per_row)
        tables.append(found)
        ours, peer = (1e6 * seconds[name] / ROWS_AT_ONCE for name in (OURS, f"{MCORE} GPTDataset"))
        if per_row == 1:
            name = f"training sample of {LENGTH}, assembled"
            aims.append(
                Aim(name, "<= 10 us", f"{ours:.1f} us", f"{MCORE} GPTDataset {peer:.1f} us", ours <= 10)
            )
    return tables, aims


def samples_of(folder: Path, rounds: int, count: int, per_row: int) -> tuple[Table, dict[str, float]]:
    """Rows of documents that fill them exactly, so that both sides give the same rows; seconds of a call."""
    prefix = write_documents(folder, np.full(count, LENGTH // per_row))
    peer = gpt_dataset(prefix, count)
    file, everything, sums = open_ours(prefix)
    assembler = Assembler(576, VOCAB, 0)
    order = np.random.default_rng(1).permutation(len(peer))
    turn = {"next": 0}

    def next_rows() -> list[int]:
        turn["next"] = (turn["next"] + ROWS_AT_ONCE) % (len(order) - ROWS_AT_ONCE)
        return order[turn["next"] : turn["next"] + ROWS_AT_ONCE].tolist()

    def documents_of(row: int) -> np.ndarray:
        """The peer goes through the documents in an order of its own."""
        first = per_row * int(peer.shuffle_index[row])
        return peer.document_index[first : first + per_row]

    def ours(wanted: np.ndarray, packed: bool, verify: bool = False) -> Batch:
        starts, ends = (torch.from_numpy(x) for x in file.spans(wanted))
        found = everything._replace(starts=starts, ends=ends)
        if verify:
            numbers = torch.from_numpy(wanted)
            assert torch.equal(checksums(found, numbers), sums[numbers])
        cut = assembler.documents(found, [LENGTH] * len(wanted), [8] * len(wanted))
        length = LENGTH * (len(wanted) // per_row if packed else 1)
        return assembler.batch(cut, length, packed, [], 1, wanted, 0)

    for row in order[:200].tolist():
        check_row(peer[row], ours(documents_of(row).astype(np.int64), packed=per_row > 1), per_row)
    ready = [
        np.concatenate([documents_of(row) for row in order[at : at + ROWS_AT_ONCE].tolist()]).astype(np.int64)
        for at in range(0, len(order) - ROWS_AT_ONCE, ROWS_AT_ONCE)
    ]

    def next_documents() -> np.ndarray:
        turn["next"] = (turn["next"] + ROWS_AT_ONCE) % (len(order) - ROWS_AT_ONCE)
        return ready[turn["next"] // ROWS_AT_ONCE]

    packed = per_row > 1
    sides: Sides = {
        f"{MCORE} GPTDataset": lambda: [peer[row] for row in next_rows()],
        f"{MCORE} GPTDataset, collated": lambda: torch.utils.data.default_collate(
            [peer[row] for row in next_rows()]
        ),
        OURS: lambda: ours(next_documents(), packed),
        f"{OURS}, checksums verified": lambda: ours(next_documents(), packed, verify=True),
        COPY: copy_of((ROWS_AT_ONCE, 3, LENGTH), np.int64),
    }
    many = "one document each" if per_row == 1 else f"{per_row} documents each"
    title = (
        f"Samples: rows of {LENGTH} positions, {many}, {ROWS_AT_ONCE} rows per call; ids, labels, positions"
    )
    seconds = take_turns(sides, rounds)
    return table(title, "row", seconds, ROWS_AT_ONCE, f"{MCORE} GPTDataset"), seconds


def check_row(wanted: dict[str, torch.Tensor], found: Batch, per_row: int) -> None:
    """The same ids; the same labels, but that of the last position of a document, which predicts the next one
    with megatron-core and nothing with megamm; positions count from the start of each document."""
    inside = torch.arange(LENGTH) % (LENGTH // per_row) != LENGTH // per_row - 1
    assert torch.equal(found.input_ids[0], wanted["tokens"])
    assert torch.equal(found.labels[0][inside], wanted["labels"][inside])
    assert (found.labels[0][~inside] < 0).all() and found.num_padding == 0
    assert torch.equal(found.position_ids[0], wanted["position_ids"] % (LENGTH // per_row))


def gpt_dataset(prefix: Path, count: int) -> object:
    """megatron-core's, with what costs time switched off: no attention mask, positions never reset."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    tokenizer = SimpleNamespace(vocab_size=VOCAB, eod=VOCAB, eos=VOCAB, pad=-1, unique_identifiers={})
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=LENGTH,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(prefix.parent / "cache"),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = IndexedDataset(str(prefix))
    return GPTDataset(indexed, str(prefix), np.arange(count, dtype=np.int32), None, Split.train, config)


# --- all ------------------------------------------------------------------------------------------------


def packing(_folder: Path, _rounds: int, _count: int) -> Found:
    """What tools/benchmark/packing.py finds."""
    import packing as benchmark

    table, aim = benchmark.measure()
    return [table], [aim]


def images(folder: Path, rounds: int, _count: int) -> Found:
    """What tools/benchmark/images.py finds."""
    import images as benchmark

    table, aims = benchmark.measure_all(folder, rounds)
    return [table], aims


PARTS = {part.__name__: part for part in (documents, samples, packing, images)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="parts, separated by commas")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side (median)")
    parser.add_argument("--documents", type=int, default=200_000, help="in the file that is read")
    parser.add_argument("--folder", type=Path, help="where files are written (default: the system's)")
    parser.add_argument("--out", type=Path, help="the tables go there as well")
    add_json(parser)
    args = parser.parse_args()
    chosen = args.only.split(",") if args.only else list(PARTS)
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"--only: {', '.join(unknown)} is unknown; there are {', '.join(PARTS)}")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    result = Result(f"{machine()}; median of {args.rounds}; load {load()}; {extension_status()}")
    print(result.setting, flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name in chosen:
            # pictures are decoded by as many threads as there are cores
            os.sched_setaffinity(0, cores if name == "images" else cores[-1:])
            tables, aims = PARTS[name](Path(folder), args.rounds, args.documents)
            print("\n".join(table.markdown() for table in tables), flush=True)
            result.tables += tables
            result.aims += aims
    if args.out:
        args.out.write_text(result.text())
    result.write(args.json)


if __name__ == "__main__":
    main()
