"""Damaged recipes: a recipe that makes sense, or one sentence."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megamm.config import Recipe
from megamm.errors import InputError
from megamm.recipe import load_recipe, recipe_to_yaml
from tests.data.mutations import mutated_bytes

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples").rglob("*.yaml"))
MANY = pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])


@pytest.mark.parametrize("rounds", [500, MANY])
def test_damaged_recipes(rounds: int, tmp_path: Path) -> None:
    draw, path, refused = random.Random(rounds), tmp_path / "recipe.yaml", 0
    for number in range(rounds):
        path.write_bytes(mutated_bytes(RECIPES[number % len(RECIPES)].read_bytes(), draw))
        try:
            found = load_recipe(path)
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert isinstance(found, Recipe)
            path.write_text(recipe_to_yaml(found))
            assert load_recipe(path) == found
    assert rounds / 10 < refused < rounds
