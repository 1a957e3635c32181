"""A stage, from its recipe to its last step: what `megamm train` runs on every rank."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist

from megamm.config import Recipe
from megamm.device import device_name
from megamm.engine.groups import Groups
from megamm.recipe import recipe_to_yaml
from megamm.training.environment import record_start
from megamm.training.heartbeat import Heartbeats
from megamm.training.logging import RunLogger
from megamm.training.loop import Loop, Watchers
from megamm.training.setup import Session, build_session
from megamm.training.stopping import StopRequests, until_a_rank_is_lost
from megamm.training.wandb_run import check_wandb
from megamm.training.watchdog import Watchdog, Whereabouts
from megamm.training.watchdog.slow_ranks import WorkMeter


def train(recipe: Recipe) -> int:
    """Run the stage that `recipe` describes, from its start or from the newest checkpoint of its run
    directory, to its last step; every rank of the run calls this. Returns the exit code: 0, or
    `stopping.STOPPED` if a signal ended the run after a checkpoint.

    Raises:
        InputError, RunError: with the remedy; on every rank.
        RankLost: another rank has died; this process must end, too.
    """
    early_lines: list[str] = []  # the logger needs to know where the run resumes
    check_wandb(recipe)
    here = Whereabouts()
    with ExitStack() as stack:
        heartbeats = stack.enter_context(Heartbeats(os.environ))
        stop_requests = stack.enter_context(StopRequests())
        stack.enter_context(until_a_rank_is_lost(here, stop_requests))

        def joined(layout: Groups) -> None:
            stop_requests.listen(layout.device)
            stack.enter_context(Watchdog(recipe, layout, here))

        session = build_session(recipe, early_lines.append, joined)
        stack.enter_context(session.lock)
        here.step = session.progress.step
        here.know_modules(session.models)
        record_start(recipe.run_dir, session.progress.step, session.groups.device)
        logger = _logger(session, early_lines)
        if logger is not None:
            stack.enter_context(logger)
        meter = stack.enter_context(WorkMeter(here))
        return Loop(session, logger, Watchers(stop_requests, heartbeats, here, meter)).run()


def _logger(session: Session, early_lines: list[str]) -> RunLogger | None:
    """The logger of rank 0, with the resolved recipe stored beside its files."""
    if dist.get_rank() != 0:
        return None
    recipe = session.recipe
    run_dir = Path(recipe.run_dir)
    logger = RunLogger(
        run_dir,
        recipe,
        recipe.training.steps,
        start_step=session.progress.step,
        world_size=dist.get_world_size(),
        device_name=device_name(session.groups.device),
    )
    (run_dir / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    for line in early_lines:
        logger.event(line)
    return logger
