"""Recipes with several sources of training data: read, written, refused."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from megamm.config import DataConfig, Recipe, SourceConfig
from megamm.errors import InputError
from megamm.recipe import load_recipe, recipe_hash, recipe_to_yaml
from tests.training.test_recipe import make

TWO = "--data.train=[{path: a/llava, weight: 2}, {path: ~/text, weight: 0.1, sequence_length: 64, name: 7e1}]"


def two() -> Recipe:
    return make(TWO.replace("name: 7e1", "name: '7e1'"))


def test_sources_are_typed_and_have_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    data = two().data
    assert data.train == [
        SourceConfig("a/llava", weight=2.0),
        SourceConfig("/home/ada/text", weight=0.1, sequence_length=64, name="7e1"),
    ]
    assert [tuple(source) for source in data.sources()] == [
        ("llava", "a/llava", 128, Fraction(2), True),
        ("7e1", "/home/ada/text", 64, Fraction(1, 10), True),
    ]
    assert data.sequence_lengths() == [128, 64] and make().data.sequence_lengths() == [128]
    (alone,) = make("data.train=/data/x/").data.sources()
    assert alone == ("x", "/data/x/", 128, Fraction(1), False)
    epochs = DataConfig([SourceConfig("a", epochs=0.3)]).sources()[0]
    assert (epochs.rate, epochs.by_weight) == (Fraction(3, 10), False)


def test_round_trip(tmp_path: Path) -> None:
    recipe, path = two(), tmp_path / "recipe.yaml"
    path.write_text(recipe_to_yaml(recipe))
    assert load_recipe(path) == recipe and recipe_hash(load_recipe(path)) == recipe_hash(recipe)
    assert recipe_hash(make(TWO.replace("0.1", "0.2").replace("7e1", "x"))) != recipe_hash(recipe)
    assert load_recipe(path, ["data.train=b"]).data.train == "b"


@pytest.mark.parametrize(
    ("train", "parts"),
    [
        ("[{path: a}, {path: b, wieght: 2}]", ["unknown key data.train[1].wieght", "path, weight, epochs"]),
        ("[{path: a}, {weight: 2}]", ["data.train[1].path is missing"]),
        ("[{path: 3}]", ["data.train[0].path is 3", "text"]),
        ("[{path: a, weight: x}]", ["data.train[0].weight is 'x'", "a number or null"]),
        ("[{path: a, sequence_length: 1.5}]", ["data.train[0].sequence_length is 1.5", "whole number"]),
        ("[a, b]", ["data.train[0] is 'a'", "{..} with path, weight"]),
        ("[{path: a}, [b]]", ["data.train[1] is ['b']"]),
        ("{path: a}", ["data.train is {'path': 'a'}", "a list [..] whose items are {..} with path"]),
        ("[{path: a, 3: b}]", ["unknown key data.train[0].3"]),
        ("[]", ["data.train: is an empty list"]),
        ("[{path: ' '}]", ["data.train[0].path: is empty"]),
        ("[{path: a, name: ''}]", ["data.train[0].name: is empty"]),
        ("[{path: a, weight: 0}]", ["data.train[0].weight: 0.0 is not positive"]),
        ("[{path: a, epochs: -1}]", ["data.train[0].epochs: -1.0 is not positive"]),
        ("[{path: a, sequence_length: 0}]", ["data.train[0].sequence_length: 0 is not positive"]),
        ("[{path: a, weight: 1, epochs: 1}]", ["data.train[0]: has a weight and epochs"]),
        ("[{path: a, weight: 1}, {path: b}]", ["data.train[1].weight: is not given"]),
        ("[{path: a}, {path: b, epochs: 1}]", ["data.train[0].epochs: is not given"]),
        ("[{path: a, weight: 1}, {path: b, epochs: 1}]", ["data.train[1].weight: is not given"]),
        ("[{path: a/out}, {path: b/out}]", ["two sources are called 'out'", "key name"]),
        ("[{path: a, sequence_length: 16}]", ["data.train[0].sequence_length: 16 leaves no room"]),
        ("[{path: a, sequence_length: 4096}]", ["data.train[0].sequence_length: 4096", "max_positions"]),
    ],
)
def test_what_makes_no_sense_is_refused(train: str, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        make(f"data.train={train}")
    for part in parts:
        assert part in str(caught.value)
    assert len(str(caught.value)) < 450


def test_every_length_is_checked_and_no_other() -> None:
    lengths = "[{path: a, sequence_length: 64}, {path: b, sequence_length: 127}]"
    split = ["parallel.sequence=true", "parallel.tensor=2"]
    with pytest.raises(InputError, match=r"data.train\[1\].sequence_length: 127 is not divisible"):
        make(f"data.train={lengths}", *split)
    make(f"data.train={lengths}".replace("127", "128"), *split, "data.sequence_length=99999")
    with pytest.raises(InputError, match=r"data.sequence_length: 99999"):
        make("data.train=[{path: a, sequence_length: 64}, {path: b}]", "data.sequence_length=99999")
    with pytest.raises(InputError, match=r"data.workers: -1 is negative"):
        make("data.workers=-1")
