"""What each stage of the pipeline computes: which decoder layers, and whether the embedding with encoder and
connector, or the output layer."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megamm.config import Recipe


@dataclass(frozen=True)
class StageContents:
    """One pipeline rank.

    Attributes:
        chunks: decoder layers (from 0) of each of its model chunks, in the order of the schedule; a chunk
            may have none.
        holds_embedding: its first chunk begins with the embedding, the vision encoder and the connector.
        holds_output: its last chunk ends with the final norm, the output layer and the loss.
    """

    chunks: tuple[range, ...]
    holds_embedding: bool
    holds_output: bool

    @property
    def num_layers(self) -> int:
        """Decoder layers of all chunks together."""
        return sum(map(len, self.chunks))


def stage_layers(recipe: Recipe) -> list[StageContents]:
    """The contents of every pipeline rank. Chunk c of rank r stands at place c * ranks + r of the model."""
    parallel = recipe.parallel
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline or 1
    counts = _layers_of_places(parallel.pipeline_layout, recipe.model.language.num_layers, stages * chunks)
    starts = [sum(counts[:place]) for place in range(len(counts))]
    layers = [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
    return [
        StageContents(
            chunks=tuple(layers[stage::stages]),
            holds_embedding=stage == 0,
            holds_output=stage == stages - 1,
        )
        for stage in range(stages)
    ]


def _layers_of_places(layout: str | None, num_layers: int, places: int) -> list[int]:
    """How many decoder layers each place of the model has, from its beginning to its end."""
    if layout is None:
        return [num_layers // places] * places
    counts = re.findall(r"t(?:\*(\d+))?|(\|)", layout)
    found = [0]
    for times, bar in counts:
        if bar:
            found.append(0)
        else:
            found[-1] += int(times or 1)
    return found
