#!/usr/bin/env python
"""How fast JPEG files become tensors that a vision encoder takes, on this machine.

    python tools/benchmark/images.py [--rounds 3] [--images 256] [--seconds 5] [--folder /tmp]

The same synthetic photographs (640 x 480, smooth with fine structure, quality 85 to 95) go in, float batches
of 32 come out: shorter edge to 224 (bicubic, antialiased), centre crop, CLIP's normalisation. Contenders take
turns, each in a process of its own on the same two cores; the clock starts when the first batches are out,
and what they deliver is compared with Pillow picture by picture. webdataset is measured where it is
installed; --only measures those that are named.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Aim, Result, Table, add_json, load, machine
from PIL import Image

SIZE, BATCH, SHARDS, CORES = 224, 32, 4, 2
WARM_UP = 4  # batches that are out before the clock starts
TOLERANCE = 2.0  # of 255 levels, on average over a picture and over all pictures
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
Batches = Iterator[tuple[list[int], torch.Tensor]]  # numbers of the pictures, [n, 3, SIZE, SIZE] float32


# --- what goes in -----------------------------------------------------------------------------------------


def photograph(number: int) -> bytes:
    draw, pixels = np.random.default_rng(number), np.zeros((480, 640, 3), np.float32)
    for cells, strength in ((4, 0.55), (16, 0.25), (60, 0.12), (240, 0.08)):
        coarse = draw.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
        pixels += strength * np.asarray(smooth, np.float32)
    pixels += draw.normal(0, 3, pixels.shape)
    stream = io.BytesIO()
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    image.save(stream, "JPEG", quality=(85, 90, 95)[number % 3])
    return stream.getvalue()


def write_pictures(folder: Path, count: int) -> None:
    """One file each, tars of the same (as webdataset reads them), and a dataset that points into the tars."""
    from megamm.data.prepare import prepare
    from megamm.data.tokenizer import train_tokenizer

    (folder / "files").mkdir()
    for number in range(count):
        (folder / "files" / f"{number:06d}.jpg").write_bytes(photograph(number))
    tars = [folder / f"shard{shard}.tar" for shard in range(SHARDS)]
    for shard, path in enumerate(tars):
        with tarfile.open(path, "w") as tar:
            for number in range(shard, count, SHARDS):
                tar.add(folder / "files" / f"{number:06d}.jpg", f"{number:06d}.jpg")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    entries = [{"id": str(n), "image": f"{n:06d}.jpg", "conversations": turns} for n in range(count)]
    (folder / "source.json").write_text(json.dumps(entries))
    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:?!'"
    texts = [f"{a}{b} {b}{a}" for a in alphabet for b in alphabet]
    train_tokenizer(texts, folder / "tokenizer", 420)
    prepare(
        [folder / "source.json"],
        "llava",
        folder / "dataset",
        folder / "tokenizer",
        tars,
        template="vicuna",
        workers=1,
    )


def reference(data: bytes) -> torch.Tensor:
    """By Pillow, as most training scripts have it."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    short = min(image.size)
    width, height = (int(SIZE * edge / short) for edge in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + SIZE, top + SIZE))))
    tensor = pixels.permute(2, 0, 1).contiguous().float().div_(255)
    return tensor.sub_(torch.from_numpy(MEAN)[:, None, None]).div_(torch.from_numpy(STD)[:, None, None])


# --- who takes part: each yields batches without end ------------------------------------------------------


class _Files(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, folder: Path):
        self.paths = sorted((folder / "files").iterdir())

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        number = index % len(self.paths)
        return number, reference(self.paths[number].read_bytes())


def pillow_dataloader(folder: Path) -> Batches:
    for numbers, images in torch.utils.data.DataLoader(_Files(folder), BATCH, num_workers=CORES):
        yield numbers.tolist(), images


def _decode_member(member: dict[str, Any]) -> tuple[int, torch.Tensor]:
    return int(member["__key__"]), reference(member["jpg"])


def webdataset(folder: Path, workers: int) -> Batches:
    os.environ["WDS_SECURE"] = "1"
    import webdataset as wds

    tars = [str(path) for path in sorted(folder.glob("shard*.tar"))]
    dataset = wds.WebDataset(tars, shardshuffle=False, workersplitter=wds.split_by_worker)
    samples = dataset.repeat().map(_decode_member).batched(BATCH)
    for numbers, images in torch.utils.data.DataLoader(samples, batch_size=None, num_workers=workers):
        yield [int(number) for number in numbers], torch.as_tensor(images)


def dali(folder: Path) -> Batches:
    """A pipeline as in DALI's own examples, with the filter and the reader it has for this."""
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(batch_size=BATCH, num_threads=CORES, device_id=None)
    with pipeline:
        encoded, numbers = fn.readers.file(
            files=[str(path) for path in sorted((folder / "files").iterdir())], name="files"
        )
        pixels = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        # Not resize_shorter: it rounds the longer edge up, which moves the picture by half a pixel.
        size = (SIZE, SIZE * 640 // 480)
        pixels = fn.resize(pixels, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
        pixels = fn.crop_mirror_normalize(
            pixels,
            crop=(SIZE, SIZE),
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=(255 * MEAN).tolist(),
            std=(255 * STD).tolist(),
        )
        pipeline.set_outputs(pixels, numbers)
    pipeline.build()
    while True:
        images, numbers = pipeline.run()
        yield np.array(numbers.as_tensor()).ravel().tolist(), torch.from_numpy(np.array(images.as_tensor()))


def megamm(folder: Path, loader: str, workers: int, scaled: bool) -> Batches:
    """The loader of a training run, texts included: what it hands out are whole micro-batches."""
    from megamm.data.loader import BatchLoader
    from megamm.data.tokenizer import Tokenizer
    from megamm.recipe import recipe_from_dict

    image = {"loader": loader, "num_workers": 1 if workers else CORES, "scaled_decode": scaled}
    sizes = {"num_layers": 1, "num_heads": 2}
    recipe = recipe_from_dict(
        {
            "name": "benchmark",
            "run_dir": str(folder),
            "tokenizer": str(folder / "tokenizer"),
            "model": {
                "language": sizes | {"hidden_size": 8, "ffn_hidden_size": 16, "vocab_size": 512},
                "vision": sizes
                | {"num_layers": 2, "image_size": SIZE, "patch_size": 14, "width": 8, "mlp_width": 16},
            },
            "data": {
                "train": str(folder / "dataset"),
                "sequence_length": 512,
                "image": image,
                "workers": workers,
            },
            "training": {"steps": 1, "global_batch_size": BATCH, "micro_batch_size": BATCH},
        }
    )
    with BatchLoader(recipe, Tokenizer.load(folder / "tokenizer"), 0, 0, 1, None) as batches:
        for batch in batches:
            yield batch.sample_ids.tolist(), batch.images


CONTENDERS: dict[str, Callable[[Path], Batches]] = {
    "torch DataLoader + Pillow, 2 workers": pillow_dataloader,
    "webdataset + Pillow, 1 worker": lambda folder: webdataset(folder, 1),
    "webdataset + Pillow, 2 workers": lambda folder: webdataset(folder, 2),
    "DALI, 2 threads": dali,
    "megamm pillow, 2 threads": lambda folder: megamm(folder, "pillow", 0, True),
    "megamm pillow, 2 workers": lambda folder: megamm(folder, "pillow", CORES, True),
    "megamm dali, 2 threads": lambda folder: megamm(folder, "dali", 0, True),
    "megamm dali, 2 workers": lambda folder: megamm(folder, "dali", CORES, True),
    "megamm pillow exact, 2 workers": lambda folder: megamm(folder, "pillow", CORES, False),
    "megamm dali exact, 2 workers": lambda folder: megamm(folder, "dali", CORES, False),
}


# --- measuring --------------------------------------------------------------------------------------------


def measure(name: str, folder: Path, seconds: float) -> dict[str, float]:
    """Images per second, and differences from Pillow in levels of 255: their mean, and that of the worst."""
    batches = CONTENDERS[name](folder)
    first = list(itertools.islice(batches, WARM_UP))
    started, images = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds:
        images += len(next(batches)[0])
    std, differences = 255 * torch.from_numpy(STD)[:, None, None], []
    for numbers, tensors in first:
        assert tensors.shape == (BATCH, 3, SIZE, SIZE) and tensors.dtype == torch.float32
        for number, tensor in zip(numbers, tensors, strict=True):
            wanted = reference((folder / "files" / f"{number:06d}.jpg").read_bytes())
            differences.append(float(((tensor - wanted) * std).abs().mean()))
    found = {
        "images_per_s": images / elapsed,
        "mean_levels": statistics.mean(differences),
        "worst_levels": max(differences),
    }
    assert found["mean_levels"] <= TOLERANCE, f"{name}: {found} differs from Pillow"
    return found


def measure_apart(name: str, folder: Path, seconds: float) -> dict[str, float]:
    """`measure` in a process of its own, one thread per process but for those that are asked for."""
    command = [
        sys.executable,
        __file__,
        "--measure",
        name,
        "--folder",
        str(folder),
        "--seconds",
        str(seconds),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def is_there(name: str) -> bool:
    from importlib.util import find_spec

    needs = (
        "webdataset" if name.startswith("webdataset") else "nvidia.dali" if "dali" in name.lower() else "PIL"
    )
    try:
        return find_spec(needs) is not None
    except ModuleNotFoundError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS))
    add_json(parser)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    torch.set_num_threads(1)
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.folder, arguments.seconds)), flush=True)
        os._exit(0)  # loaders without end are not waited for
    found, aims = measure_all(
        arguments.folder, arguments.rounds, arguments.images, arguments.seconds, arguments.only
    )
    result = Result(f"{machine()}; median of {arguments.rounds}; load {load()}", [found], aims)
    print(result.text())
    result.write(arguments.json)


def measure_all(
    folder: Path,
    rounds: int = 3,
    images: int = 256,
    seconds: float = 5.0,
    contenders: Sequence[str] = tuple(CONTENDERS),
) -> tuple[Table, list[Aim]]:
    """The table and the aim, after `rounds` turns of each contender in processes of their own; every second
    one in the other order."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders if is_there(name)}
    with tempfile.TemporaryDirectory(dir=folder) as made:
        write_pictures(Path(made), images)
        for turn in range(rounds):
            for name in found if turn % 2 == 0 else reversed(found):
                turns = found[name]
                turns.append(measure_apart(name, Path(made), seconds))
                print(f"{name}: {turns[-1]['images_per_s']:.0f} images/s", file=sys.stderr, flush=True)
    speeds = {name: [each["images_per_s"] for each in all_] for name, all_ in found.items()}
    base = statistics.median(next(iter(speeds.values())))
    columns = [f"JPEG 640 x 480 to float CHW {SIZE}", "images/s (from - to)", "ratio"]
    table = Table("", [*columns, "levels off, mean", "worst"])
    for name, turns_of in speeds.items():
        middle, last = statistics.median(turns_of), found[name][-1]
        range_of = f"{middle:.0f} ({min(turns_of):.0f} - {max(turns_of):.0f})"
        levels = f"{last['mean_levels']:.2f}", f"{last['worst_levels']:.2f}"
        table.add(name, range_of, f"{middle / base:.2f}", *levels)
    for name in contenders:
        if name not in found:
            table.add(name, "not installed", "", "", "")
    return table, aims_of({name: statistics.median(each) for name, each in speeds.items()}, found)


def aims_of(speeds: dict[str, float], found: dict[str, list[dict[str, float]]]) -> list[Aim]:
    """Twice torch's DataLoader by the DALI path; nothing where one of them was left out."""
    ours, peer = "megamm dali, 2 workers", "torch DataLoader + Pillow, 2 workers"
    if ours not in speeds or peer not in speeds:
        return []
    ratio, levels = speeds[ours] / speeds[peer], found[ours][-1]["mean_levels"]
    return [
        Aim(
            f"JPEG 640 x 480 to {SIZE} float CHW, DALI path",
            f">= 2 times DataLoader, <= {TOLERANCE:g}/255 off",
            f"{speeds[ours]:.0f} images/s, {ratio:.2f} times, {levels:.2f}/255",
            f"{peer} {speeds[peer]:.0f} images/s",
            ratio >= 2 and levels <= TOLERANCE,
        )
    ]


if __name__ == "__main__":
    main()
