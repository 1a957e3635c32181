"""The language in which a weight mapping is written: one table, read in both directions.

A table is a list of rules. Each rule names one tensor of megamm ("ours"), the tensors of the other
format that hold the same numbers ("theirs"), and the shapes of the latter; it can compute either side
from the other, bit for bit (rows are only moved, never recomputed). `Table` checks that every key of
both sides is accounted for exactly once.

A name may hold `{n}`, which `repeat` replaces by the layer index.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from megamm.errors import InputError

Shape = tuple[int, ...]
_MAX_LISTED = 5


@dataclass(frozen=True)
class Rule:
    """One tensor of ours and what it is made of. Subclasses say how."""

    ours: str

    @property
    def theirs(self) -> tuple[str, ...]:
        """Keys of the other format, in the order `to_ours` takes them."""
        raise NotImplementedError

    def their_shapes(self) -> list[Shape]:
        """Shape of each of `theirs`."""
        raise NotImplementedError

    def our_shape(self) -> Shape:
        """Shape of `ours` without padding."""
        raise NotImplementedError

    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        """Theirs to ours; shapes have been checked."""
        raise NotImplementedError

    def to_theirs(self, tensor: Tensor) -> list[Tensor]:
        """Ours to theirs; the shape has been checked."""
        raise NotImplementedError

    def accepts(self, shape: Shape) -> bool:
        """Whether our tensor may have this shape."""
        return shape == self.our_shape()

    def our_pieces(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """`to_ours` cut into tensors that follow each other, views of theirs where only rows move."""
        return [self.to_ours(tensors)]

    def their_pieces(self, tensor: Tensor) -> list[list[Tensor]]:
        """`to_theirs`, each cut into tensors that follow each other, views of ours where only rows move."""
        return [[part] for part in self.to_theirs(tensor)]


@dataclass(frozen=True)
class Rename(Rule):
    """The same tensor under another name."""

    their: str
    shape: Shape

    @property
    def theirs(self) -> tuple[str, ...]:
        return (self.their,)

    def their_shapes(self) -> list[Shape]:
        return [self.shape]

    def our_shape(self) -> Shape:
        return self.shape

    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0]

    def to_theirs(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]


@dataclass(frozen=True)
class Concat(Rule):
    """Tensors of equal `shape`, concatenated along `dim` in the order given."""

    parts: tuple[str, ...]
    shape: Shape
    dim: int = 0

    @property
    def theirs(self) -> tuple[str, ...]:
        return self.parts

    def their_shapes(self) -> list[Shape]:
        return [self.shape] * len(self.parts)

    def our_shape(self) -> Shape:
        sizes = list(self.shape)
        sizes[self.dim] *= len(self.parts)
        return tuple(sizes)

    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors), dim=self.dim)

    def to_theirs(self, tensor: Tensor) -> list[Tensor]:
        return list(tensor.chunk(len(self.parts), dim=self.dim))

    def our_pieces(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors) if self.dim == 0 else [self.to_ours(tensors)]


def GateUp(ours: str, gate: str, up: str, shape: Shape) -> Concat:
    """The two input projections of a gated feed-forward: gate rows, then up rows."""
    return Concat(ours, (gate, up), shape)


@dataclass(frozen=True)
class InterleaveQKV(Rule):
    """Attention projections packed group by group: the q heads of a kv group, its k head, its v head.

    `rest` is the shape behind the rows: (hidden,) for a weight, () for a bias.
    """

    q: str
    k: str
    v: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rest: Shape = ()

    @property
    def theirs(self) -> tuple[str, ...]:
        return (self.q, self.k, self.v)

    def their_shapes(self) -> list[Shape]:
        kv = (self.num_kv_heads * self.head_dim, *self.rest)
        return [(self.num_heads * self.head_dim, *self.rest), kv, kv]

    def our_shape(self) -> Shape:
        return ((self.num_heads + 2 * self.num_kv_heads) * self.head_dim, *self.rest)

    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        grouped = [tensor.reshape(self.num_kv_heads, -1, *self.rest) for tensor in tensors]
        return torch.cat(grouped, dim=1).reshape(self.our_shape())

    def to_theirs(self, tensor: Tensor) -> list[Tensor]:
        parts = self._split(tensor)
        return [part.reshape(shape) for part, shape in zip(parts, self.their_shapes(), strict=True)]

    def our_pieces(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        grouped = [tensor.reshape(self.num_kv_heads, -1, *self.rest) for tensor in tensors]
        return [part[group] for group in range(self.num_kv_heads) for part in grouped]

    def their_pieces(self, tensor: Tensor) -> list[list[Tensor]]:
        return [list(part) for part in self._split(tensor)]

    def _split(self, tensor: Tensor) -> Sequence[Tensor]:
        q_rows = self.num_heads // self.num_kv_heads * self.head_dim
        grouped = tensor.reshape(self.num_kv_heads, -1, *self.rest)
        return grouped.split([q_rows, self.head_dim, self.head_dim], dim=1)


@dataclass(frozen=True)
class PadRows(Rule):
    """A table of rows whose end ours pads with zeros (a vocabulary shared out over processes).

    Attributes:
        shape: without padding.
        padded_rows: rows that `to_ours` makes; None adds none. Any padding is taken off by `to_theirs`.
    """

    their: str
    shape: Shape
    padded_rows: int | None = None

    @property
    def theirs(self) -> tuple[str, ...]:
        return (self.their,)

    def their_shapes(self) -> list[Shape]:
        return [self.shape]

    def our_shape(self) -> Shape:
        return (self.padded_rows or self.shape[0], *self.shape[1:])

    def accepts(self, shape: Shape) -> bool:
        return len(shape) == len(self.shape) and shape[1:] == self.shape[1:] and shape[0] >= self.shape[0]

    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        missing = self.our_shape()[0] - self.shape[0]
        if not missing:
            return tensors[0]
        return torch.cat([tensors[0], tensors[0].new_zeros(missing, *self.shape[1:])])

    def to_theirs(self, tensor: Tensor) -> list[Tensor]:
        return [tensor[: self.shape[0]]]


@dataclass(frozen=True)
class Reshape(Rule):
    """The same numbers in the same order under another shape, as in a leading dimension of one."""

    their: str
    shape: Shape
    their_shape: Shape

    @property
    def theirs(self) -> tuple[str, ...]:
        return (self.their,)

    def their_shapes(self) -> list[Shape]:
        return [self.their_shape]

    def our_shape(self) -> Shape:
        return self.shape

    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].reshape(self.shape)

    def to_theirs(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.reshape(self.their_shape)]


@dataclass(frozen=True)
class KeysValues(Rule):
    """Key and value projections of cross-attention: theirs all keys, then all values, in one tensor (one
    name in `parts`) or in two; ours head by head, so that a shard holds whole heads.

    `rest` is the shape behind the rows: (width,) for a weight, () for a bias.
    """

    parts: tuple[str, ...]
    num_heads: int
    head_dim: int
    rest: Shape = ()

    @property
    def theirs(self) -> tuple[str, ...]:
        return self.parts

    def their_shapes(self) -> list[Shape]:
        return [(2 // len(self.parts) * self.num_heads * self.head_dim, *self.rest)] * len(self.parts)

    def our_shape(self) -> Shape:
        return (2 * self.num_heads * self.head_dim, *self.rest)

    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        both = torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]
        split = both.reshape(2, self.num_heads, self.head_dim, *self.rest)
        return split.transpose(0, 1).reshape(self.our_shape())

    def to_theirs(self, tensor: Tensor) -> list[Tensor]:
        split = tensor.reshape(self.num_heads, 2, self.head_dim, *self.rest).transpose(0, 1)
        parts = split.chunk(len(self.parts))
        return [part.reshape(shape) for part, shape in zip(parts, self.their_shapes(), strict=True)]


@dataclass(frozen=True)
class StackedRows(Rule):
    """A table of rows that theirs keeps in pieces (a vocabulary, and the tokens added to it), ours in one
    that may be padded with zeros at its end.

    Attributes:
        rows: of each piece.
        padded_rows: as in `PadRows`.
    """

    parts: tuple[str, ...]
    rows: tuple[int, ...]
    rest: Shape
    padded_rows: int | None = None

    @property
    def theirs(self) -> tuple[str, ...]:
        return self.parts

    def their_shapes(self) -> list[Shape]:
        return [(rows, *self.rest) for rows in self.rows]

    def our_shape(self) -> Shape:
        return (self.padded_rows or sum(self.rows), *self.rest)

    def accepts(self, shape: Shape) -> bool:
        return len(shape) == 1 + len(self.rest) and shape[1:] == self.rest and shape[0] >= sum(self.rows)

    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        missing = self.our_shape()[0] - sum(self.rows)
        return torch.cat([*tensors, *[tensors[0].new_zeros(missing, *self.rest)] * (missing > 0)])

    def to_theirs(self, tensor: Tensor) -> list[Tensor]:
        return list(tensor[: sum(self.rows)].split(list(self.rows)))


@dataclass(frozen=True)
class Skip:
    """Keys of theirs that ours has no use for: a regular expression over the whole key, and why."""

    pattern: str
    reason: str


_R = TypeVar("_R", bound=Rule)


def _at_layer(rule: _R, index: int) -> _R:
    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("{n}", str(index))
        if isinstance(value, tuple):
            return tuple(fill(item) for item in value)
        return value

    return replace(rule, **{f.name: fill(getattr(rule, f.name)) for f in fields(rule)})


def repeat(count: int, rules: Sequence[Rule]) -> list[Rule]:
    """The rules once for each layer index 0..count-1 in the place of `{n}`."""
    return [_at_layer(rule, index) for index in range(count) for rule in rules]


@dataclass
class Table:
    """A complete mapping between two sets of keys.

    Attributes:
        rules: one for each tensor of ours.
        skips: keys of theirs that are left out on import, each with its reason.
        aliases: (old prefix, canonical prefix) of their key names, applied one after another; other
            releases of the same format differ only in these.
    """

    rules: list[Rule]
    skips: list[Skip] = field(default_factory=list)
    aliases: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for side, keys in (("ours", self.our_keys()), ("theirs", self.their_keys())):
            names = list(keys)
            if len(set(names)) != len(names):
                raise ValueError(f"the table names a key of {side} twice")

    def our_keys(self) -> Iterator[str]:
        return (rule.ours for rule in self.rules)

    def their_keys(self) -> Iterator[str]:
        return (key for rule in self.rules for key in rule.theirs)

    def canonical(self, key: str) -> str:
        """The name this table uses for a key of theirs."""
        for old, new in self.aliases:
            if key.startswith(old):
                key = new + key.removeprefix(old)
        return key

    def canonical_keys(self, keys: Iterable[str], where: str) -> dict[str, str]:
        """Canonical name -> name in the file.

        Raises:
            InputError: two keys of the file stand for the same tensor.
        """
        names: dict[str, str] = {}
        for key in keys:
            name = self.canonical(key)
            if name in names:
                raise InputError(
                    f"{where}: {names[name]} and {key} both stand for {name}; remove one of them"
                )
            names[name] = key
        return names

    def skip_reason(self, key: str) -> str | None:
        """Why a (canonical) key of theirs is left out, or None if it is not."""
        for skip in self.skips:
            if re.fullmatch(skip.pattern, key):
                return skip.reason
        return None

    def account(self, theirs: Iterable[str], where: str) -> dict[str, str]:
        """Check that the canonical keys are exactly those of the table; returns skipped key -> reason.

        Raises:
            InputError: keys are missing or left over.
        """
        wanted, there = set(self.their_keys()), set(theirs)
        reasons = {key: self.skip_reason(key) for key in there - wanted}
        _refuse_difference(
            wanted - there,
            {key for key, reason in reasons.items() if reason is None},
            where,
            "convert a complete model of the architecture that its config.json names",
        )
        return {key: reason for key, reason in reasons.items() if reason is not None}

    def account_ours(self, ours: Iterable[str], where: str) -> None:
        """Check that our keys are exactly those of the table.

        Raises:
            InputError: keys are missing or left over.
        """
        wanted, there = set(self.our_keys()), set(ours)
        _refuse_difference(
            wanted - there, there - wanted, where, "use the recipe that these weights were trained with"
        )


def listed(keys: Iterable[str]) -> str:
    """The first few keys in order, and how many there are in all."""
    names = sorted(keys)
    more = f", ... ({len(names)} in all)" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more


def _refuse_difference(missing: set[str], unknown: set[str], where: str, remedy: str) -> None:
    found = []
    if missing:
        found.append(f"{len(missing)} missing key(s): {listed(missing)}")
    if unknown:
        found.append(f"{len(unknown)} unknown key(s): {listed(unknown)}")
    if found:
        raise InputError(f"{where}: weights and configuration differ, {'; '.join(found)}; {remedy}")
