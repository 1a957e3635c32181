"""Where a run goes on that came to its position with other datasets, or why it cannot.

A run can go on as long as the same sources form the same groups in the same proportions: its numbers of
samples then mean what they meant. Sources may have moved, and may have been prepared again with more or fewer
samples; that changes their order, which is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megamm.data.blend import Blend, Position
from megamm.errors import InputError

REMEDY = "set data as in the recipe.yaml of the checkpoint, or start a new stage with training.init_from and"
REMEDY += " another run_dir"


def resumed_position(
    blend: Blend, given: int | Sequence[int], saved: Sequence[dict[str, Any]]
) -> tuple[Position, list[str]]:
    """The position of a run in `blend`, and remarks for its log.

    Args:
        given: its numbers of samples; one alone is that of the only group, and 0 or nothing the start.
        saved: `Blend.contents` of when they were counted; nothing: not known, as in older checkpoints.

    Raises:
        InputError: they were counted in other groups.
    """
    numbers = [given] if isinstance(given, int) else list(given)
    if not any(numbers):
        return (0,) * len(blend.groups), []
    now = blend.contents()
    if len(saved) == len(now) == 1:  # one dataset, whatever it is called
        saved = [{**saved[0], "source": now[0]["source"], "rate": now[0]["rate"]}]
    if saved and (problem := _difference(saved, now)):
        raise InputError(f"data.train: {problem}, so the run cannot go on where it stopped; {REMEDY}")
    if len(numbers) != len(blend.groups):
        raise InputError(
            f"data.train: its samples form {len(blend.groups)} groups that share no step, but the checkpoint "
            f"counts {len(numbers)}, so the run cannot go on where it stopped; {REMEDY}"
        )
    return tuple(numbers), _remarks(saved, now)


def _difference(saved: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> str:
    """What forbids to go on, in words."""
    was, here = _by_source(saved), _by_source(now)
    if gone := [name for name in was if name not in here]:
        return f"the run was trained on {', '.join(gone)} too"
    if new := [name for name in here if name not in was]:
        return f"the run was not trained on {', '.join(new)} so far"
    for name, parts in here.items():
        if [part["kind"] for part in parts] != [part["kind"] for part in was[name]]:
            return f"data.pure_batches was another, or the kinds of samples that {name} has"
        if [part["group"] for part in parts] != [part["group"] for part in was[name]]:
            return f"{name} shared its steps with other sources (their order or sequence_length was another)"
        if parts[0]["rate"] != was[name][0]["rate"]:
            return f"{name} had {was[name][0]['rate']}, and now has {parts[0]['rate']}"
    if list(was) != list(here):  # of one group, they take turns in the order in which they are named
        return f"its sources stood in another order ({', '.join(was)})"
    return ""


def _remarks(saved: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> list[str]:
    remarks = []
    for before, part in zip(saved, now, strict=False):
        name, size = part["source"], part["samples"]
        if before["samples"] != size:
            remarks.append(
                f"{name} had {before['samples']:,} samples when the checkpoint was saved and has {size:,} "
                "now; they come in another order from here on, so that some come again early"
            )
        elif before["fingerprint"] != part["fingerprint"]:
            remarks.append(
                f"{name} was prepared otherwise since the checkpoint was saved, so its samples are others"
            )
    return remarks


def _by_source(contents: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for part in contents:
        found.setdefault(part["source"], []).append(part)
    return found
