"""Reading the values of a Hugging Face config.json: typed, with the defaults of the class that wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megamm.errors import InputError


class Fields:
    """One section of a config.json. A key that is absent or null has its default.

    Every method raises InputError, naming file and key, for a value of the wrong kind.
    """

    def __init__(self, values: Any, defaults: Mapping[str, Any], where: str) -> None:
        if not isinstance(values, dict):
            raise InputError(f"{where}: is no JSON object; fetch config.json again")
        self.where = where
        self._values = values
        self._defaults = defaults

    def get(self, key: str) -> Any:
        """The value as it stands, or its default, or None."""
        value = self._values.get(key)
        return self._defaults.get(key) if value is None else value

    def integer(self, key: str) -> int:
        """A positive whole number."""
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._wrong(key, value, "a positive whole number")
        return value

    def number(self, key: str) -> float:
        """A number greater than zero."""
        value = self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self._wrong(key, value, "a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def triple(self, key: str, default: list[float]) -> list[float]:
        """Three numbers, none negative, one for each colour channel."""
        value = self.get(key)
        if value is None:
            return default
        if (
            not isinstance(value, list)
            or len(value) != 3
            or not all(isinstance(item, int | float) and 0 <= item < float("inf") for item in value)
        ):
            raise self._wrong(key, value, "a list of three numbers, none negative")
        return [float(item) for item in value]

    def one_of(self, key: str, choices: Mapping[str, str]) -> str:
        """A name, translated by `choices`."""
        value = self.get(key)
        if not isinstance(value, str) or value not in choices:
            raise self._wrong(key, value, f"one of {', '.join(sorted(choices))}")
        return choices[value]

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse values that megamm's models cannot express."""
        value = self.get(key)
        if value not in allowed:
            names = " or ".join(map(repr, allowed))
            raise InputError(
                f"{self.where}: {key} is {value!r}, megamm supports only {names}; choose another model"
            )

    def _wrong(self, key: str, value: Any, wanted: str) -> InputError:
        return InputError(f"{self.where}: {key} is {value!r}, but must be {wanted}; correct config.json")


def image_token_id(config: dict[str, Any], where: str) -> int | None:
    """The id of the image placeholder, where megamm wrote it: most published configurations have none."""
    fields = Fields(config, {}, where)
    return None if fields.get("image_token_id") is None else fields.integer("image_token_id")
