"""Segments of text and images: the fused operator and its fallback against counting by hand."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import pytest
import torch

from megamm import ops
from megamm.layers.documents import last_image
from megamm.ops.media_segments import media_segments, media_segments_ref

ROOT = Path(__file__).resolve().parents[2]
fused = pytest.mark.skipif(not ops.extension_built(), reason=ops.extension_status())
both = pytest.mark.parametrize("operator", [media_segments, media_segments_ref])
Operator = Callable[[torch.Tensor, int, int], tuple[torch.Tensor, torch.Tensor]]
# rows, positions, images
SHAPES = [
    (1, 1, 1),
    (2, 24, 2),
    (3, 700, 5),
    (1, 5000, 40),
    (4, 16, 9),
    (2, 513, 1),
    (7, 3, 0),
    (2, 0, 3),
    (0, 5, 2),
]


def by_hand(image: torch.Tensor, num_images: int, num_latents: int) -> tuple[list[int], list[int]]:
    """Cumulative lengths, run by run."""
    lengths: list[tuple[int, int]] = []
    for row in image.tolist():
        sizes = [0] * (2 * num_images + 1)
        latest = 0
        for number, run in groupby(n if n <= num_images else 0 for n in row):
            size = len(list(run))
            place = 2 * number - 1 if number else 2 * latest
            assert not sizes[place]
            sizes[place], latest = size, number or latest
        lengths += [(size, num_latents * (place % 2)) for place, size in enumerate(sizes)]
    ends = torch.tensor([(0, 0), *lengths]).cumsum(0)
    return ends[:, 0].tolist(), ends[:, 1].tolist()


def rows_of_images(rows: int, positions: int, images: int) -> torch.Tensor:
    """What last_image gives for packed rows: documents with none or some images."""
    seen = [torch.zeros(0, positions, dtype=torch.int64)]
    if not positions:
        return torch.zeros(rows, 0, dtype=torch.int64)
    for _ in range(rows):
        is_image = torch.zeros(1, positions, dtype=torch.bool)
        places = torch.randperm(positions)[: int(torch.randint(images + 1, ()))]
        is_image[0, places] = True
        starts = torch.rand(positions) < 4 / (positions + 1)
        starts[:1] = True
        ids = torch.arange(positions)
        seen.append(last_image(is_image, (ids - torch.where(starts, ids, 0).cummax(0).values)[None])[0])
    return torch.cat(seen)


def assert_by_hand(operator: Operator, image: torch.Tensor, num_images: int, num_latents: int) -> None:
    found = operator(image, num_images, num_latents)
    wanted = by_hand(image, num_images, num_latents)
    for name, got, want in zip(("cu_seqlens_q", "cu_seqlens_k"), found, wanted, strict=True):
        assert got.dtype == torch.int32 and got.is_contiguous(), name
        assert got.tolist() == want, name


@both
def test_example(operator: Operator) -> None:
    """Three images, of which no position of the second row sees the second; 4 latents each."""
    image = torch.tensor([[0, 1, 1, 2, 0, 0, 3], [1, 1, 1, 1, 0, 3, 3]])
    q, k = operator(image, 3, 4)
    # text, image 1, text, image 2, text, image 3, text
    assert q.tolist() == [0, 1, 3, 3, 4, 6, 7, 7, 7, 11, 12, 12, 12, 14, 14]
    assert k.tolist() == [0, 0, 4, 4, 8, 8, 12, 12, 12, 16, 16, 20, 20, 24, 24]


@both
@pytest.mark.parametrize("shape", SHAPES)
def test_counted_by_hand(operator: Operator, shape: tuple[int, int, int]) -> None:
    rows, positions, images = shape
    for _ in range(5):
        image = rows_of_images(rows, positions, images)
        assert_by_hand(operator, image, images, 3)
        assert_by_hand(operator, image, images + 4, 64)  # padded


@both
def test_images_beyond_the_padding_see_nothing(operator: Operator) -> None:
    image = torch.tensor([[0, 1, 2, 2, 3, 3]])
    assert_by_hand(operator, image, 2, 5)


@both
def test_input_need_not_be_contiguous(operator: Operator) -> None:
    image = rows_of_images(3, 50, 4)
    assert_by_hand(operator, image.t().contiguous().t(), 4, 2)
    assert_by_hand(operator, image.repeat_interleave(2, 1)[:, ::2], 4, 2)


@both
@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_of_a_context_keep_images_in_order(operator: Operator, ranks: int) -> None:
    """A rank has an early and a late chunk, one behind the other: no image is in two runs, for what lay
    between two positions of an image saw the same image."""
    for _ in range(20):
        image = rows_of_images(2, 12 * ranks, 5)
        chunks = image.chunk(2 * ranks, 1)
        for rank in range(ranks):
            assert_by_hand(operator, torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]], 1), 5, 2)


@both
@pytest.mark.parametrize("row", [[1, 2, 1], [2, 1, 1], [1, 0, 1], [0, 3, 3, 0, 0, 2]])
def test_images_out_of_order_are_refused(operator: Operator, row: list[int]) -> None:
    with pytest.raises(ValueError, match="out of order"):
        operator(torch.tensor([[0] * len(row), row]), 3, 2)


@both
def test_bad_arguments_are_refused(operator: Operator) -> None:
    image = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected"):
        operator(image.int(), 1, 1)
    with pytest.raises(ValueError, match="expected"):
        operator(image[0], 1, 1)
    with pytest.raises(ValueError, match="-1 images"):
        operator(image, -1, 1)
    with pytest.raises(ValueError, match="32 bits"):
        operator(image, 1, 2**30)


def test_meta_tensors_have_the_right_shape() -> None:
    found = media_segments(torch.empty(3, 9, dtype=torch.int64, device="meta"), 4, 2)
    assert [(x.shape, x.dtype) for x in found] == [((3 * 9 + 1,), torch.int32)] * 2


@fused
def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.megamm.media_segments.default, (rows_of_images(3, 40, 4), 4, 8))


FALLBACK = """
import importlib.util, torch
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "megamm._C" else find_spec(name, *rest)
from megamm import ops
assert not ops.extension_built(), ops.extension_status()
from megamm.ops.media_segments import media_segments
print([x.tolist() for x in media_segments(torch.tensor([[0, 1, 1, 2]]), 2, 4)])
"""


@fused
def test_fallback_gives_the_same() -> None:
    command = [sys.executable, "-c", FALLBACK]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(
        [x.tolist() for x in media_segments(torch.tensor([[0, 1, 1, 2]]), 2, 4)]
    )


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.timeout(600)
def test_cuda_kernel_compiles(arch: str, tmp_path: Path) -> None:
    """With plain nvcc and no torch header; warnings are errors, and no register is spilled."""
    command = ["nvcc", "-c", "-O3", "-std=c++17", "-Werror", "all-warnings", "-Xptxas", "-v"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "csrc/media_segments/kernel.cu"]
    command += ["-o", str(tmp_path / "media_segments.o")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr)
    assert spills == [("0", "0")], done.stderr


@pytest.mark.gpu
@both
@pytest.mark.parametrize("shape", SHAPES)
def test_cuda_counts_as_the_cpu(operator: Operator, shape: tuple[int, int, int]) -> None:
    rows, positions, images = shape
    for _ in range(5):
        image = rows_of_images(rows, positions, images)
        found = operator(image.cuda(), images, 3)
        assert [x.tolist() for x in found] == [x.tolist() for x in media_segments_ref(image, images, 3)]
