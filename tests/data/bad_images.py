"""Pictures of every kind that collections from the web hold: unusual ones that load, and unusable ones."""

from __future__ import annotations

import random
import struct
import zlib

import numpy as np
from PIL import Image

from tests.data.helpers import encode, picture

MAX_PIXELS = 4_000_000  # with this limit, `unusable` says which are refused


def unusual() -> dict[str, bytes]:
    """Readable pictures of unusual kinds."""
    base = picture(3, 60, 40)
    sixteen = Image.fromarray((np.arange(2400, dtype=np.uint16) * 27).reshape(40, 60))
    frames = [picture(i, 30, 30) for i in range(3)]
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees; ignored
    exif[0x9286] = "x" * 60_000  # a comment that nearly fills its segment
    return {
        "palette": encode(base.quantize(16)),
        "transparent palette": encode(base.quantize(16), transparency=3),
        "transparent": encode(base.convert("RGBA")),
        "grey and alpha": encode(base.convert("LA")),
        "one bit": encode(base.convert("1")),
        "sixteen bits": encode(sixteen),
        "cmyk": encode(base.convert("CMYK"), "JPEG"),
        "webp": encode(base, "WEBP"),
        "bmp": encode(base, "BMP"),
        "tiff": encode(base, "TIFF"),
        "animated": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated webp": encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "exif": encode(base, "JPEG", exif=exif),
        "one pixel": encode(base.crop((0, 0, 1, 1))),
        "one pixel of jpeg": encode(base.crop((0, 0, 1, 1)), "JPEG"),
        "wide": encode(base.resize((400, 3))),
        "trailing bytes": encode(base, "JPEG") + b"junk",
    }


def unusable() -> dict[str, bytes]:
    """What must be refused."""
    base = picture(5, 90, 70)
    jpeg, png, webp = encode(base, "JPEG"), encode(base), encode(base, "WEBP")
    gif = encode(base, "GIF")
    broken = bytearray(png)
    broken[png.index(b"IDAT") + 20] ^= 0xFF
    bomb = zlib.compress(bytes(80 << 20), 9)
    start = png.index(b"IHDR") + 21  # behind the header chunk
    end = png.index(b"IEND") - 4
    huge = bytearray(jpeg)
    place = jpeg.index(b"\xff\xc0") + 5
    huge[place : place + 4] = struct.pack(">HH", 65_000, 65_000)
    return {
        "empty": b"",
        "html": b"<html><body>404 Not Found</body></html>",
        "text": b"hello " * 100,
        "zeros": bytes(5000),
        "random": random.Random(1).randbytes(3000),
        "jpeg cut in half": jpeg[: len(jpeg) // 2],
        "jpeg without its end": jpeg[:-60],
        "jpeg header only": jpeg[:100],
        "jpeg without a scan": jpeg[: jpeg.index(b"\xff\xda")] + b"\xff\xd9",
        "jpeg with other dimensions": bytes(huge),
        "png cut in half": png[: len(png) // 2],
        "png cut in the header": png[:20],
        "png with a wrong checksum": bytes(broken),
        "png without pixels": png[: png.index(b"IDAT") - 4] + chunk(b"IDAT", b"") + png[end:],
        "png with a text bomb": png[:start] + chunk(b"zTXt", b"k\0\0" + bomb) + png[start:],
        "png with a bomb as colour profile": png[:start] + chunk(b"iCCP", b"k\0\0" + bomb) + png[start:],
        "png with a text bomb at the end": png[:end] + chunk(b"zTXt", b"k\0\0" + bomb) + png[end:],
        "webp cut in half": webp[: len(webp) // 2],
        "gif cut in half": gif[: len(gif) // 2],
        "bomb": png_bomb(10_000, 10_000),
        "large": png_bomb(2400, 2000),
        "elongated": encode(Image.new("L", (1, 60_000))),
        "float": encode(Image.new("F", (20, 20)), "TIFF"),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "pdf": b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF",
        "svg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "icon": encode(base.resize((32, 32)), "ICO"),
    }


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(width: int, height: int) -> bytes:
    """A small, valid PNG of very many pixels."""
    deflate = zlib.compressobj(9)
    rows = b"".join(deflate.compress(bytes(1 + width // 8)) for _ in range(height)) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
