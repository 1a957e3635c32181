"""The sources of training data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from megamm.config import Recipe, SourceConfig


def check_sources(recipe: Recipe) -> Iterator[str]:
    train = recipe.data.train
    if train is None or isinstance(train, str):
        return
    if not train:
        yield "data.train: is an empty list; name at least one directory written by `megamm prepare`"
    for number, source in enumerate(train):
        yield from _source(f"data.train[{number}]", source)
    for key in ("weight", "epochs"):
        without = [number for number, source in enumerate(train) if getattr(source, key) is None]
        if 0 < len(without) < len(train):
            yield (
                f"data.train[{without[0]}].{key}: is not given, but other sources have theirs; give all of "
                "them a weight, or all epochs, or none (then each counts as one epoch)"
            )
    names = Counter(source.name for source in recipe.data.sources())
    if twice := [name for name, count in names.items() if count > 1]:
        yield f"data.train: two sources are called {twice[0]!r}; give each another with the key name"


def sequence_lengths(recipe: Recipe) -> Iterator[tuple[str, int]]:
    """(key that says so, S) of every S that rows may have."""
    data = recipe.data
    sources = data.train if isinstance(data.train, list) else []
    if not sources or any(source.sequence_length is None for source in sources):
        yield "data.sequence_length", data.sequence_length
    for number, source in enumerate(sources):
        if source.sequence_length is not None:
            yield f"data.train[{number}].sequence_length", source.sequence_length


def _source(key: str, source: SourceConfig) -> Iterator[str]:
    for name in ("weight", "epochs", "sequence_length"):
        value = getattr(source, name)
        if value is not None and value <= 0:
            yield f"{key}.{name}: {value} is not positive; give a number above 0, or leave the key out"
    for name in ("path", "name"):
        value = getattr(source, name)
        if value is not None and not value.strip():
            yield f"{key}.{name}: is empty; give it a value"
    if source.weight is not None and source.epochs is not None:
        yield f"{key}: has a weight and epochs; give one of them"
