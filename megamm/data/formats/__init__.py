"""Readers of the layouts in which training data come, one file per layout."""

from __future__ import annotations

from megamm.data.formats.aokvqa import AOkvqa, AOkvqaDirect
from megamm.data.formats.base import Chunk, Format, FormatOptions
from megamm.data.formats.coco import Coco
from megamm.data.formats.docvqa import DocVqa
from megamm.data.formats.gqa import Gqa
from megamm.data.formats.llava import Llava
from megamm.data.formats.mmc4 import Mmc4
from megamm.data.formats.obelics import Obelics
from megamm.data.formats.ocrvqa import OcrVqa
from megamm.data.formats.scienceqa import ScienceQa
from megamm.data.formats.sharegpt import ShareGpt
from megamm.data.formats.stvqa import StVqa
from megamm.data.formats.text import Text
from megamm.data.formats.textcaps import TextCaps
from megamm.data.formats.textvqa import TextVqa
from megamm.data.formats.vizwiz import VizWiz
from megamm.data.formats.vqav2 import Vqav2
from megamm.data.formats.webdataset import WebDataset
from megamm.errors import InputError

__all__ = ["FORMATS", "Chunk", "Format", "FormatOptions", "make_format"]

FORMATS: dict[str, type[Format]] = {
    "llava": Llava,
    "sharegpt": ShareGpt,
    "webdataset": WebDataset,
    "obelics": Obelics,
    "mmc4": Mmc4,
    "coco": Coco,
    "textcaps": TextCaps,
    "vqav2": Vqav2,
    "okvqa": Vqav2,
    "textvqa": TextVqa,
    "vizwiz": VizWiz,
    "aokvqa": AOkvqa,
    "aokvqa-direct": AOkvqaDirect,
    "gqa": Gqa,
    "ocrvqa": OcrVqa,
    "stvqa": StVqa,
    "docvqa": DocVqa,
    "scienceqa": ScienceQa,
    "text": Text,
}


def make_format(name: str, options: FormatOptions = FormatOptions()) -> Format:  # noqa: B008 (frozen)
    """The format `name`; InputError if there is none."""
    if name not in FORMATS:
        raise InputError(f"format: there is no {name!r}; choose one of {', '.join(FORMATS)}")
    return FORMATS[name](options)
