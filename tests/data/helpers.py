"""Small pictures, conversations and recipes, made on the spot."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megamm.config import Recipe
from megamm.data.prepare import PrepareReport, prepare
from megamm.recipe import recipe_from_dict

IMAGE_SIZE = 28
VOCAB_SIZE = 420


def encode(image: Image.Image, fmt: str = "PNG", **options: Any) -> bytes:
    """The encoded bytes of an image."""
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """A smooth random picture (noise would be all the difference that two decoders can show)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def entry(key: int, images: list[str] | str | None, question: str, answer: str) -> dict[str, Any]:
    """A LLaVA entry of one question and one answer; placeholders go in front."""
    names = [images] if isinstance(images, str) else images or []
    found: dict[str, Any] = {"id": f"id{key}"}
    if images is not None:
        found["image"] = images
    found["conversations"] = [
        {"from": "human", "value": "<image>\n" * len(names) + question},
        {"from": "gpt", "value": answer},
    ]
    return found


def write_images(folder: Path, count: int) -> list[str]:
    """`count` pictures in `folder`, JPEG and PNG in turn; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for i in range(count):
        fmt, suffix = (("JPEG", "jpg"), ("PNG", "png"))[i % 2]
        names.append(f"{i}.{suffix}")
        (folder / names[-1]).write_bytes(encode(picture(i, 30 + i, 40), fmt))
    return names


def write_tar(path: Path, folder: Path) -> Path:
    """All files of `folder` in an uncompressed tar."""
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)
    return path


def write_source(path: Path, entries: list[Any]) -> Path:
    """A LLaVA JSON file."""
    path.write_text(json.dumps(entries))
    return path


def conversations(names: list[str], count: int) -> list[dict[str, Any]]:
    """Entries with one image, two images and none, in turn."""
    images: list[Any] = []
    for i in range(count):
        one, two = names[i % len(names)], names[(i + 1) % len(names)]
        images.append((one, [one, two], None)[i % 3])
    return [entry(i, use, f"What is it, number {i}?", f"It is thing {i}.") for i, use in enumerate(images)]


def varied(root: Path, count: int, images: Path, tokenizer: Path) -> Path:
    """A dataset of `count` samples with no to three images and one to forty words."""
    names, draw = sorted(path.name for path in images.iterdir()), np.random.default_rng(count)
    entries = []
    for i in range(count):
        use = draw.choice(names, draw.integers(0, 4)).tolist()
        entries.append(entry(i, use or None, f"Number {i}?", "It is a thing. " * int(draw.integers(1, 11))))
    return prepared(root, entries, tokenizer, [images]).out


def use_chunks(entries: int, set_attribute: Callable[[Any, str, int], None] = setattr) -> None:
    """Let sources be cut into chunks of so few entries, in this process."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("megamm.data.formats.", "megamm.data.json_entries")):
            for constant in {"CHUNK_ENTRIES", "BLOCK_ENTRIES"} & set(vars(module)):
                set_attribute(module, constant, entries)


def prepared(
    root: Path, entries: list[Any], tokenizer: Path, images: list[Path], out: str = "out", **options: Any
) -> PrepareReport:
    """`prepare` with the usual options."""
    root.mkdir(parents=True, exist_ok=True)
    arguments = {"template": "vicuna", "workers": 1} | options
    return prepare(
        [write_source(root / "source.json", entries)], "llava", root / out, tokenizer, images, **arguments
    )


def recipe(dataset: Path, tokenizer: Path, **data: Any) -> Recipe:
    """A tiny merged model over `dataset`; `data` overrides keys of data."""
    return recipe_from_dict(
        {
            "name": "test",
            "run_dir": "unused",
            "tokenizer": str(tokenizer),
            "seed": 5,
            "model": {
                "language": {
                    "num_layers": 1,
                    "hidden_size": 8,
                    "num_heads": 2,
                    "ffn_hidden_size": 16,
                    "vocab_size": VOCAB_SIZE,
                },
                "vision": {
                    "image_size": IMAGE_SIZE,
                    "patch_size": 14,
                    "width": 8,
                    "num_layers": 2,
                    "num_heads": 2,
                    "mlp_width": 16,
                },
            },
            "data": {"train": str(dataset), "sequence_length": 128, "image": {"loader": "pillow"}} | data,
            "training": {"steps": 4, "global_batch_size": 8, "micro_batch_size": 2},
        }
    )
