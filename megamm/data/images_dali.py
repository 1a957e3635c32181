"""Images by NVIDIA DALI: the same geometry as Pillow's, decoded and resized in native threads or on the GPU.

DALI decodes JPEG and PNG pictures with three or one 8-bit channels. All others, and every picture that
DALI fails on, are Pillow's, whose verdict counts: so both loaders refuse the same pictures (but for rare
JPEG streams with flipped bits that DALI forgives: 3 of 1500 randomly damaged pictures).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types

from megamm.config import ImageConfig
from megamm.data.image_geometry import Geometry, plan
from megamm.data.image_header import Header, ImageError, read_header
from megamm.data.images import ImageLoader, decoding_device
from megamm.data.images_pillow import PillowLoader, mean_colour

MAX_BATCH = 64


class DaliLoader(ImageLoader):
    """Runs a DALI pipeline of `num_workers` threads, with Pillow for what DALI is not trusted with.

    Attributes:
        device: where it decodes and resizes, and where its tensors lie. On a GPU nothing is decoded small:
            the decoder there ("mixed") cannot.
    """

    name = "dali"

    def __init__(self, config: ImageConfig, image_size: int, training: bool):
        super().__init__(config, image_size, training)
        self._pillow = PillowLoader(config, image_size, training)
        self.device = decoding_device(config, training)
        self.scaled = self._pillow.scaled = self.scaled and self.device.type == "cpu"
        self._lock = threading.Lock()
        self._pipeline: Any = None

    def load(self, data: Sequence[bytes], keys: Sequence[int]) -> list[torch.Tensor | ImageError]:
        results: list[torch.Tensor | ImageError | None] = [None] * len(data)
        ours: list[tuple[int, Geometry]] = []
        for i, (item, key) in enumerate(zip(data, keys, strict=True)):
            try:
                header = read_header(item, self.config.max_pixels)
                geometry = plan(self.config, self.image_size, self.training, header.width, header.height, key)
            except ImageError as error:
                results[i] = error
                continue
            if _is_trusted(header, item) and not (self.scaled and header.format == "JPEG"):
                ours.append((i, geometry))
        for start in range(0, len(ours), MAX_BATCH):
            part = ours[start : start + MAX_BATCH]
            loaded = self._run_or_one_by_one([data[i] for i, _ in part], [g for _, g in part])
            for (i, _), tensor in zip(part, loaded, strict=True):
                results[i] = tensor
        rest = [i for i, result in enumerate(results) if result is None]
        for i, result in zip(
            rest, self._pillow.load([data[i] for i in rest], [keys[i] for i in rest]), strict=True
        ):
            results[i] = result.to(self.device) if isinstance(result, torch.Tensor) else result
        return [result for result in results if result is not None]

    def close(self) -> None:
        self._pillow.close()
        with self._lock:
            self._pipeline = None

    def run(self, data: Sequence[bytes], geometries: Sequence[Geometry]) -> list[torch.Tensor]:
        """One run of the pipeline over at most MAX_BATCH images.

        Raises:
            RuntimeError: DALI's, if any image cannot be decoded.
        """
        with self._lock:
            if self._pipeline is None:
                self._pipeline = _build(self.config, self.image_size, self.device)
            try:
                _feed(self._pipeline, data, geometries, self.image_size)
                (output,) = self._pipeline.run()
            except Exception:
                self._pipeline = None  # a pipeline that failed is not used again
                raise
            # Copied: the pipeline writes the next batch into the same memory.
            if self.device.type == "cpu":
                return list(torch.from_numpy(np.array(output.as_tensor())).unbind())
            from nvidia.dali.plugin.pytorch import feed_ndarray

            copy = torch.empty(len(data), 3, self.image_size, self.image_size, device=self.device)
            feed_ndarray(output.as_tensor(), copy)  # waits for the GPU
            return list(copy.unbind())

    def _run_or_one_by_one(self, data: list[bytes], geometries: list[Geometry]) -> list[torch.Tensor | None]:
        """Tensors, None where DALI fails; one bad image fails a whole run, so then each runs alone."""
        try:
            return [*self.run(data, geometries)]
        except RuntimeError:
            if len(data) == 1:
                return [None]
        return [self._run_or_one_by_one([item], [g])[0] for item, g in zip(data, geometries, strict=True)]


def _is_trusted(header: Header, data: bytes) -> bool:
    """Whether DALI decodes such an image as Pillow does (of other pixel layouts it takes another view), and
    refuses it where Pillow does."""
    if header.mode not in ("RGB", "L"):
        return False
    return header.format == "JPEG" or (header.format == "PNG" and _ends_with_pixels(data))


def _ends_with_pixels(png: bytes) -> bool:
    """Whether nothing but the end mark stands behind the pixels; Pillow also judges what does (texts, which
    may be bombs), DALI does not."""
    pixels = png.rfind(b"IDAT")
    end = pixels + 8 + int.from_bytes(png[max(pixels - 4, 0) : max(pixels, 0)], "big")
    return png[end + 4 : end + 8] == b"IEND"


def _build(config: ImageConfig, image_size: int, device: torch.device) -> Pipeline:
    """The pipeline; what it is fed lies in main memory, also the numbers that a GPU works with."""
    pipeline = graph(config, image_size, device)
    pipeline.build()
    return pipeline


def graph(config: ImageConfig, image_size: int, device: torch.device) -> Pipeline:
    """The pipeline before it is built, which needs no GPU even for one."""
    on_gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=MAX_BATCH,
        num_threads=config.num_workers,
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=1,
        exec_async=False,
        exec_pipelined=False,
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
        shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
        resized = fn.external_source(name="resized", dtype=types.FLOAT, ndim=1)
        corner = fn.external_source(name="corner", dtype=types.FLOAT, ndim=1)
        flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
        pixels = fn.decoders.image(
            encoded,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
        )
        pixels = fn.slice(
            pixels,
            start,
            shape,
            axes=[0, 1],
            normalized_anchor=False,
            normalized_shape=False,
            out_of_bounds_policy="pad",
            fill_values=list(mean_colour(config)),
        )
        pixels = fn.resize(pixels, size=resized, interp_type=types.INTERP_CUBIC, antialias=True)
        pipeline.set_outputs(
            fn.crop_mirror_normalize(
                pixels,
                crop=(image_size, image_size),
                crop_pos_y=corner[0],
                crop_pos_x=corner[1],
                mirror=flip,
                dtype=types.FLOAT,
                output_layout="CHW",
                mean=[255 * value for value in config.mean],
                std=[255 * value for value in config.std],
            )
        )
    return pipeline


def _feed(pipeline: Pipeline, data: Sequence[bytes], geometries: Sequence[Geometry], size: int) -> None:
    feeds: dict[str, list[np.ndarray]] = {
        "encoded": [np.frombuffer(item, np.uint8) for item in data],
        "start": [],
        "shape": [],
        "resized": [],
        "corner": [],
        "flip": [],
    }
    for (left, top, right, bottom), (width, height), (x, y), flip in geometries:
        feeds["start"].append(np.array([top, left], np.int32))
        feeds["shape"].append(np.array([bottom - top, right - left], np.int32))
        feeds["resized"].append(np.array([height, width], np.float32))
        # DALI takes the corner as a share of the room that the square has.
        feeds["corner"].append(np.array([y / max(height - size, 1), x / max(width - size, 1)], np.float32))
        feeds["flip"].append(np.array(flip, np.int32))
    for name, values in feeds.items():
        pipeline.feed_input(name, values)
