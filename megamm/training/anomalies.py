"""Which updates are left out, and when a run goes back: losses and gradients that are no numbers, and spikes.

Everything here is decided from numbers that all ranks have in common and from the state that checkpoints
keep, so a resumed run decides as one that was not interrupted. Going back to an earlier checkpoint and
leaving out the data that came before a spike is what Chowdhery et al. 2022 (PaLM, section 5.1) did by hand.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum
from statistics import median
from typing import Any, Literal

from megamm.config import AnomaliesConfig

Consequence = Literal["go on", "roll back", "stop"]


class Objection(IntEnum):
    """What speaks against an update; of several, the greatest counts."""

    NONE = 0
    SPIKE = 1
    NON_FINITE = 2


@dataclass
class AnomalyState:
    """What a checkpoint keeps of the policy.

    Attributes:
        skipped_steps: updates left out since the start of the stage.
        in_a_row: of these, the last ones without an update between them.
        rollbacks: how often the run went back.
        losses: by group of sources, the losses of its last updates.
    """

    skipped_steps: int = 0
    in_a_row: int = 0
    rollbacks: int = 0
    losses: dict[str, list[float]] = field(default_factory=dict)


class AnomalyPolicy:
    """Judges each step of a stage.

    Attributes:
        skipped_steps, in_a_row, rollbacks: as in AnomalyState.
    """

    def __init__(self, config: AnomaliesConfig, state: dict[str, Any] | None = None) -> None:
        """
        Args:
            state: `state()` of the run that goes on; None or empty: a new one begins.
        """
        self._config = config
        known = AnomalyState(**(state or {}))
        self.skipped_steps, self.in_a_row, self.rollbacks = (
            known.skipped_steps,
            known.in_a_row,
            known.rollbacks,
        )
        self._losses = {name: deque(kept, config.spike_window) for name, kept in known.losses.items()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to keep; JSON."""
        losses = {name: list(kept) for name, kept in sorted(self._losses.items())}
        return vars(AnomalyState(self.skipped_steps, self.in_a_row, self.rollbacks, losses))

    def objection(self, loss: float, grad_norm: float, group: int) -> Objection:
        """What speaks against the update.

        Args:
            loss: of the step, the mean per token.
            grad_norm: before clipping.
            group: number of the group of sources whose samples these are: their losses are compared with
                each other alone.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return Objection.NON_FINITE
        usual = self.usual_loss(group)
        is_spike = usual is not None and loss > self._config.spike_factor * usual
        return Objection.SPIKE if is_spike else Objection.NONE

    def usual_loss(self, group: int) -> float | None:
        """The median of the last losses of a group; None as long as there are too few, or none counts."""
        kept = self._losses.get(str(group), ())
        return median(kept) if kept and len(kept) == self._config.spike_window else None

    def updated(self, loss: float, group: int) -> None:
        """The update was made."""
        self.in_a_row = 0
        if self._config.spike_factor:
            self._losses.setdefault(str(group), deque(maxlen=self._config.spike_window)).append(loss)

    def skipped(self, objection: Objection) -> Consequence:
        """The update was left out because of `objection`; says what follows from that."""
        self.skipped_steps += 1
        self.in_a_row += 1
        if objection is Objection.NON_FINITE and self._config.non_finite == "stop":
            return "stop"
        if self.in_a_row < self._config.in_a_row:
            return "go on"
        return "roll back" if self.rollbacks < self._config.max_rollbacks else "stop"

    def rolled_back(self) -> None:
        """The run went back. What was left out stays counted; the usual losses are learnt anew."""
        self.rollbacks += 1
        self.in_a_row = 0
        self._losses.clear()
