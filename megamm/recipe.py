"""Reading recipes: YAML file + presets + command-line overrides -> a typed, validated `Recipe`.

The order of precedence is: defaults of megamm.config < presets of sizes < recipe file < preset of the whole
recipe < overrides.
The YAML is that of the 1.2 core schema (`1e-5` is a number, `no` is a word) and duplicate keys are
errors. Every message names the file, the dotted key, what is wrong and the remedy.
"""

from __future__ import annotations

import difflib
import errno
import functools
import hashlib
import json
import re
import reprlib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeGuard, Union, get_args, get_origin, get_type_hints

import yaml

from megamm.config import Recipe
from megamm.errors import InputError
from megamm.recipe_checks import validate, validate_world
from megamm.recipe_presets import PRESETS
from megamm.whole_files import read_whole

__all__ = [
    "load_recipe",
    "parse_yaml",
    "recipe_from_dict",
    "recipe_hash",
    "recipe_to_yaml",
    "valid_keys",
    "validate",
    "validate_world",
]

MAX_RECIPE_BYTES = 1 << 20
PRESET_DIR = Path(__file__).parent / "models" / "presets"
PRESET_SECTIONS = {"model.language": "language.yaml", "model.vision": "vision.yaml"}
PATH_KEYS = (  # in which `~` is expanded
    "run_dir",
    "tokenizer",
    "data.train",
    "training.init_from",
    "validation.data",
    "validation.questions",
    "validation.images",
)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), preset: str | None = None) -> Recipe:
    """Read a recipe file, apply overrides, resolve presets and validate.

    Args:
        path: the YAML file. Paths inside it are relative to the current directory.
        overrides: `a.b=c` or `--a.b=c`; the value is YAML (`[vision, language]`, `null`, `1e-4`). `--a.b`
            alone is `--a.b=true`, for keys that are true or false.
        preset: changes the recipe before the overrides do; of megamm.recipe_presets.PRESETS.
    Raises:
        InputError: naming the file or override, the dotted key, what is wrong and the remedy.
    """
    raw = parse_yaml(_read_text(Path(path)), str(path))
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys, not {_shown(raw)}; see examples/quickstart")
    if preset is None:
        return recipe_from_dict(raw, str(path), overrides)
    changed = PRESETS[preset](recipe_from_dict(raw, str(path)))
    return recipe_from_dict(asdict(changed), f"{path} with preset {preset}", overrides)


def recipe_from_dict(raw: Mapping[str, Any], source: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Build a validated recipe from nested mappings, as `load_recipe` does from a file."""
    given = _section(raw, Recipe, "", source)
    for text in overrides:
        key, value = _parse_override(text)
        _set(given, key, value)
    for section, file in PRESET_SECTIONS.items():
        _merge_preset(given, section, file, source)
    for key in PATH_KEYS:
        _expand_home(_get_section(given, key.rpartition(".")[0]), key.rpartition(".")[2], key)
    sources = _get_section(given, "data").get("train")
    for i, entry in enumerate(sources if isinstance(sources, list) else ()):
        if isinstance(entry, dict):
            _expand_home(entry, "path", f"data.train[{i}].path")
    recipe = _build(given, Recipe, "", source)
    validate(recipe)
    return recipe


def recipe_to_yaml(recipe: Recipe) -> str:
    """The whole recipe as YAML, every key written; reading it back gives an equal recipe."""
    return yaml.dump(asdict(recipe), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)


def recipe_hash(recipe: Recipe) -> str:
    """sha256 (hex) of every value of the recipe; independent of order and layout of the file."""
    return hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode()).hexdigest()


def valid_keys() -> list[str]:
    """Every dotted key a recipe may have, in the order of megamm.config."""
    return list(_leaf_types())


# ---------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 and without duplicate keys."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a word", key_node.start_mark
                )
            if key_node.value in seen:
                problem = f"the key {key_node.value!r} stands twice; remove one"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: words that look like its numbers or booleans are quoted."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf)|\.nan",
        list("-+0123456789."),
    ),
}
for _tag, (_pattern, _first) in _SCALARS.items():
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _read_text(path: Path) -> str:
    try:
        return read_whole(path, MAX_RECIPE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text; give a recipe in YAML") from error
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise InputError(
                f"{path}: larger than 1 MiB, so it is no recipe; give the YAML file of a stage"
            ) from None
        raise InputError(f"{path}: {error.strerror or error}; give the path of a recipe file") from error


def parse_yaml(text: str, source: str) -> Any:
    """The plain values that a YAML text holds, whoever has written it: no objects, and no merged keys, with
    which a few lines stand for more than a memory holds.

    Args:
        source: for the message.
    Raises:
        InputError: with the line, what is wrong there and the remedy.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{source}, line {mark.line + 1}" if mark else source
        raise InputError(f"{where}: {error.problem}; correct the YAML") from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{source}: not readable as YAML ({line}); correct it") from error


def _parse_override(text: str) -> tuple[str, Any]:
    """("a.b", value) of `a.b=value` or `--a.b=value`; a key that takes text takes it verbatim. `--a.b` alone
    makes a key true that is true or false."""
    key, equals, value = text.removeprefix("--").partition("=")
    types = _leaf_types()
    stands_alone = not equals and text.startswith("--") and key in types
    if stands_alone and types[key] is not bool:
        raise InputError(
            f"override {text!r}: only a key that is true or false may stand alone; write it with '=' and "
            f"{_expected(types[key])}"
        )
    if stands_alone:
        return key, True
    if not equals or not key:
        raise InputError(f"override {text!r}: not of the form --section.key=value; write it with '='")
    if key not in types:
        raise _unknown_key(f"override {text!r}", key)
    parsed = parse_yaml(value, f"override {text!r}")
    takes_text = str in _alternatives(types[key]) and value not in ("null", "~")
    takes_lists = any(get_origin(kind) is list for kind in _alternatives(types[key]))
    if takes_text and not isinstance(parsed, str) and not (takes_lists and isinstance(parsed, (list, dict))):
        parsed = value
    return key, parsed


# ---------------------------------------------------------------- keys and presets


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _is_section(kind: Any) -> TypeGuard[type]:
    return is_dataclass(kind)


@functools.cache
def _leaf_types() -> dict[str, Any]:
    def walk(cls: type, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, kind in _hints(cls).items():
            if _is_section(kind):
                yield from walk(kind, f"{prefix}{name}.")
            else:
                yield prefix + name, kind

    return dict(walk(Recipe, ""))


def _unknown_key(source: str, key: str) -> InputError:
    if any(k.startswith(f"{key}.") for k in _leaf_types()):
        inside = next(k for k in _leaf_types() if k.startswith(f"{key}."))
        return InputError(f"{source}: {key} is a section, not a value; set a key in it such as {inside}")
    keys = valid_keys()
    same_name = [k for k in keys if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    close = same_name + difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    close += difflib.get_close_matches(key.rsplit(".", 1)[-1], [k.rsplit(".", 1)[-1] for k in keys], n=1)
    remedy = f"did you mean {close[0]}?" if close else "megamm/config/ lists the valid keys"
    return InputError(f"{source}: unknown key {key}; {remedy}")


def _section(raw: Any, cls: type, prefix: str, source: str) -> dict[str, Any]:
    """A copy of a mapping whose keys were all found in `cls`; an empty section counts as {}."""
    if raw is None:
        return {}
    name = prefix.rstrip(".")
    if not isinstance(raw, Mapping):
        raise InputError(f"{source}: {name} is a section, not {_shown(raw)}; indent its keys under it")
    hints, result = _hints(cls), {}
    for key, value in raw.items():
        if not isinstance(key, str) or key not in hints:
            if name.endswith("]"):  # an item of a list
                raise InputError(f"{source}: unknown key {prefix}{key}; {name} may have {', '.join(hints)}")
            raise _unknown_key(source, f"{prefix}{key}")
        kind = hints[key]
        result[key] = _section(value, kind, f"{prefix}{key}.", source) if _is_section(kind) else value
    return result


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, leaf = dotted.split(".")
    for name in sections:
        tree = tree.setdefault(name, {})
    tree[leaf] = value


def _get_section(tree: dict[str, Any], dotted: str) -> dict[str, Any]:
    for name in filter(None, dotted.split(".")):
        tree = tree.setdefault(name, {})
    return tree


def _expand_home(tree: dict[str, Any], leaf: str, key: str) -> None:
    """`~` in the value of `leaf`, which is `key` in full; raises InputError where it is no path."""
    value = tree.get(leaf)
    if value == "":  # a shell's variable that is not set, most likely; `null` is how nothing is meant
        raise InputError(f"{key}: is empty; give a path, or leave the key out")
    if not isinstance(value, str) or not value.startswith("~"):
        return
    try:
        tree[leaf] = str(Path(value).expanduser())
    except RuntimeError as error:
        raise InputError(
            f"{key}: the home directory of {value!r} is not known; write the path out"
        ) from error


@functools.cache
def _presets(file: str) -> dict[str, dict[str, Any]]:
    path = PRESET_DIR / file
    return parse_yaml(_read_text(path), str(path))


def _merge_preset(given: dict[str, Any], section: str, file: str, source: str) -> None:
    target = _get_section(given, section)
    name = target.get("preset")
    if name is None:
        return
    presets = _presets(file)
    if not isinstance(name, str) or name not in presets:
        close = difflib.get_close_matches(str(name), presets, n=1, cutoff=0.0)
        listed = ", ".join(presets)
        raise InputError(
            f"{source}: {section}.preset is {_shown(name)}, which is not a preset; "
            f"did you mean {close[0]}? (there are {listed})"
        )
    for key, value in presets[name].items():
        target.setdefault(key, value)


# ---------------------------------------------------------------- types


def _build(tree: dict[str, Any], cls: type, prefix: str, source: str) -> Any:
    """An instance of the dataclass `cls`; every value is checked against its annotation."""
    hints, values = _hints(cls), {}
    for spec in fields(cls):
        kind, key = hints[spec.name], f"{prefix}{spec.name}"
        if _is_section(kind):
            values[spec.name] = _build(tree.get(spec.name, {}), kind, f"{key}.", source)
        elif spec.name in tree:
            values[spec.name] = _typed(tree[spec.name], kind, key, source)
        elif spec.default is MISSING and spec.default_factory is MISSING:
            raise InputError(f"{source}: {key} is missing; give it {_expected(kind)}")
    return cls(**values)


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _typed(value: Any, kind: Any, key: str, source: str) -> Any:
    for alternative in _alternatives(kind):
        if isinstance(value, list) and _is_list_of_sections(alternative):
            return [
                _item(item, get_args(alternative)[0], f"{key}[{i}]", source) for i, item in enumerate(value)
            ]
        accepted, result = _convert(value, alternative)
        if accepted:
            return result
    hint = ""
    if isinstance(value, str) and value.startswith("$"):
        hint = " (environment variables are not expanded)"
    raise InputError(f"{source}: {key} is {_shown(value)}; it must be {_expected(kind)}{hint}")


def _is_list_of_sections(kind: Any) -> bool:
    return get_origin(kind) is list and _is_section(get_args(kind)[0])


def _item(value: Any, cls: type, key: str, source: str) -> Any:
    """An item of a list, as an instance of the dataclass `cls`."""
    if not isinstance(value, Mapping):
        raise InputError(f"{source}: {key} is {_shown(value)}; it must be {_expected(cls)}")
    return _build(_section(value, cls, f"{key}.", source), cls, f"{key}.", source)


def _convert(value: Any, kind: Any) -> tuple[bool, Any]:
    """(fits, value as `kind`). Whole floats count as integers (1e4 steps), integers as floats."""
    if get_origin(kind) is list:
        if not isinstance(value, list) or _is_list_of_sections(kind):
            return False, None
        items = [_convert(item, get_args(kind)[0]) for item in value]
        return all(fits for fits, _ in items), [item for _, item in items]
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind), value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        fits = is_number and abs(value) < 2**63 and value == int(value)  # also refuses inf and nan
        return fits, int(value) if fits else None
    if kind is float:
        fits = is_number and abs(value) < 1e300  # also refuses inf and nan
        return fits, float(value) if fits else None
    return isinstance(value, kind) and (kind is not str or _is_storable(value)), value


def _is_storable(text: str) -> bool:
    """Whether a text can be a path and be written to a file."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _expected(kind: Any) -> str:
    """A type in a user's words."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text (quoted)"}
    parts = []
    for alternative in _alternatives(kind):
        if get_origin(alternative) is list:
            parts.append(f"a list [..] whose items are {_expected(get_args(alternative)[0])}")
        elif get_origin(alternative) is Literal:
            parts.append("one of " + ", ".join(get_args(alternative)))
        elif _is_section(alternative):
            parts.append("{..} with " + ", ".join(_hints(alternative)))
        else:
            parts.append(names.get(alternative, "null"))
    return " or ".join(parts)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


def _shown(value: Any) -> str:
    """What was given, in YAML's words and never longer than a line."""
    words = {None: "empty (null)", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    return _short.repr(value)
