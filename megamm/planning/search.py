"""The layouts of a stage on so many GPUs, by the time of a step: which fit, and why the others do not.

Tried are tensor parallelism inside a node, pipelines with the layers dealt evenly, interleaved, or so that
all stages take about as long (an encoder takes decoder layers off stage 0; frozen layers without backward
pass cost less), every micro-batch size that divides, and recomputation of nothing, of core attention, of all
layers. Context parallelism is tried only where nothing else fits. What is allowed, megamm.recipe_checks says.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from megamm.config import Recipe, RecomputeConfig
from megamm.errors import InputError
from megamm.planning.flops import flops_by_part
from megamm.planning.hardware import Gpu
from megamm.planning.image_activations import images_in_memory
from megamm.planning.layout_names import describe, overrides_of
from megamm.planning.memory import Memory, largest_stage
from megamm.planning.pieces import Pieces
from megamm.planning.splits import splits
from megamm.planning.step_time import (
    Schedule,
    batch_of,
    between_stages,
    data_parallel_size,
    images_per_row,
    length_shares,
    pipeline_waits,
    step_time,
    update_times,
)
from megamm.recipe_checks import validate

HEADROOM = 0.94  # of the memory that may be planned with: fragments, and what a formula cannot know
MAX_MICRO_BATCH = 128


@dataclass(frozen=True)
class Candidate:
    """A layout that fits. `memory` is that of pipeline stage `stage`, the fullest."""

    recipe: Recipe
    overrides: list[str]
    schedule: Schedule
    mfu: float
    memory: Memory
    stage: int

    @property
    def seconds(self) -> float:
        return self.schedule.seconds


@dataclass(frozen=True)
class Refused:
    """A layout, or all variants of one, that does not work.

    Attributes:
        kind: "layout" or "batch": the recipe's checks refuse it; "memory".
        reason: their sentence, or what it would need.
        needed: bytes of a rank, of "memory".
    """

    layout: str
    kind: str
    reason: str
    needed: int = 0


@dataclass
class Search:
    """The fastest layouts that fit, each with another split of the model, and what was refused.

    Attributes:
        tried: layouts, micro-batch sizes and recomputations that were timed.
    """

    best: list[Candidate] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    tried: int = 0


@dataclass(frozen=True)
class _Room:
    """The memory of `gpus` GPUs, for rows of `images` images (None: as many as there may be)."""

    gpus: int
    gpu: Gpu
    images: float | None

    @property
    def limit(self) -> float:
        """Bytes of each that are planned with."""
        return HEADROOM * self.gpu.memory_bytes

    def largest_stage(self, recipe: Recipe) -> tuple[int, Memory]:
        """The stage that needs most, and how much."""
        return largest_stage(recipe, self.gpus, images_in_memory(recipe, self.images))


@dataclass(frozen=True)
class _Timed:
    """A way to run `base`: pipeline stages, chunks for each, and layers of each place of the model."""

    base: Recipe
    pipeline: int
    chunks: int
    counts: tuple[int, ...]
    seconds: float

    @property
    def recipe(self) -> Recipe:
        layout = None
        if len(set(self.counts)) > 1:
            layout = "E" + "|".join(f"t*{count}" for count in self.counts) + "L"
        chunks = self.chunks if self.chunks > 1 else None
        parallel = replace(
            self.base.parallel, pipeline=self.pipeline, virtual_pipeline=chunks, pipeline_layout=layout
        )
        return replace(self.base, parallel=parallel)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Of the groups."""
        return self.base.parallel.tensor, self.base.parallel.context, self.pipeline

    @property
    def split(self) -> tuple[object, ...]:
        """Of the model; its other choices are how a micro-batch is computed."""
        return (*self.sizes, self.chunks, self.counts)


class _Refusals:
    """Why layouts were refused; of a layout of which some variant works, nothing is kept."""

    def __init__(self) -> None:
        self.found: dict[str, Refused] = {}
        self.working: set[str] = set()

    def add(self, layout: str, kind: str, reason: str, needed: int = 0) -> None:
        """The first reason stays."""
        self.found.setdefault(layout, Refused(layout, kind, reason, needed))

    def listed(self) -> list[Refused]:
        """Of the layouts of which nothing works; of those too large, the smallest first."""
        found = [refused for layout, refused in self.found.items() if layout not in self.working]
        return sorted(found, key=lambda refused: refused.needed)


def search(recipe: Recipe, gpus: int, gpu: Gpu, top: int = 5, images: float | None = None) -> Search:
    """Search for layouts of `recipe` on `gpus` GPUs.

    Args:
        top: how many layouts are wanted.
        images: in a row, on average; None: for time as step_time takes it, for memory as many as there may
            be.
    """
    room = _Room(gpus, gpu, images)
    images = images_per_row(recipe) if images is None else images
    refusals, found = _Refusals(), Search()
    for context in _contexts(recipe, gpus):
        timed = list(_timed_layouts(recipe, gpus, gpu, context, images, refusals))
        found.tried += len(timed)
        found.best = _fitting(timed, recipe, room, images, top, refusals)
        if found.best:
            break
    found.refused = refusals.listed()
    return found


def _contexts(recipe: Recipe, gpus: int) -> list[int]:
    contexts = [recipe.parallel.context] if recipe.parallel.context > 1 else [1, 2, 4, 8]
    return [c for c in contexts if gpus % c == 0 and (c == 1 or not recipe.data.pack)]


def _divisors(number: int, limit: int) -> list[int]:
    return [n for n in range(1, min(number, limit) + 1) if number % n == 0]


def _timed_layouts(
    recipe: Recipe, gpus: int, gpu: Gpu, context: int, images: float, refusals: _Refusals
) -> Iterator[_Timed]:
    for tensor in _divisors(gpu.gpus_per_node, gpus):
        if gpus % (tensor * context):
            continue
        for micro_batch in _micro_batches(recipe):
            for recompute in _recomputations(recipe):
                base = _base(recipe, tensor, context, micro_batch, recompute, refusals)
                if base is not None:
                    yield from _pipelines(base, gpus, gpu, images, refusals)


def _base(
    recipe: Recipe,
    tensor: int,
    context: int,
    micro_batch: int,
    recompute: RecomputeConfig,
    refusals: _Refusals,
) -> Recipe | None:
    """The recipe with these choices, with sequence parallelism if it can be; None if it is refused."""
    one_stage = replace(recipe.parallel, pipeline=1, virtual_pipeline=None, pipeline_layout=None)
    training = replace(recipe.training, micro_batch_size=micro_batch, recompute=recompute)
    reason = ""
    for sequence in (True, False)[tensor == 1 :]:
        parallel = replace(one_stage, tensor=tensor, context=context, sequence=sequence)
        base = replace(recipe, parallel=parallel, training=training)
        try:
            validate(base)
        except InputError as error:
            reason = reason or str(error)
            continue
        return base
    refusals.add(f"TP{tensor}" + (f" CP{context}" if context > 1 else ""), "layout", reason)
    return None


def _pipelines(base: Recipe, gpus: int, gpu: Gpu, images: float, refusals: _Refusals) -> Iterator[_Timed]:
    """All pipelines of a recipe whose other choices are made."""
    shares = length_shares(base)
    pieces: list[tuple[int, float, Pieces]] = []
    ranks = gpus // (base.parallel.tensor * base.parallel.context)
    for pipeline in _divisors(ranks, base.model.language.num_layers):
        replicas = ranks // pipeline
        times = base.training.global_batch_size // (base.training.micro_batch_size * replicas)
        if times * base.training.micro_batch_size * replicas != base.training.global_batch_size:
            _refuse_batch(_Timed(base, pipeline, 1, (), 0.0), gpus, refusals)
            continue
        if not pieces:
            pieces = [
                (length, share, Pieces(base, gpu, batch_of(base, length, images)))
                for length, share in sorted(shares.items())
            ]
        for chunks, counts in splits(base, pipeline, pieces[-1][2]):
            candidate = _Timed(base, pipeline, chunks, counts, 0.0)
            if chunks > 1 and times % pipeline:
                _refuse_batch(candidate, gpus, refusals)
                continue
            seconds = sum(
                share * _seconds(candidate, gpus, gpu, p, length, times, replicas)
                for length, share, p in pieces
            )
            refusals.working |= {
                describe(candidate.recipe),
                describe(_Timed(base, pipeline, 1, (), 0.0).recipe),
            }
            yield replace(candidate, seconds=seconds)


def _seconds(
    timed: _Timed, gpus: int, gpu: Gpu, pieces: Pieces, length: int, times: int, replicas: int
) -> float:
    """What step_time.schedule says of it, from sums alone: there are thousands."""
    places, chunks = list(itertools.accumulate(timed.counts, initial=0)), timed.chunks
    seconds, again, trained = pieces.seconds_until, pieces.again_until, pieces.trained_until
    stages, weights = [0.0] * timed.pipeline, [0.0] * timed.pipeline
    for place, (start, end) in enumerate(itertools.pairwise(places)):
        stage = place % timed.pipeline
        stages[stage] += seconds[end] - seconds[start] + again[end] - again[start]
        weights[stage] += trained[end] - trained[start]
    stages[0] += pieces.first.total
    stages[-1] += pieces.last.total
    weights[0] += pieces.first.trained
    weights[-1] += pieces.last.trained
    between = between_stages(timed.base, gpus, gpu, length) if timed.pipeline > 1 else 0.0
    waits = pipeline_waits(stages, between, chunks)
    slowest = max(range(len(stages)), key=lambda stage: stages[stage] + waits[stage][0])
    computing = sum(stages) - stages[slowest]
    filling = sum(wait for _, wait in waits) - waits[slowest][1]
    data, optimizer = update_times(timed.base, replicas, gpu, max(weights))
    full = stages[slowest] + waits[slowest][0]
    return times * full + computing / chunks + filling + data + optimizer


def _micro_batches(recipe: Recipe) -> list[int]:
    whole = recipe.training.global_batch_size
    powers = {2**n for n in range(8) if whole % 2**n == 0}
    return sorted({*powers, recipe.training.micro_batch_size})


def _recomputations(recipe: Recipe) -> list[RecomputeConfig]:
    own = recipe.training.recompute
    return [
        replace(own, language="none", layers=None),
        replace(own, language="selective", modules=["core_attn"], layers=None),
        replace(own, language="full", layers=None),
    ]


def _refuse_batch(timed: _Timed, gpus: int, refusals: _Refusals) -> None:
    recipe = timed.recipe
    layout = describe(recipe)
    if layout not in refusals.found:
        try:
            data_parallel_size(recipe, gpus)
        except InputError as error:
            refusals.add(layout, "batch", str(error))


def _fitting(
    timed: list[_Timed],
    recipe: Recipe,
    room: _Room,
    images: float,
    top: int,
    refusals: _Refusals,
) -> list[Candidate]:
    """The fastest of each split that fits, fastest first."""
    gpus, gpu = room.gpus, room.gpu
    by_split: dict[tuple[object, ...], list[_Timed]] = {}
    for candidate in sorted(timed, key=lambda t: t.seconds):
        by_split.setdefault(candidate.split, []).append(candidate)
    best: list[tuple[float, _Timed, int, Memory]] = []
    for group in by_split.values():  # by the time of their fastest
        if group[0].sizes in {chosen.sizes for _, chosen, _, _ in best}:
            continue  # other chunks or layers of a pipeline that is proposed already
        if len(best) >= top and group[0].seconds >= best[top - 1][0]:
            # too slow to be proposed; whether they fit is still worth saying of the plain ones
            if group[0].chunks == 1 and len(set(group[0].counts)) == 1:
                _smallest_fits(group, room, refusals)
            continue
        found = _first_that_fits(group, room, refusals)
        if found is not None:
            best.append((found[0].seconds, *found))
            best.sort(key=lambda entry: entry[0])
    flops = _model_flops(recipe, images)
    found_best = []
    for seconds, chosen, stage, memory in best[:top]:
        mfu = flops / (seconds * gpus * gpu.bf16_flops)
        own = chosen.recipe
        times = step_time(own, gpus, gpu, images).schedule
        found_best.append(Candidate(own, overrides_of(own, recipe), times, mfu, memory, stage))
    return found_best


def _first_that_fits(
    group: list[_Timed], room: _Room, refusals: _Refusals
) -> tuple[_Timed, int, Memory] | None:
    """The fastest variant of a split that fits. What needs no less than one that did not is not looked at,
    and nothing at all if the smallest micro-batch with everything recomputed does not fit."""
    if not _smallest_fits(group, room, refusals):
        return None
    too_large: list[tuple[int, int]] = []
    for candidate in group:
        own = _need(candidate)
        if any(own[0] >= large[0] and own[1] >= large[1] for large in too_large):
            continue
        stage, memory = room.largest_stage(candidate.recipe)
        if memory.total <= room.limit:
            return candidate, stage, memory
        too_large.append(own)
    return None


def _smallest_fits(group: list[_Timed], room: _Room, refusals: _Refusals) -> bool:
    """Whether the variant that needs least fits; if not, it is refused."""
    smallest = min(group, key=_need)
    stage, memory = room.largest_stage(smallest.recipe)
    if memory.total > room.limit:
        most = max(vars(memory), key=lambda name: vars(memory)[name])
        layout = describe(smallest.recipe)
        refusals.working.discard(layout)
        refusals.found.pop(layout, None)
        refusals.add(
            layout,
            "memory",
            f"needs {memory.total / 2**30:.1f} GiB and has {room.limit / 2**30:.1f} on stage {stage}, "
            f"{vars(memory)[most] / 2**30:.1f} of them {most}, with micro-batch {_need(smallest)[0]} and "
            f"full recomputation",
            memory.total,
        )
        return False
    return True


def _need(candidate: _Timed) -> tuple[int, int]:
    """Micro-batch, and how much is kept."""
    training = candidate.base.training
    return training.micro_batch_size, ("full", "selective", "none").index(training.recompute.language)


def _model_flops(recipe: Recipe, images: float) -> float:
    total = 0.0
    for length, share in length_shares(recipe).items():
        labels = batch_of(recipe, length, images).labels / recipe.training.micro_batch_size
        row = flops_by_part(recipe, length, images, labels, sequence_length=length)
        total += share * recipe.training.global_batch_size * sum(row.values())
    return total
