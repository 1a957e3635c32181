"""How many micro-batches a pipeline rank holds at a time, under megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Sequence

from megamm.config import Recipe


def micro_batches(recipe: Recipe, world: int) -> int:
    """Micro-batches of a step on each data-parallel rank."""
    parallel, training = recipe.parallel, recipe.training
    data_parallel = world // (parallel.tensor * parallel.pipeline * parallel.context)
    return training.global_batch_size // (training.micro_batch_size * data_parallel)


def most_in_flight(recipe: Recipe, world: int, stage: int, chunk_bytes: Sequence[int]) -> list[int]:
    """Micro-batches that each model chunk of a rank holds at the moment when they take most.

    1F1B (Narayanan et al. 2021, section 2.2): a stage runs ahead by as many micro-batches as stages come
    behind it, and has one more in work. Interleaved (same, section 2.2.2), micro-batches go through the
    chunks in groups of as many as there are stages; a rank runs ahead by 2 (stages behind it) + (chunks - 1)
    stages.

    Args:
        chunk_bytes: what a micro-batch keeps in each chunk.
    """
    parallel, num = recipe.parallel, micro_batches(recipe, world)
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline or 1
    if chunks == 1:
        return [min(num, stages - stage)]
    # later rounds repeat the first ones
    units = min(num, 3 * stages) * chunks
    ahead = min(2 * (stages - stage - 1) + (chunks - 1) * stages, units)
    order = [(unit // stages) % chunks for unit in range(units)]
    held, now = [0] * chunks, [0] * chunks
    most = -1
    for unit, chunk in enumerate(order):
        now[chunk] += 1
        size = sum(n * kept for n, kept in zip(now, chunk_bytes, strict=True))
        if size > most:
            most, held = size, list(now)
        if unit >= ahead:
            now[chunks - 1 - order[unit - ahead]] -= 1
    return held
