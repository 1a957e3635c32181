"""Names of parallel layouts: "tp2", "pp2vpp2", "tp2pp2sp"."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from megamm.config import ParallelConfig, Recipe
from megamm.errors import InputError

MAX_PROCESSES = 64  # of one machine; each imports torch
_PART = r"(tp|vpp|pp|dp|cp)([1-9][0-9]*)|(sp)"
_WORDS = "tpN (tensor), ppN (pipeline), vppN (virtual pipeline), dpN (data), cpN (context) and sp (sequence)"


@dataclass(frozen=True)
class Layout:
    """A parallel layout; sizes that its name does not give are 1.

    Attributes:
        name: as it was given.
        tensor, pipeline, virtual, data, context: sizes.
        sequence: whether sequence parallelism is on.
    """

    name: str
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    data: int = 1
    context: int = 1
    sequence: bool = False

    @property
    def world(self) -> int:
        """Processes."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def round(self) -> int:
        """The micro-batches of a step must be a multiple of this."""
        return self.data * (self.pipeline if self.virtual > 1 else 1)

    def applied_to(self, recipe: Recipe) -> Recipe:
        """The recipe in this layout (layers dealt evenly over the stages)."""
        parallel = replace(
            recipe.parallel,
            tensor=self.tensor,
            pipeline=self.pipeline,
            virtual_pipeline=self.virtual if self.virtual > 1 else None,
            pipeline_layout=None,
            context=self.context,
            sequence=self.sequence,
            backend=ParallelConfig.backend,
        )
        return replace(recipe, parallel=parallel)


ONE_PROCESS = Layout("one process")


def parse_layouts(text: str) -> list[Layout]:
    """The layouts of a list like "tp2,pp2,tp2pp2sp".

    Raises:
        InputError: a word is not made of the known parts, or has one twice.
    """
    return [_parse(word.strip()) for word in text.split(",")]


def _parse(word: str) -> Layout:
    if not re.fullmatch(f"(?:{_PART})+", word):
        raise InputError(
            f"--layouts: {word!r} is not a layout; join {_WORDS}, as in tp2, pp2vpp2 or tp2pp2sp, and put "
            "commas between layouts"
        )
    names = {"tp": "tensor", "pp": "pipeline", "vpp": "virtual", "dp": "data", "cp": "context"}
    found: dict[str, int] = {}
    for kind, size, sequence in re.findall(_PART, word):
        key = sequence or kind
        if key in found:
            raise InputError(f"--layouts: {word!r} has {key} twice; give it once")
        found[key] = 1 if sequence else int(size)
    is_sequence = found.pop("sp", 0) == 1
    layout = Layout(word, **{names[key]: size for key, size in found.items()}, sequence=is_sequence)
    if layout.world > MAX_PROCESSES:
        raise InputError(
            f"--layouts: {word!r} needs {layout.world} processes of this machine; give layouts of at most "
            f"{MAX_PROCESSES}"
        )
    return layout
