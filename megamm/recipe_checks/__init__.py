"""Whether a recipe makes sense: sizes that divide, parts that fit, numbers in range.

`validate` needs the recipe alone; `validate_world` also needs the number of processes. Each check
is a generator of sentences that name the key, the numbers and the remedy; the first one is raised.
"""

from __future__ import annotations

from megamm.config import Recipe
from megamm.errors import InputError
from megamm.recipe_checks.data import check_sources
from megamm.recipe_checks.layout import check_layout, validate_world
from megamm.recipe_checks.model import check_assembly, check_language, check_lora, check_vision
from megamm.recipe_checks.precision import check_precision
from megamm.recipe_checks.ranges import check_ranges
from megamm.recipe_checks.stage import (
    check_batch,
    check_freeze,
    check_images,
    check_optimizer,
    check_packing,
    check_sequence,
    trainable_parts,
    warnings,
)
from megamm.recipe_checks.validation import check_validation, validation_warnings

__all__ = ["trainable_parts", "validate", "validate_world"]


def validate(recipe: Recipe) -> list[str]:
    """Check everything that does not depend on the number of processes.

    Returns:
        Warnings: sentences about settings that are legal but probably not meant.
    Raises:
        InputError: the first setting that cannot work, with its numbers and the remedy.
    """
    parts = {"language": (check_ranges, check_language, check_lora), "vision": (check_ranges, check_vision)}
    whole = (
        check_ranges,
        check_language,
        check_vision,
        check_assembly,
        check_lora,
        check_sources,
        check_sequence,
        check_layout,
        check_batch,
        check_packing,
        check_images,
        check_freeze,
        check_validation,
        check_optimizer,
        check_precision,
    )
    for check in parts.get(recipe.model.assembly, whole):
        for problem in check(recipe):
            raise InputError(problem)
    return [*warnings(recipe), *validation_warnings(recipe)]
