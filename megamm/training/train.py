"""The training loop: data, forward and backward, update, log, checkpoint."""

from __future__ import annotations

import math
import time
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megamm.batch import Batch
from megamm.config import Recipe
from megamm.device import device_name, memory_used
from megamm.engine import groups
from megamm.engine.checkpoint import Progress
from megamm.engine.pipeline import forward_backward
from megamm.errors import RunError
from megamm.recipe import recipe_to_yaml
from megamm.training.environment import record_start
from megamm.training.feed import BatchFeed
from megamm.training.logging import RunLogger, StepStats
from megamm.training.setup import Session, build_session
from megamm.training.stopping import STOPPED, StopRequests
from megamm.training.validation import Validation
from megamm.training.wandb_run import check_wandb


def train(recipe: Recipe) -> int:
    """Run the stage that `recipe` describes, from its start or from the newest checkpoint of its run
    directory, to its last step; every rank of the run calls this. Returns the exit code: 0, or
    `stopping.STOPPED` if a signal ended the run after a checkpoint.

    Raises:
        InputError, RunError: with the remedy; on every rank.
    """
    early_lines: list[str] = []  # the logger needs to know where the run resumes
    check_wandb(recipe)
    try:
        session = build_session(recipe, early_lines.append)
        record_start(recipe.run_dir, session.progress.step, session.groups.device)
        logger = _logger(session, early_lines)
        with logger or nullcontext(), StopRequests(session.groups.device) as stop_requests:
            return _run(session, logger, stop_requests)
    finally:
        groups.shutdown()


def _run(session: Session, logger: RunLogger | None, stop_requests: StopRequests) -> int:
    """The steps that are left; returns the exit code."""
    recipe, progress = session.recipe, session.progress
    validation = Validation(session, logger)
    validation.catch_up(progress.step)
    if progress.step >= recipe.training.steps:
        _say(logger, f"nothing to do: the run has its {recipe.training.steps} steps")
        return 0
    quarantine = Path(recipe.run_dir) / "quarantine.jsonl"
    feed = BatchFeed(recipe, session.tokenizer, session.groups, progress, quarantine)
    _say(logger, f"backend {session.backend_reason}; images by {feed.image_loader}")
    for line in feed.description:
        _say(logger, line)
    session.checkpoints.report = partial(_say, logger)
    skipped_samples = logger.skipped_samples if logger is not None else 0
    try:
        while progress.step < recipe.training.steps:
            started = time.perf_counter()
            batches = feed.next_step()
            loss, grad_norm, lr = train_step(session, batches)
            progress = Progress(progress.step + 1, feed.consumed_samples, list(feed.position), feed.sources)
            counts = _counts(batches, session)
            skipped_samples += counts["skipped"]
            if logger is not None:
                logger.step(
                    StepStats(
                        step=progress.step,
                        consumed_samples=progress.consumed_samples,
                        loss=loss,
                        lr=lr,
                        grad_norm=grad_norm,
                        num_tokens=counts["tokens"],
                        num_images=counts["images"],
                        num_padding=counts["padding"],
                        num_labels=counts["labels"],
                        num_pairs=counts["pairs"],
                        sequence_length=feed.sequence_length,
                        seconds=time.perf_counter() - started,
                        data_wait=feed.seconds_waited,
                        skipped_samples=skipped_samples,
                        skipped_steps=0,
                        memory=memory_used(session.groups.device),
                    )
                )
            session.checkpoints.poll()
            _check_finite(session, loss, grad_norm, progress.step)
            stop = stop_requests.agreed()
            if stop or _is_time_to_save(recipe, progress.step):
                is_last = progress.step == recipe.training.steps
                session.checkpoints.save(progress, must_succeed=bool(stop) or is_last)
            if stop and progress.step < recipe.training.steps:
                _say(logger, f"{stop}: stopped after step {progress.step}, saved; the same command goes on")
                break
            if stop:  # nothing goes on from here, so what comes behind the last step is not left out
                session.checkpoints.wait()
                _say(logger, f"{stop}: came with the last step, now saved; the run ends as it would have")
            if validation.due(progress.step):
                validation.run(progress.step)
        session.checkpoints.wait()
    finally:
        session.checkpoints.abandon()
        feed.close()
        for remark in feed.remarks():
            _say(logger, remark)
    return STOPPED if progress.step < recipe.training.steps else 0


def train_step(session: Session, batches: list[Batch]) -> tuple[float, float, float]:
    """One optimizer step: (loss, gradient norm before clipping, learning rate used)."""
    # 1. clear the gradients
    for model in session.wrapped:
        model.zero_grad_buffer()
    session.optimizer.zero_grad()
    # 2. forward and backward over the micro-batches; gradients come back reduced
    loss = forward_backward(session.wrapped, batches, session.groups)
    # 3. clip and update
    lr = session.schedule.get_lr({})  # of what has no rate of its own
    _, grad_norm, _ = session.optimizer.step()
    # 4. the next learning rate
    session.schedule.step(1)
    return loss, float(grad_norm or 0.0), lr


def _counts(batches: list[Batch], session: Session) -> Counter[str]:
    """What the micro-batches of the step hold, over all data-parallel ranks."""
    counts: Counter[str] = Counter()
    for batch in batches:
        counts["tokens"] += batch.input_ids.numel()
        counts["padding"] += batch.num_padding
        counts["labels"] += batch.num_labels
        counts["pairs"] += batch.num_pairs
        counts["images"] += int(batch.images_per_sample.sum())
        counts["skipped"] += batch.num_skipped
    if session.groups.dp_size == 1:
        return counts
    parts: list[Counter[str]] = [Counter()] * session.groups.dp_size
    dist.all_gather_object(parts, counts, group=session.groups.collection.dp)
    return sum(parts, Counter())


def _check_finite(session: Session, loss: float, grad_norm: float, step: int) -> None:
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        session.checkpoints.wait()  # every rank has these numbers, and what is being written is good
        raise RunError(
            f"step {step}: loss {loss} with gradient norm {grad_norm}; training diverged: lower "
            "optimizer.lr or lengthen optimizer.warmup_steps, then start again (from the last checkpoint)"
        )


def _is_time_to_save(recipe: Recipe, step: int) -> bool:
    interval = recipe.checkpoint.interval
    return step == recipe.training.steps or (interval > 0 and step % interval == 0)


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


def _say(logger: RunLogger | None, text: str) -> None:
    if logger is not None:
        logger.event(text)
