"""Changes of a whole recipe by name: `megamm train RECIPE --preset NAME`.

Not the presets of sizes that stand in a recipe (models/presets): those describe a part of a model.
"""

from __future__ import annotations

from collections.abc import Callable

from megamm.config import Recipe
from megamm.recipe_presets import tiny

__all__ = ["PRESETS"]

PRESETS: dict[str, Callable[[Recipe], Recipe]] = {"tiny": tiny.tiny}
