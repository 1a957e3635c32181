"""Which weights the optimizer treats how: rates and weight decay of single parts, what does not decay."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import ParamGroupOverride
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

from megamm.config import (
    EMBEDDING,
    LATENTS,
    OUTPUT,
    OptimizerConfig,
    PartOptimizerConfig,
    Recipe,
    part_of,
)

_FROZEN_ROWS = "has_frozen_rows"  # attribute of parameters


def train_rows(weight: torch.Tensor, rows: slice) -> None:
    """Train some rows of a weight: the gradient of the others is zero, and the weight does not decay, so that
    AdamW (from zero moments) leaves them as they are, bit for bit.

    Args:
        weight: a parameter on the device on which it is trained.
        rows: may be none.
    """

    def keep_rows(gradient: torch.Tensor) -> torch.Tensor:
        kept = torch.zeros_like(gradient)
        kept[rows] = gradient[rows]
        return kept

    weight.requires_grad_(True)
    weight.register_hook(keep_rows)
    setattr(weight, _FROZEN_ROWS, True)


def has_frozen_rows(weight: torch.Tensor) -> bool:
    """Whether only some rows are trained."""
    return getattr(weight, _FROZEN_ROWS, False)


def minimum_rate(optimizer: OptimizerConfig, part: PartOptimizerConfig) -> float:
    """Where the schedule of a part ends."""
    if part.min_lr is not None:
        return part.min_lr
    return optimizer.min_lr if part.lr is None else optimizer.min_lr * (part.lr / optimizer.lr)


def group_overrides(recipe: Recipe) -> dict[ParamKey, ParamGroupOverride]:
    """What megatron's parameter groups have of their own; a weight may match one key of each kind."""
    overrides = {
        _key("without decay", lambda parameter, name: _does_not_decay(recipe, parameter, name)): _values(
            wd_mult=0.0
        )
    }
    for part in recipe.optimizer.parts:
        values = {}
        if part.lr is not None or part.min_lr is not None:
            rate = recipe.optimizer.lr if part.lr is None else part.lr
            values = {"max_lr": rate, "min_lr": minimum_rate(recipe.optimizer, part)}
        if part.weight_decay is not None:
            values |= {"start_wd": part.weight_decay, "end_wd": part.weight_decay}
        is_of = part.part  # bound here, not when it is called
        overrides[_key(is_of, lambda _, name, is_of=is_of: part_of(name) == is_of)] = _values(**values)
    return overrides


def _values(**values: float) -> ParamGroupOverride:
    return values  # type: ignore[return-value]  # (megatron's type asks for all keys, its code for any)


def _key(name: str, holds: Any) -> ParamKey:
    """A key of the parameters for which `holds(parameter, checkpoint name)`."""
    # (the data-parallel wrapper puts "module." in front)
    return ParamKey(
        with_name_predicate=ParamWithNamePredicate(
            name=name, fn=lambda parameter, found: bool(holds(parameter, found.removeprefix("module.")))
        )
    )


def _does_not_decay(recipe: Recipe, parameter: torch.Tensor, name: str) -> bool:
    tied = recipe.model.language.tie_embeddings
    kinds = {
        "vectors": parameter.dim() == 1 or name.endswith(".bias"),
        "embeddings": name == EMBEDDING or (tied and name == OUTPUT),
        "latents": name in LATENTS,
    }
    return has_frozen_rows(parameter) or any(kinds[kind] for kind in recipe.optimizer.no_decay)


def describe_rates(recipe: Recipe) -> list[str]:
    """A line about the parts that have rates or decay of their own; none if there is no such part."""
    o = recipe.optimizer
    described = []
    for part in o.parts:
        values = []
        if part.lr is not None or part.min_lr is not None:
            rate = o.lr if part.lr is None else part.lr
            values.append(f"lr {rate:g} to {minimum_rate(o, part):g}")
        if part.weight_decay is not None:
            values.append(f"weight decay {part.weight_decay:g}")
        described.append(f"{part.part}: {', '.join(values)}")
    rest = f"everything else: lr {o.lr:g} to {o.min_lr:g}, weight decay {o.weight_decay:g}"
    return [f"optimizer: {'; '.join([*described, rest])}"] if described else []
