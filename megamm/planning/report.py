"""Everything that `megamm plan` says, as one object of numbers and words."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from megamm.config import ParallelConfig, Recipe
from megamm.errors import InputError
from megamm.planning.hardware import Gpu, gpu_by_name, gpu_names
from megamm.planning.image_activations import images_in_memory, images_of_row
from megamm.planning.layout import stage_layers
from megamm.planning.layout_names import describe
from megamm.planning.memory import Memory, memory_of_stage
from megamm.planning.parameters import rank_parameters
from megamm.planning.search import HEADROOM, Candidate, search
from megamm.planning.step_time import (
    StepTime,
    data_parallel_size,
    images_per_row,
    num_micro_batches,
    step_time,
)


def plan_of(recipe: Recipe, gpus: int, gpu: Gpu, top: int, images: float | None = None) -> dict[str, Any]:
    """The recipe's own layout, then the best ones; keys as in `megamm plan --help`."""
    check_gpu(recipe, gpu)
    most = images_of_row(recipe)
    if images is not None and images > most:
        raise InputError(
            f"--images: {images:g} in a row are more than data.max_images or the positions of a row allow; "
            f"give at most {most}"
        )
    on_average = images_per_row(recipe) if images is None else images
    found: dict[str, Any] = {
        "recipe": recipe.name,
        "stage": recipe.stage,
        "gpus": gpus,
        "gpu": gpu.name,
        "gpu_memory": gpu.memory_bytes,
        "memory_limit": int(HEADROOM * gpu.memory_bytes),
        "images_per_row": on_average,
        "images_in_memory": most if images is None else images,
        "fp8": recipe.training.fp8.scaling,
    }
    try:
        data_parallel_size(recipe, gpus)
    except InputError as error:
        found["layout"] = {"name": describe(recipe)}
        found["error"] = str(error)
    else:
        found |= _own_layout(recipe, gpus, gpu, images)
    result = search(recipe, gpus, gpu, top, images)
    found["best"] = [_candidate(candidate, recipe, gpus) for candidate in result.best]
    found["refused"] = [asdict(refused) for refused in result.refused]
    found["tried"] = result.tried
    return found


def check_gpu(recipe: Recipe, gpu: Gpu) -> None:
    """Raises InputError where the GPU does not have the recipe's arithmetic."""
    scaling = recipe.training.fp8.scaling
    if scaling != "off" and scaling not in gpu.fp8_scalings:
        has = f"has {', '.join(gpu.fp8_scalings)}" if gpu.fp8_scalings else "has no FP8 arithmetic"
        others = [name for name in gpu_names() if scaling in gpu_by_name(name).fp8_scalings]
        remedy = f"plan for {' or '.join(others)}, or " if others else ""
        raise InputError(
            f"training.fp8.scaling: {scaling} does not work on {gpu.name}, which {has}; {remedy}"
            f"train in bf16 with training.fp8.scaling=off"
        )


def _own_layout(recipe: Recipe, gpus: int, gpu: Gpu, images: float | None) -> dict[str, Any]:
    times = step_time(recipe, gpus, gpu, images)
    stages = stage_layers(recipe)
    num_images = images_in_memory(recipe, images)
    memory = [memory_of_stage(recipe, gpus, stage, num_images) for stage in range(len(stages))]
    return {
        "layout": _layout(recipe, gpus),
        "parameters": {
            "model": _model_parameters(recipe),
            "rank_of_stage": [
                {part: asdict(sizes) for part, sizes in rank_parameters(recipe, stage).items()}
                for stage in range(len(stages))
            ],
        },
        "memory": {
            "stages": [_memory(m) | {"layers": s.num_layers} for m, s in zip(memory, stages, strict=True)],
            "fits": all(m.total <= HEADROOM * gpu.memory_bytes for m in memory),
        },
        "flops": times.model_flops,
        "hardware_flops": times.hardware_flops,
        "step": _step(times),
        "stage_time": {"steps": times.steps, "days": times.days, "gpu_hours": times.gpu_hours},
    }


def _model_parameters(recipe: Recipe) -> dict[str, dict[str, int]]:
    """Of the whole model, as one process would hold it."""
    single = replace(recipe, parallel=ParallelConfig())
    return {part: asdict(sizes) for part, sizes in rank_parameters(single, 0).items()}


def _layout(recipe: Recipe, gpus: int) -> dict[str, Any]:
    parallel, training = recipe.parallel, recipe.training
    return {
        "name": describe(recipe),
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "virtual_pipeline": parallel.virtual_pipeline,
        "pipeline_layout": parallel.pipeline_layout,
        "context": parallel.context,
        "data": data_parallel_size(recipe, gpus),
        "micro_batch_size": training.micro_batch_size,
        "micro_batches": num_micro_batches(recipe, gpus),
        "recompute": training.recompute.language,
    }


def _step(times: StepTime) -> dict[str, Any]:
    return {
        "seconds": times.seconds,
        "schedule": asdict(times.schedule),
        "mfu": times.mfu,
        "hfu": times.hfu,
        "tokens_per_s_per_gpu": times.tokens_per_s_per_gpu,
        "samples_per_s": times.samples_per_s,
        "stages": [stage.seconds for stage in times.stages],
    }


def _candidate(candidate: Candidate, base: Recipe, gpus: int) -> dict[str, Any]:
    return {
        "layout": _layout(candidate.recipe, gpus),
        "overrides": candidate.overrides,
        "seconds": candidate.seconds,
        "mfu": candidate.mfu,
        "schedule": asdict(candidate.schedule),
        "memory": _memory(candidate.memory),
        "fullest_stage": candidate.stage,
        "days": candidate.seconds * base.training.steps / 86400,
    }


def _memory(memory: Memory) -> dict[str, int]:
    return {**vars(memory), "total": memory.total}
