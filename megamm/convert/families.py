"""All families of published weights that megamm reads or writes."""

from __future__ import annotations

from megamm.convert.family import Export, Family, Found
from megamm.convert.tables import (
    clip,
    eva,
    idefics,
    infimm,
    internlm,
    llama,
    llava,
    llava_original,
    open_flamingo,
    openclip,
    peft,
    xcomposer,
)
from megamm.errors import InputError

# Asked in this order whether a source is theirs.
FAMILIES: list[Family] = [
    peft.FAMILY,  # beside adapters there may be the config.json of their model
    llava_original.FAMILY,
    llava.FAMILY,
    idefics.FAMILY,
    infimm.FAMILY,
    open_flamingo.FAMILY,
    xcomposer.FAMILY,
    llama.FAMILY,
    internlm.FAMILY,
    clip.FAMILY,
    openclip.FAMILY,
    eva.FAMILY,
]


def recognise(found: Found) -> Family:
    """The family of a source.

    Raises:
        InputError: none knows it.
    """
    for family in FAMILIES:
        if family.recognises(found):
            return family
    names = ", ".join(family.name for family in FAMILIES)
    said = (
        f"model_type is {found.config.get('model_type')!r}"
        if found.config
        else "no config.json, and unknown tensors"
    )
    raise InputError(f"{found.where}: {said}; choose a model of a family that megamm imports: {names}")


def exported(name: str) -> Export:
    """How `--family name` is written.

    Raises:
        InputError: no such family, or one that is only imported.
    """
    known = {family.name: family.export for family in FAMILIES if family.export is not None}
    if name not in known:
        raise InputError(f"--family: there is no {name!r}; choose one of {', '.join(known)}")
    return known[name]
