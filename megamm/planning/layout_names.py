"""Layouts in words: a few letters for a table, and overrides for the command line."""

from __future__ import annotations

from megamm.config import Recipe


def describe(recipe: Recipe) -> str:
    """A layout in a few letters: TP8 PP4x2 (two chunks a rank), CP2; with the uneven split."""
    p = recipe.parallel
    text = f"TP{p.tensor} PP{p.pipeline}"
    text += f"x{p.virtual_pipeline}" if (p.virtual_pipeline or 1) > 1 else ""
    text += f" CP{p.context}" if p.context > 1 else ""
    return text + (f" {p.pipeline_layout}" if p.pipeline_layout else "")


def overrides_of(recipe: Recipe, base: Recipe) -> list[str]:
    """What has to be given to `base` on the command line to make it `recipe`."""
    keys = (
        *("parallel.tensor", "parallel.pipeline", "parallel.virtual_pipeline", "parallel.pipeline_layout"),
        *("parallel.context", "parallel.sequence", "training.micro_batch_size"),
        *("training.recompute.language", "training.recompute.modules", "training.recompute.layers"),
    )
    found = []
    for key in keys:
        new, old = (_value(r, key) for r in (recipe, base))
        if new != old:
            found.append(f"--{key}={_as_text(new)}")
    return found


def _value(recipe: Recipe, dotted: str) -> object:
    value: object = recipe
    for name in dotted.split("."):
        value = getattr(value, name)
    return value


def _as_text(value: object) -> str:
    """As a shell and YAML read it."""
    if isinstance(value, list):
        return f"'[{', '.join(value)}]'"
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    text = str(value)
    return text if text.isalnum() else f"'{text}'"
