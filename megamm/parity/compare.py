"""What differs between one process and a layout: loss, gradients by group, and where it starts.

Differences are relative to the largest element of each tensor. That says nothing about a tensor whose
gradient is a sum that cancels, so two kinds are measured by the largest of their group instead: gradients
that are zero but for rounding (below a millionth of it: the bias of keys, which softmax does not see), and
single numbers (gates), which are compared with the largest of such.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megamm.models.freezing import part_of
from megamm.parity.layouts import Layout

Run = dict[str, Any]  # what worker.run returns
ROUNDING = 1e-6
INFINITE = float("inf")
GROUPS = ("vision", "connector", "cross_attention", "embedding", "attention", "mlp", "lora", "output")


@dataclass(frozen=True)
class Difference:
    """A relative difference and whose it is."""

    value: float
    name: str


@dataclass(frozen=True)
class Divergence:
    """Where a layout leaves the reference.

    Attributes:
        kind: "activation" or "gradient".
        name: module or parameter.
        value: relative difference; infinite where there is nothing to compare.
        place: micro-batch and rank, in words; "" for gradients.
    """

    kind: str
    name: str
    value: float
    place: str = ""


@dataclass(frozen=True)
class Comparison:
    """A layout against one process.

    Attributes:
        loss, grad_norm: relative differences.
        gradients: by group, the largest.
        first: where it diverges, if it does.
    """

    loss: float
    grad_norm: float
    gradients: dict[str, Difference]
    first: Divergence | None

    @property
    def largest(self) -> float:
        """Of all differences of results."""
        return max(self.loss, self.grad_norm, *(d.value for d in self.gradients.values()))


def compare(reference: Run, ranks: Sequence[Run], layout: Layout, tolerance: float) -> Comparison:
    """Compare what the ranks of a layout did with the only rank of the reference.

    Args:
        tolerance: a result that differs by more starts the search for the first divergence.
    """
    by_name = _gradient_differences(reference["gradients"], [rank["gradients"] for rank in ranks])
    groups: dict[str, Difference] = {}
    for name, value in by_name.items():
        group = group_of(name)
        if group not in groups or not value <= groups[group].value:
            groups[group] = Difference(value, name)
    found = Comparison(
        loss=max(_relative(rank["loss"], reference["loss"]) for rank in ranks),
        grad_norm=max(_relative(rank["grad_norm"], reference["grad_norm"]) for rank in ranks),
        gradients={group: groups[group] for group in GROUPS if group in groups},
        first=None,
    )
    if found.largest <= tolerance:
        return found
    first = _first_activation(reference, ranks, layout, tolerance) or _first_gradient(
        reference["backward_order"], by_name, tolerance
    )
    return Comparison(found.loss, found.grad_norm, found.gradients, first)


def group_of(name: str) -> str:
    """One of `GROUPS` for a parameter's checkpoint name; the decoder's norms belong to what they precede."""
    part = part_of(name)
    if part != "language":
        return part
    for group, mark in (("embedding", ".embedding."), ("attention", ".self_attention."), ("mlp", ".mlp.")):
        if mark in name:
            return group
    return "output"


def _relative(value: float, reference: float) -> float:
    return _nan_is_infinite(abs(value - reference) / max(abs(reference), 1e-30))


def _nan_is_infinite(value: float) -> float:
    return value if value == value else INFINITE


# --- gradients ------------------------------------------------------------------------------------------


def _gradient_differences(
    reference: Mapping[str, list[Any]], ranks: Sequence[Mapping[str, list[Any]]]
) -> dict[str, float]:
    """By parameter, the largest relative difference of any rank's piece; infinite where a gradient, or a
    part of it, is missing or too many."""
    whole = {name: _whole(pieces) for name, pieces in reference.items()}
    scales = _scales(whole)
    differences = dict.fromkeys(whole, 0.0)
    covered: dict[str, dict[Any, int]] = defaultdict(dict)
    for rank in ranks:
        for name, pieces in rank.items():
            for place, values in pieces:
                if name not in whole:
                    differences[name] = INFINITE
                    continue
                want, got, beyond = _overlap(whole[name], place, values)
                covered[name][tuple(map(tuple, place))] = want.numel()
                distance = max(_largest(got - want), beyond)
                differences[name] = max(differences[name], _nan_is_infinite(distance / scales[name]))
    for name, tensor in whole.items():
        if sum(covered[name].values()) != tensor.numel():
            differences[name] = INFINITE
    return differences


def _whole(pieces: list[Any]) -> torch.Tensor:
    """A tensor of the reference, whose only rank holds all pieces of it (gate and up of a SwiGLU are two)."""
    shape = [max(ends) for ends in zip(*([stop for _, stop in place] for place, _ in pieces), strict=True)]
    tensor = torch.zeros(shape)
    for place, values in pieces:
        tensor[tuple(slice(start, stop) for start, stop in place)] = values
    return tensor


def _scales(gradients: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """What the differences of each gradient are divided by."""
    largest = {name: _largest(tensor) for name, tensor in gradients.items()}
    of_group: dict[tuple[str, bool], float] = defaultdict(float)
    for name, size in largest.items():
        kind = (group_of(name), gradients[name].numel() == 1)
        of_group[kind] = max(of_group[kind], size)
    scales = {}
    for name, size in largest.items():
        is_number = gradients[name].numel() == 1
        most = of_group[group_of(name), is_number]
        scales[name] = max(most if is_number or size < ROUNDING * most else size, 1e-30)
    return scales


def _overlap(
    whole: torch.Tensor, place: list[tuple[int, int]], values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The reference's values at `place`, the piece's own, and the largest of the piece beyond the reference
    (rows that pad a vocabulary, whose gradient must be zero)."""
    want = whole[tuple(slice(start, stop) for start, stop in place)]
    got = values[tuple(slice(0, size) for size in want.shape)]
    beyond = _largest(values) if not want.numel() else _largest(values[want.shape[0] :])
    return want, got, beyond


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _first_gradient(order: list[str], differences: dict[str, float], tolerance: float) -> Divergence | None:
    """The parameter behind which, in the order of the backward pass, gradients are wrong."""
    unordered = [name for name in differences if name not in order]
    for name in [*order, *unordered]:
        if not differences[name] <= tolerance:
            return Divergence("gradient", name, differences[name])
    return None


# --- activations ----------------------------------------------------------------------------------------


def _first_activation(
    reference: Run, ranks: Sequence[Run], layout: Layout, tolerance: float
) -> Divergence | None:
    """The module, in the order of the forward pass, whose output first differs in any micro-batch."""
    modules = {name: None for record in reference["activations"].values() for name in record}
    for name in modules:
        worst: Divergence | None = None
        seen = False
        for number, rank in enumerate(ranks):
            for micro_batch, want, got in _outputs(name, reference, rank):
                seen = True
                value = _output_difference(name, want, got, rank, layout)
                if worst is None or value > worst.value:
                    worst = Divergence("activation", name, value, f"micro-batch {micro_batch}, rank {number}")
        if not seen:
            return Divergence("activation", name, INFINITE, "not run in this layout")
        if worst is not None and worst.value > tolerance:
            return worst
    return None


def _outputs(name: str, reference: Run, rank: Run) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(number of the micro-batch, output of the reference, output on the rank) where the rank has it."""
    for number, (micro_batch, record) in enumerate(reference["activations"].items()):
        got = rank["activations"].get(micro_batch, {}).get(name)
        if got is not None:
            yield number, record[name], got


def _output_difference(name: str, whole: torch.Tensor, got: torch.Tensor, rank: Run, layout: Layout) -> float:
    """Relative to the largest element of the whole output."""
    scale = max(_largest(whole), 1e-30)
    if name.startswith("vision."):
        # images are dealt over the tensor-parallel ranks, padded to equal shares
        share = whole[rank["tensor"] * len(got) : (rank["tensor"] + 1) * len(got)]
        got = got[: len(share)]
    elif len(got) == len(whole):
        share = whole
    else:
        share = _share_of_sequence(whole, rank, layout, has_shards=len(got) * layout.context < len(whole))
    return _nan_is_infinite(_largest(got - share) / scale) if got.shape == share.shape else INFINITE


def _share_of_sequence(whole: torch.Tensor, rank: Run, layout: Layout, has_shards: bool) -> torch.Tensor:
    """What a rank has of a sequence: two of 2 C chunks under context parallelism (megamm.layers.context), and
    of these, under sequence parallelism, its shard."""
    part, num_chunks = whole, 2 * layout.context
    if layout.context > 1 and len(whole) >= num_chunks:
        chunks = whole.chunk(num_chunks)
        part = torch.cat([chunks[rank["context"]], chunks[num_chunks - 1 - rank["context"]]])
    return part.chunk(layout.tensor)[rank["tensor"]] if has_shards else part
