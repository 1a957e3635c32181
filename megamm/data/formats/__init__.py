"""Readers of the layouts in which training data come, one file per layout."""

from __future__ import annotations

from megamm.data.formats.base import Chunk, Format, FormatOptions
from megamm.data.formats.llava import Llava
from megamm.errors import InputError

__all__ = ["FORMATS", "Chunk", "Format", "FormatOptions", "make_format"]

FORMATS: dict[str, type[Format]] = {"llava": Llava}


def make_format(name: str, options: FormatOptions = FormatOptions()) -> Format:  # noqa: B008 (frozen)
    """The format `name`; InputError if there is none."""
    if name not in FORMATS:
        raise InputError(f"format: there is no {name!r}; choose one of {', '.join(FORMATS)}")
    return FORMATS[name](options)
