"""What is looked at during training."""

from __future__ import annotations

from collections.abc import Iterator

from megamm.config import Recipe


def check_validation(recipe: Recipe) -> Iterator[str]:
    v = recipe.validation
    if v.interval and v.data is None and v.questions is None:
        yield (
            f"validation.interval: {v.interval}, but there is neither validation.data nor "
            "validation.questions; name one of them, or set validation.interval=0"
        )


def validation_warnings(recipe: Recipe) -> Iterator[str]:
    v = recipe.validation
    given = [key for key in ("data", "questions") if getattr(v, key) is not None]
    if given and not v.interval:
        keys = " and ".join(f"validation.{key}" for key in given)
        yield f"{keys}: not looked at, because validation.interval is 0; give the steps between looks"
    if v.images is not None and v.questions is None:
        yield "validation.images: the folder of the pictures of validation.questions, which is not given"
