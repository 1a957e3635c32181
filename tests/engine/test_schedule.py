"""Learning rates of the recipe's schedules, written out."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megamm.config import OptimizerConfig
from megamm.engine.optimizer import build_schedule

LR, MIN_LR = 0.4, 0.1


class Groups:
    """What a schedule sees of an optimizer."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{"wd_mult": 1.0}, {"wd_mult": 0.0}]

    @property
    def lr(self) -> float:
        return self.param_groups[0]["lr"]


def rates(total: int, num_steps: int | None = None, **settings: Any) -> list[float]:
    """The rate of each of the first steps."""
    optimizer = Groups()
    schedule = build_schedule(optimizer, OptimizerConfig(lr=LR, min_lr=MIN_LR, **settings), total)  # type: ignore[arg-type]
    found = []
    for _ in range(num_steps or total + 1):
        found.append(optimizer.lr)
        schedule.step(1)
    return found


def test_warm_up_is_linear_from_zero() -> None:
    for kind in ("cosine", "linear", "constant"):
        found = rates(20, 5, schedule=kind, warmup_steps=4)
        assert found == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4]), kind


def test_cosine() -> None:
    found = rates(20, 26, schedule="cosine", warmup_steps=4)
    for step in range(4, 26):
        done = min(1.0, (step - 4) / 16)
        wanted = MIN_LR + (LR - MIN_LR) * 0.5 * (1 + math.cos(math.pi * done))
        assert found[step] == pytest.approx(wanted), step
    assert found[12] == pytest.approx(0.25) and found[20] == found[25] == pytest.approx(MIN_LR)


def test_linear() -> None:
    found = rates(10, 13, schedule="linear")
    assert found == pytest.approx([LR - 0.03 * step for step in range(11)] + [MIN_LR, MIN_LR])


def test_constant_stays_at_its_height() -> None:
    assert rates(10, 15, schedule="constant", warmup_steps=2) == pytest.approx([0.0, 0.2] + [LR] * 13)


def test_decay_steps_of_their_own() -> None:
    found = rates(10, schedule="linear", decay_steps=5)
    assert found == pytest.approx([0.4, 0.34, 0.28, 0.22, 0.16] + [MIN_LR] * 6)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_a_warm_up_longer_than_the_run_never_ends(kind: str) -> None:
    found = rates(10, schedule=kind, warmup_steps=40)
    assert found == pytest.approx([LR * step / 40 for step in range(11)])


def test_weight_decay_stays() -> None:
    optimizer = Groups()
    settings = OptimizerConfig(lr=LR, weight_decay=0.3, warmup_steps=2)
    schedule = build_schedule(optimizer, settings, 6)  # type: ignore[arg-type]
    for _ in range(8):
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
        schedule.step(1)


def test_several_steps_at_once_are_as_many_single_ones() -> None:
    """How a resumed run gets its rate."""
    settings = OptimizerConfig(lr=LR, min_lr=MIN_LR, warmup_steps=3)
    resumed = Groups()
    build_schedule(resumed, settings, 20).step(7)  # type: ignore[arg-type]
    assert resumed.lr == rates(20, 8, warmup_steps=3)[7]
