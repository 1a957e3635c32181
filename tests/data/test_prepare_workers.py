"""Work dealt over processes: results and errors in order, whoever does it, and no more ahead than allowed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from megamm.data.prepare_workers import WINDOW, in_order
from megamm.errors import InputError, RunError


def work(item: int) -> tuple[int, bytes]:
    """Late items are done early; the results do not fit a pipe."""
    if item == 77:
        raise InputError("item 77; mend it")
    if item == 88:
        raise ZeroDivisionError("a defect")
    if item == 99:
        os._exit(3)
    time.sleep(0.02 if item % 5 == 0 else 0)
    return item, bytes(200_000)


def items(*numbers: int) -> Iterator[int]:
    yield from numbers
    if numbers[-1] == 55:
        raise InputError("no more; mend it")


@pytest.mark.parametrize("workers", [1, 3])
def test_results_keep_their_order(workers: int) -> None:
    assert [number for number, _ in in_order(work, items(*range(40)), workers)] == list(range(40))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("numbers", "message"), [([1, 5, 77, 2, 55], "item 77"), ([5, 10, 55], "no more"), ([77, 55], "item 77")]
)
def test_the_first_error_is_raised_in_its_turn(workers: int, numbers: list[int], message: str) -> None:
    results = in_order(work, items(*numbers), workers)
    before = numbers[: numbers.index(77)] if 77 in numbers else numbers
    assert [next(results)[0] for _ in before] == before
    with pytest.raises(InputError, match=message):
        next(results)


def test_defects_and_deaths_are_told() -> None:
    with pytest.raises(RuntimeError, match=r"ZeroDivisionError: a defect"):
        list(in_order(work, items(1, 88, 2), 2))
    with pytest.raises(RunError, match=r"a worker process died \(exit code 3\); run the same command again"):
        list(in_order(work, items(1, 2, 99, 3), 2))


def test_few_items_are_ahead() -> None:
    taken = 0

    def counted() -> Iterator[int]:
        nonlocal taken
        for number in range(70):
            taken += 1
            yield number

    for number, _ in in_order(work, counted(), 2):
        assert taken <= number + 1 + 2 * WINDOW
