"""The training loop: data, forward and backward, update, log, checkpoint."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megamm.batch import Batch
from megamm.device import memory_used
from megamm.engine.checkpoint import Progress
from megamm.engine.gradients import non_finite_gradients
from megamm.engine.optimizer import set_schedule, update
from megamm.engine.pipeline import forward_backward
from megamm.engine.ranks import gather
from megamm.errors import RunError
from megamm.training.anomalies import AnomalyPolicy, Consequence, Objection
from megamm.training.feed import BatchFeed
from megamm.training.heartbeat import Heartbeats
from megamm.training.incidents import record_incident
from megamm.training.logging import RunLogger, StepStats
from megamm.training.setup import Session
from megamm.training.stopping import STOPPED, StopRequests
from megamm.training.validation import Validation
from megamm.training.watchdog.slow_ranks import SlowRanks, WorkMeter
from megamm.training.watchdog.whereabouts import WatchedBatches, Whereabouts

WINDOW = 20  # steps between two looks at which rank is slow
REMEDY = "look at the samples named in incidents.jsonl, lower optimizer.lr or lengthen optimizer.warmup_steps"


@dataclass(frozen=True)
class Watchers:
    """Who is told how the loop fares.

    Attributes:
        stop_requests: signals. heartbeats: a launcher that waits for signs of life.
        here: where the loop is, for the watchdog. meter: how long it works.
    """

    stop_requests: StopRequests
    heartbeats: Heartbeats
    here: Whereabouts
    meter: WorkMeter


@dataclass(frozen=True)
class StepResult:
    """What came of a step, the same on every rank.

    Attributes:
        loss: mean per token that carries loss.
        grad_norm: before clipping.
        lr: rate of the update, of what has no rate of its own.
        objection: why no update was made; Objection.NONE: it was.
        signal: name of a signal that asks the run to stop after this step, or None.
    """

    loss: float
    grad_norm: float
    lr: float
    objection: Objection
    signal: str | None


class Loop:
    """The steps that are left of a stage. Every method is called by all ranks together.

    Attributes:
        progress: how far the stage has come.
    """

    def __init__(self, session: Session, logger: RunLogger | None, watchers: Watchers) -> None:
        """
        Args:
            logger: of rank 0.
        """
        self.progress = session.progress
        self._session, self._logger = session, logger
        self._watchers, self._here = watchers, watchers.here
        self._recipe, self._last_step = session.recipe, session.recipe.training.steps
        watchdog = session.recipe.watchdog
        factor = watchdog.slow_factor if watchdog.enabled else 0.0
        self._slow_ranks = SlowRanks(watchers.meter, session.groups, factor)
        self._policy = AnomalyPolicy(session.recipe.anomalies, session.progress.anomalies)
        self._skipped_samples = logger.skipped_samples if logger is not None else 0

    def run(self) -> int:
        """Train until the last step or until a signal stops the run; returns the exit code."""
        session, quarantine = self._session, Path(self._recipe.run_dir) / "quarantine.jsonl"
        signal, _ = self._watchers.stop_requests.agreed()
        if self.progress.step < self._last_step and signal:
            self._say(f"{signal}: stopped before step {self.progress.step + 1}; the same command goes on")
            return STOPPED
        self._here.at("validation")
        self._validation = Validation(session, self._logger)
        with self._watchers.heartbeats.paused():
            self._validation.catch_up(self.progress.step)
        if self.progress.step >= self._last_step:
            self._say(f"nothing to do: the run has its {self._last_step} steps")
            return 0
        self._here.at("start of the data")
        feed = BatchFeed(self._recipe, session.tokenizer, session.groups, self.progress, quarantine)
        self._say(f"backend {session.backend_reason}; images by {feed.image_loader}")
        for line in feed.description:
            self._say(line)
        session.checkpoints.report = self._say
        try:
            while self.progress.step < self._last_step:
                if self._step(feed):
                    break
            self._here.at("checkpoint")
            with self._watchers.heartbeats.paused():
                session.checkpoints.wait()
        finally:
            session.checkpoints.abandon()
            feed.close()
            for remark in feed.remarks():
                self._say(remark)
        return STOPPED if self.progress.step < self._last_step else 0

    def _step(self, feed: BatchFeed) -> bool:
        """One step and what belongs to it; returns whether a signal ends the run here."""
        here, started = self._here, time.perf_counter()
        # 1. data, forward, backward, and the update if nothing speaks against it
        here.begin_step(self.progress.step + 1)
        batches = feed.next_step()
        here.samples = feed.sample_ids
        result = train_step(self._session, batches, feed.group, self._policy, self._watchers)
        here.at("log")
        consequence: Consequence = "go on"
        if result.objection:
            consequence = self._policy.skipped(result.objection)
        else:
            self._policy.updated(result.loss, feed.group)
        position, sources = list(feed.position), feed.sources
        self.progress = Progress(
            self.progress.step + 1, feed.consumed_samples, position, sources, self._policy.state()
        )
        # 2. the log
        self._watchers.heartbeats.beat()
        self._log(result, feed, batches, time.perf_counter() - started)
        if result.objection:
            self._tell_of_skipped(result, feed)
        if consequence == "roll back":
            self._roll_back(feed)
        elif consequence == "stop":
            self._give_up(result)
        # 3. checkpoints, and the end if a signal asked for it
        here.at("checkpoint")
        self._session.checkpoints.poll()
        if result.signal or self._is_time_to_save():
            is_last = self.progress.step == self._last_step
            self._session.checkpoints.save(self.progress, must_succeed=is_last or result.signal is not None)
        if result.signal and self._stops(result.signal):
            return True
        # 4. a look at held-out samples
        if self._validation.due(self.progress.step) and consequence == "go on":
            here.at("validation")
            with self._watchers.heartbeats.paused():
                self._validation.run(self.progress.step)
        return False

    def _log(self, result: StepResult, feed: BatchFeed, batches: list[Batch], seconds: float) -> None:
        counts = _counts(batches, self._session)
        self._skipped_samples += counts["skipped"]
        step = self.progress.step
        if self._logger is not None:
            self._logger.step(
                StepStats(
                    step=step,
                    consumed_samples=self.progress.consumed_samples,
                    loss=result.loss,
                    lr=result.lr,
                    grad_norm=result.grad_norm,
                    num_tokens=counts["tokens"],
                    num_images=counts["images"],
                    num_padding=counts["padding"],
                    num_labels=counts["labels"],
                    num_pairs=counts["pairs"],
                    sequence_length=feed.sequence_length,
                    seconds=seconds,
                    data_wait=feed.seconds_waited,
                    skipped_samples=self._skipped_samples,
                    skipped_steps=self._policy.skipped_steps,
                    memory=memory_used(self._session.groups.device),
                )
            )
        if step % WINDOW == 0:
            slow = self._slow_ranks.find()
            if slow is not None:
                self._record("slow_rank", f"step {step}: {slow}")

    def _tell_of_skipped(self, result: StepResult, feed: BatchFeed) -> None:
        """Where an update was left out, what helps to find out why."""
        samples = [ids for part in gather(feed.sample_ids) for ids in part]
        weights = sorted(
            {name for part in gather(non_finite_gradients(self._session.models)) for name in part}
        )
        why = f"loss {result.loss:.4g} with gradient norm {result.grad_norm:.4g}"
        if result.objection is Objection.SPIKE:
            why += f", where {self._policy.usual_loss(feed.group):.4g} is usual"
        self._record(
            "skipped_step",
            f"step {self.progress.step}: no update ({why}), {self._policy.in_a_row} in a row; its samples "
            "and what is not finite are in incidents.jsonl",
            loss=result.loss,
            grad_norm=result.grad_norm,
            samples=samples,
            non_finite_gradients=weights,
        )

    def _roll_back(self, feed: BatchFeed) -> None:
        """Go on from the last checkpoint before the updates that were left out, with the data behind them."""
        policy, checkpoints, step = self._policy, self._session.checkpoints, self.progress.step
        self._here.at("checkpoint")
        checkpoints.wait()
        # (what was saved right behind an update that went wrong holds what came of it)
        found = checkpoints.load_newest(newest=step - policy.in_a_row, only_finite=True)
        if found is None:
            raise RunError(
                f"step {step}: {policy.in_a_row} updates in a row were left out, and there is no checkpoint "
                f"before them to go back to; {REMEDY}, or lower checkpoint.interval, then start again"
            )
        checkpoints.remove_newer(found.step)
        set_schedule(self._session.schedule, found.step)
        policy.rolled_back()
        position, sources = list(feed.position), feed.sources
        self.progress = Progress(found.step, feed.consumed_samples, position, sources, policy.state())
        if self._logger is not None:
            self._logger.rewind(found.step)
        left_out = feed.consumed_samples - found.consumed_samples
        self._record(
            "rollback",
            f"step {step}: gone back to step {found.step}, time {policy.rollbacks} of "
            f"{self._recipe.anomalies.max_rollbacks}; the {left_out:,} samples in between are left out",
            to=found.step,
            samples_left_out=left_out,
        )

    def _give_up(self, result: StepResult) -> None:
        self._session.checkpoints.wait()  # every rank has these numbers, and what is being written is good
        raise RunError(
            f"step {self.progress.step}: loss {result.loss:g} with gradient norm {result.grad_norm:g}, "
            f"{self._policy.in_a_row} times in a row after {self._policy.rollbacks} ways back; training "
            f"diverged: {REMEDY}, then start again (from the last checkpoint)"
        )

    def _is_time_to_save(self) -> bool:
        step, interval = self.progress.step, self._recipe.checkpoint.interval
        if step == self._last_step:
            return True
        # none between updates that are left out: retention would delete those that one may have to go back to
        return interval > 0 and step % interval == 0 and not self._policy.in_a_row

    def _stops(self, signal: str) -> bool:
        """Whether the signal ends the run after the checkpoint that has just begun."""
        if self.progress.step < self._last_step:
            self._say(f"{signal}: stopped after step {self.progress.step}, saved; the same command goes on")
            return True
        # nothing goes on from here, so what comes behind the last step is not left out
        self._session.checkpoints.wait()
        self._say(f"{signal}: came with the last step, now saved; the run ends as it would have")
        return False

    def _record(self, kind: str, sentence: str, **details: object) -> None:
        """A line of the log and a row of incidents.jsonl."""
        self._say(sentence)
        if self._logger is not None:
            record_incident(self._recipe.run_dir, kind, self.progress.step, sentence=sentence, **details)

    def _say(self, text: str) -> None:
        if self._logger is not None:
            self._logger.event(text)


def train_step(
    session: Session,
    batches: list[Batch],
    group: int,
    policy: AnomalyPolicy,
    watchers: Watchers,
) -> StepResult:
    """One optimizer step, whose update is left out on all ranks if the policy objects on any of them."""
    here = watchers.here
    # 1. clear the gradients
    for model in session.wrapped:
        model.zero_grad_buffer()
    session.optimizer.zero_grad()
    # 2. forward and backward over the micro-batches; gradients come back reduced
    here.at("forward and backward")
    loss = forward_backward(session.wrapped, WatchedBatches(batches, here), session.groups)
    # 3. agree on the update, clip and update
    here.at("update")
    lr = session.schedule.get_lr({})  # of what has no rate of its own
    agreed: tuple[str | None, int] = (None, Objection.NONE)

    def approve(grad_norm: float) -> bool:
        nonlocal agreed
        agreed = watchers.stop_requests.agreed(policy.objection(loss, grad_norm, group))
        return agreed[1] == Objection.NONE

    session.checkpoints.before_update()
    grad_norm = update(session.optimizer, session.recipe.optimizer.clip_grad, approve)
    # 4. the next learning rate
    session.schedule.step(1)
    return StepResult(loss, grad_norm, lr, Objection(agreed[1]), agreed[0])


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
