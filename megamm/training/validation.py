"""What is looked at while a stage is trained: the loss of held-out samples, and answers to a few questions.

Training goes on bit by bit as it would have without: nothing is drawn at random, no gradient is computed, and
modules are left in the mode they were in.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megamm.engine.ranks import from_rank_0
from megamm.inference.layout import LayoutModel
from megamm.training.held_out import HeldOut
from megamm.training.logging import RunLogger, read_metrics
from megamm.training.panels import Panels
from megamm.training.setup import Session


class Validation:
    """Looks at the model of a session (all of its methods but `due` are collective)."""

    def __init__(self, session: Session, logger: RunLogger | None) -> None:
        """
        Args:
            logger: rank 0's.
        Raises:
            MegammError: validation.data or validation.questions cannot be read; on every rank.
        """
        recipe, self._session, self._logger = session.recipe, session, logger
        self._held_out: HeldOut | None = None
        self._panels: Panels | None = None
        settings = recipe.validation
        if not settings.interval:
            return
        if settings.data is not None:
            self._held_out = HeldOut(recipe, session.tokenizer, session.groups)
            self._say(self._held_out.description)
        if settings.questions is not None:
            model = LayoutModel(session.wrapped, session.groups, recipe, session.tokenizer)
            self._panels = Panels(recipe, session.groups, model, session.progress.step)
            for line in self._panels.description:
                self._say(line)

    def due(self, step: int) -> bool:
        """Whether to look after `step`."""
        interval, last = self._session.recipe.validation.interval, self._session.recipe.training.steps
        return interval > 0 and (step % interval == 0 or step == last)

    def run(self, step: int) -> None:
        """Look at the model after `step`."""
        with evaluation_mode(self._session.wrapped), torch.no_grad():
            if self._held_out is not None:
                started = time.perf_counter()
                loss = self._held_out.loss(self._session.wrapped)
                if self._logger is not None:
                    self._logger.validation(step, loss, time.perf_counter() - started)
            if self._panels is not None:
                problem = self._panels.make(step)
                if problem is not None:
                    self._say(f"warning: {problem}")
                elif self._logger is not None:
                    self._logger.panels(step, self._panels.path(step))

    def catch_up(self, step: int) -> None:
        """Look at the model that a resumed run starts from, if it was due and the run was ended before."""
        if step and self.due(step) and from_rank_0(lambda: self._is_missing(step)):
            self.run(step)

    def _is_missing(self, step: int) -> bool:
        if self._panels is not None and not self._panels.exists(step):
            return True
        assert self._logger is not None
        rows = read_metrics(self._logger.validation_path)
        return self._held_out is not None and all(row["step"] != step for row in rows)

    def _say(self, line: str) -> None:
        if self._logger is not None:
            self._logger.event(line)


@contextmanager
def evaluation_mode(models: list[Any]) -> Iterator[None]:
    """Evaluation mode for all modules, each of which gets its own mode back."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
