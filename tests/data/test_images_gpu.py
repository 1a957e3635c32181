"""Decoding on a GPU: refused where it cannot be, and the same pictures where it can."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from megamm.config import ImageConfig
from megamm.data import images
from megamm.data.images import make_image_loader
from megamm.errors import InputError
from tests.data.helpers import encode, recipe
from tests.data.test_images_scaled import SIZE, photo

GPU = ImageConfig(decode_device="gpu")


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "num_gpus", lambda: 0)
    with pytest.raises(InputError, match=r"decode_device: gpu was asked for, but torch finds no CUDA device"):
        make_image_loader(GPU, SIZE, training=True)
    for choice in ("auto", "cpu"):
        make_image_loader(ImageConfig(loader="pillow", decode_device=choice), SIZE, training=True)  # type: ignore[arg-type]
    make_image_loader(ImageConfig(loader="pillow", decode_device="gpu"), SIZE, training=False)
    monkeypatch.setattr(images, "num_gpus", lambda: 1)
    monkeypatch.setattr(images, "pick_device", lambda choice: torch.device(choice, 0))
    monkeypatch.setitem(sys.modules, "megamm.data.images_dali", None)
    with pytest.raises(InputError, match=r"decode_device: gpu needs DALI, which does not work here"):
        make_image_loader(GPU, SIZE, training=True)
    for data, message in (
        ({"image": {"decode_device": "gpu", "loader": "pillow"}}, "gpu is DALI's"),
        ({"image": {"decode_device": "gpu"}, "workers": 2}, "data.workers is 2"),
    ):
        with pytest.raises(InputError, match=message):
            recipe(Path("data"), Path("tokenizer"), **data)  # type: ignore[arg-type]


def test_the_graph_for_a_gpu() -> None:
    """As far as DALI goes without one: what is fed lies in main memory, pixels on the GPU."""
    pytest.importorskip("nvidia.dali")
    from megamm.data.images_dali import graph

    for device, wanted in (("cuda", "gpu"), ("cpu", "cpu")):
        pipeline = graph(ImageConfig(), SIZE, torch.device(device))
        pipeline._build_graph()
        lies = {output.name: output.device for op in pipeline._ops for output in op.outputs}
        pixels = [where for name, where in lies.items() if name.startswith("__") and "Subscript" not in name]
        assert pixels == [wanted] * 4
        fed = ("encoded", "start", "shape", "resized", "corner", "flip")
        assert {lies[name] for name in fed} == {"cpu"}


@pytest.mark.gpu
def test_gpu_equals_cpu() -> None:
    """Mean difference of each picture at most 2 of 255 levels; one that DALI leaves to Pillow among them."""
    pytest.importorskip("nvidia.dali")
    pictures = [photo(seed, 300 + 40 * seed, 333) for seed in range(6)]
    data = [encode(one, "JPEG", quality=90) for one in pictures] + [
        encode(pictures[0].convert("CMYK"), "JPEG")
    ]
    keys, config = list(range(len(data))), {"random_crop_scale": 0.4, "random_flip": True}
    on_gpu = make_image_loader(ImageConfig(decode_device="gpu", **config), SIZE, True)  # type: ignore[arg-type]
    on_cpu = make_image_loader(ImageConfig(loader="pillow", scaled_decode=False, **config), SIZE, True)  # type: ignore[arg-type]
    std = torch.tensor(GPU.std)[:, None, None]
    for _again in range(2):
        for a, b in zip(on_gpu.load(data, keys), on_cpu.load(data, keys), strict=True):
            assert isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.is_cuda
            assert ((a.cpu() - b) * std).abs().mean() <= 2 / 255
