"""How the decoder's layers can be dealt to pipeline stages."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from megamm.config import Recipe
from megamm.planning.pieces import Pieces

MAX_CHUNKS = 8  # of a rank, under the interleaved schedule


def splits(base: Recipe, pipeline: int, pieces: Pieces) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The ways to deal the layers to `pipeline` stages: (chunks of a rank, layers of each place)."""
    num_layers = base.model.language.num_layers
    if num_layers % pipeline == 0:
        yield 1, (num_layers // pipeline,) * pipeline
    if pipeline == 1:
        return
    counts = tuple(balanced(pieces, pipeline))
    if len(set(counts)) > 1:
        yield 1, counts
    for chunks in range(2, MAX_CHUNKS + 1):
        if num_layers % (pipeline * chunks) == 0:
            yield chunks, (num_layers // pipeline // chunks,) * (pipeline * chunks)


def balanced(pieces: Pieces, pipeline: int) -> list[int]:
    """Layers of each of `pipeline` stages, at least one, whose slowest stage is as fast as can be."""
    until = [seconds + again for seconds, again in zip(pieces.seconds_until, pieces.again_until, strict=True)]
    first, last = pieces.first.total, pieces.last.total
    low, high = max(first, last), until[-1] + first + last
    best = _filled(until, pipeline, high, first, last)
    for _ in range(24):
        middle = (low + high) / 2
        counts = _filled(until, pipeline, middle, first, last)
        best, low, high = (best, middle, high) if counts is None else (counts, low, middle)
    assert best is not None
    return best


def _filled(until: list[float], pipeline: int, limit: float, first: float, last: float) -> list[int] | None:
    """Stages filled up to `limit` from the front, or None if one has more than that."""
    counts, at, num_layers = [], 0, len(until) - 1
    for stage in range(pipeline - 1):
        room = limit - (first if stage == 0 else 0.0)
        end = bisect.bisect_right(until, until[at] + room * (1 + 1e-12)) - 1
        end = min(max(end, at + 1), num_layers - (pipeline - stage - 1))
        if until[end] - until[at] > room * (1 + 1e-9):
            return None
        counts.append(end - at)
        at = end
    rest = until[-1] - until[at] + last + (first if pipeline == 1 else 0.0)
    return [*counts, num_layers - at] if rest <= limit * (1 + 1e-9) else None
