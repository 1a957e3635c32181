"""Pillow against transformers, DALI against Pillow, and every image that must be refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megamm.config import ImageConfig
from megamm.data.image_file import load_image
from megamm.data.image_geometry import plan
from megamm.data.images import ImageError, ImageLoader, make_image_loader
from megamm.errors import InputError
from tests.data.bad_images import MAX_PIXELS, unusable, unusual
from tests.data.helpers import encode, picture

SIZE = 112
SETTINGS: list[dict[str, Any]] = [
    {"fit": "crop"},
    {"fit": "pad"},
    {"fit": "squash"},
    {"random_crop_scale": 0.2, "random_flip": True},
    {"fit": "pad", "random_flip": True, "mean": [0.1, 0.5, 0.9], "std": [1.0, 0.5, 0.2]},
]


def loader(name: str, training: bool = False, size: int = SIZE, **config: Any) -> ImageLoader:
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    config = {"loader": name, "scaled_decode": False} | config
    return make_image_loader(ImageConfig(**config), size, training)


def load_one(image_loader: ImageLoader, data: bytes, key: int = 0) -> torch.Tensor | ImageError:
    return image_loader.load([data], [key])[0]


@pytest.fixture(params=["pillow", "dali"])
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return str(request.param)


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    """Two photographs in many sizes, formats, qualities and chroma subsamplings."""
    datasets = pytest.importorskip("sklearn.datasets")
    found = []
    for pixels in datasets.load_sample_images().images:
        photo = Image.fromarray(pixels)
        for width, height in ((500, 333), (112, 112), (113, 240), (90, 40), (20, 20)):
            small = photo.resize((width, height), Image.Resampling.BICUBIC)
            found += [
                encode(small, "JPEG", quality=q, subsampling=s)
                for q, s in ((30, 2), (75, 1), (95, 0), (75, 2))
            ]
            found += [encode(small, "JPEG", progressive=True), encode(small, "PNG")]
            found += [encode(small.convert("L"), "JPEG"), encode(small.convert("L"), "PNG")]
    return found


@pytest.fixture(scope="module")
def odd_pictures() -> dict[str, bytes]:
    return unusual()


@pytest.fixture(scope="module")
def bad_pictures() -> dict[str, bytes]:
    return unusable()


def test_pillow_equals_clip(photos: list[bytes], odd_pictures: dict[str, bytes]) -> None:
    transformers = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    ours = loader("pillow")
    others = ("sixteen bits", "transparent palette")  # clipped there; on white there, dropped here
    odd = [data for kind, data in odd_pictures.items() if kind not in others]
    for data in [*photos[::5], *odd]:
        wanted = processor(Image.open(io.BytesIO(data)), return_tensors="pt")["pixel_values"][0]
        found = load_one(ours, data)
        assert isinstance(found, torch.Tensor) and found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", SETTINGS)
def test_dali_equals_pillow(
    config: dict[str, Any], photos: list[bytes], odd_pictures: dict[str, bytes]
) -> None:
    """Mean difference of each picture at most 2 of 255 levels."""
    pillow, dali = (loader(which, training=True, **config) for which in ("pillow", "dali"))
    data = [*photos, *odd_pictures.values()]
    keys = list(range(len(data)))
    std = torch.tensor(pillow.config.std)[:, None, None]
    ours = 0
    for a, b in zip(pillow.load(data, keys), dali.load(data, keys), strict=True):
        assert isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        assert a.shape == b.shape == (3, SIZE, SIZE) and b.dtype == torch.float32
        assert ((a - b) * std).abs().mean() <= 2 / 255
        ours += not torch.equal(a, b)
    assert ours >= len(photos) // 2  # DALI decoded, not Pillow behind its name
    pillow.close()
    dali.close()


def test_bad_pictures_are_refused(name: str, bad_pictures: dict[str, bytes]) -> None:
    """One by one and among good ones, which keep their values."""
    image_loader = loader(name, max_pixels=MAX_PIXELS, num_workers=2)
    good = [encode(picture(i, 80 + i, 60), ("JPEG", "PNG")[i % 2]) for i in range(4)]
    alone = [load_one(image_loader, data) for data in good]
    mixed = [*good[:2], *bad_pictures.values(), *good[2:]]
    results = image_loader.load(mixed, [0] * len(mixed))
    for kind, result in zip(bad_pictures, results[2:-2], strict=True):
        assert isinstance(result, ImageError), kind
        assert str(result), kind
    for before, after in zip(alone, results[:2] + results[-2:], strict=True):
        assert isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)
        assert torch.equal(before, after)
    for kind in ("bomb", "large"):
        assert "more than" in str(results[2 + list(bad_pictures).index(kind)])
    image_loader.close()


def test_dali_goes_on_after_a_failing_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that pass every check and still fail in DALI cost their batch nothing."""
    pytest.importorskip("nvidia.dali")
    from megamm.data import images_dali

    monkeypatch.setattr(images_dali, "_is_trusted", lambda header, data: True)
    dali, pillow = loader("dali"), loader("pillow")
    jpeg = encode(picture(1, 90, 70), "JPEG")
    cut = bytearray(jpeg)
    cut[jpeg.index(b"\xff\xda") :] = b"\xff\xff\xff\xff"  # a header without a scan
    data = [jpeg, bytes(cut), encode(picture(2), "JPEG"), encode(picture(3).convert("CMYK"), "JPEG")]
    results, wanted = dali.load(data, [0] * 4), pillow.load(data, [0] * 4)
    assert [isinstance(r, ImageError) for r in results] == [False, True, False, False]
    for found, reference in zip(results, wanted, strict=True):
        if isinstance(found, torch.Tensor) and isinstance(reference, torch.Tensor):
            assert (found - reference).abs().mean() < 0.05


def test_more_pictures_than_a_batch_of_dali() -> None:
    data = [encode(picture(i, 20, 20), "JPEG") for i in range(70)]
    dali, pillow = loader("dali", size=28), loader("pillow", size=28)
    for a, b in zip(dali.load(data, [0] * 70), pillow.load(data, [0] * 70), strict=True):
        assert isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        assert (a - b).abs().mean() < 0.05
    assert dali.load([], []) == pillow.load([], []) == []


def test_augmentation_is_a_function_of_the_key(name: str) -> None:
    training = loader(name, training=True, random_crop_scale=0.3, random_flip=True)
    data = encode(picture(1, 200, 150), "JPEG")
    twenty = training.load([data] * 20, list(range(20)))
    backwards = training.load([data] * 20, list(range(20))[::-1])[::-1]
    assert all(torch.equal(a, b) for a, b in zip(twenty, backwards, strict=True))  # type: ignore[arg-type]
    assert len({tensor.sum().item() for tensor in twenty}) == 20  # type: ignore[union-attr]
    evaluation = loader(name, training=False, random_crop_scale=0.3, random_flip=True)
    first, second = evaluation.load([data] * 2, [1, 2])
    assert torch.equal(first, second)  # type: ignore[arg-type]


def test_flips_mirror_half_of_the_pictures() -> None:
    image_loader = loader("pillow", training=True, random_flip=True)
    data = encode(picture(1, 120, 120))
    plain = load_one(loader("pillow"), data)
    assert isinstance(plain, torch.Tensor)
    flips = 0
    for key in range(200):
        found = load_one(image_loader, data, key)
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found, plain) or torch.equal(found, plain.flip(2))
        flips += torch.equal(found, plain.flip(2))
    assert 70 < flips < 130


def test_random_crops_stay_inside_and_are_large_enough() -> None:
    config = ImageConfig(random_crop_scale=0.25)
    areas = []
    for key in range(500):
        (left, top, right, bottom), resized, corner, _ = plan(config, SIZE, True, 300, 200, key)
        assert 0 <= left < right <= 300 and 0 <= top < bottom <= 200
        assert (resized, corner) == ((SIZE, SIZE), (0, 0))
        areas.append((right - left) * (bottom - top) / 60_000)
    assert min(areas) > 0.24 and max(areas) > 0.8 and 0.4 < np.mean(areas) < 0.7


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_fits_spelled_out(fit: str, name: str) -> None:
    """A 3:1 picture, left third red, middle green, right third blue."""
    pixels = np.zeros((40, 120, 3), np.uint8)
    for third in range(3):
        pixels[:, 40 * third : 40 * (third + 1), third] = 255
    image_loader = loader(name, size=42, fit=fit, mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])
    found = load_one(image_loader, encode(Image.fromarray(pixels)))
    assert isinstance(found, torch.Tensor)
    rows = {"crop": "GGG GGG GGG", "squash": "RGB RGB RGB", "pad": "... RGB ..."}[fit].split()
    colours = {"R": [1, -1, -1], "G": [-1, 1, -1], "B": [-1, -1, 1], ".": [0, 0, 0]}
    for row, letters in zip((7, 21, 35), rows, strict=True):
        for column, letter in zip((7, 21, 35), letters, strict=True):
            wanted = torch.tensor(colours[letter], dtype=torch.float32)
            torch.testing.assert_close(found[:, row, column], wanted, rtol=0, atol=0.02)


def test_sixteen_bits_are_scaled(odd_pictures: dict[str, bytes], name: str) -> None:
    found = load_one(loader(name, mean=[0, 0, 0], std=[1, 1, 1]), odd_pictures["sixteen bits"])
    assert isinstance(found, torch.Tensor)
    assert 0.4 < found.mean() < 0.6 and found.std() > 0.05


def test_the_choice_of_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loader("pillow").name == "pillow"
    assert loader("dali").name == "dali"
    assert loader("auto").name == "dali"
    from megamm.data import images_dali

    def fail(*_: object) -> None:
        raise RuntimeError("no libfoo.so\nsecond line")

    monkeypatch.setattr(images_dali, "_build", fail)
    assert loader("auto").name == "pillow"
    with pytest.raises(
        InputError, match=r"data.image.loader: DALI does not work here \(no libfoo.so\).*choose pillow"
    ):
        loader("dali")


def test_a_file(tmp_path: Path) -> None:
    image_loader = loader("pillow")
    (tmp_path / "a.png").write_bytes(encode(picture(1)))
    assert load_image(tmp_path / "a.png", image_loader).shape == (3, SIZE, SIZE)
    (tmp_path / "b.png").write_bytes(b"none")
    with pytest.raises(InputError, match=r"b.png: is not an image"):
        load_image(tmp_path / "b.png", image_loader)
    with pytest.raises(InputError, match=r"c.png: the image cannot be read"):
        load_image(tmp_path / "c.png", image_loader)
