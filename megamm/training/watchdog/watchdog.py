"""The thread that gives signs of life, watches those of the next rank, and ends a run that hangs."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from megamm.config import Recipe
from megamm.engine.groups import Groups
from megamm.engine.ranks import gather
from megamm.errors import RankLost
from megamm.training.incidents import record_incident
from megamm.training.watchdog.beat import Alarm, Beat, Board, host_of_store
from megamm.training.watchdog.processes import PATIENCE_S, OpenBook, ask, kill, write_own_stacks
from megamm.training.watchdog.verdict import Verdict, judge, silent_sentence
from megamm.training.watchdog.whereabouts import STEP_PHASES, Whereabouts

INTERVAL_S = 1.0  # between two signs of life
FOLDER = "hangs"  # of the run directory
MIN_STUCK_S = 60.0  # what no step takes, however short the steps before it were
MANY_TIMES = 20.0  # as long as the longest of the last steps is a hang
ANSWER_S = 10.0  # for all ranks to answer an alarm
WAKE_AFTER_S = 2.5  # of them, before a rank that does not answer is ended by another of its machine


class Awake:
    """How long a value has been the same, in the time that this thread was awake: a machine that was
    suspended as a whole finds nobody else to have hung meanwhile."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._value: object = None

    def see(self, value: object, elapsed: float) -> float:
        """Seconds since the value changed, `elapsed` of them since the last call."""
        self.seconds = 0.0 if value != self._value else self.seconds + min(elapsed, 3 * INTERVAL_S)
        self._value = value
        return self.seconds


class Watchdog:
    """Watches a run while the context is open; on every rank.

    Args:
        recipe: `watchdog` says when somebody hangs.
        here: where this rank's training loop is.
    """

    def __init__(self, recipe: Recipe, groups: Groups, here: Whereabouts) -> None:
        self._recipe, self._here = recipe, here
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._beat = Beat(self._rank, socket.gethostname(), os.getpid(), groups.model_leader)
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._stuck, self._silent, self._unheard = Awake(), Awake(), Awake()
        self._looks = 0
        self._everyone: list[Beat] = []

    def __enter__(self) -> Watchdog:
        if self._recipe.watchdog.enabled:
            self._book = OpenBook()
            self._here.mirror = self._book.whereabouts
            self._beat = replace(self._beat, whereabouts=self._book.whereabouts, stacks=self._book.stacks)
            self._everyone = gather(self._beat)
            self._board = Board(self._size)
            for task in (self._run, self._watch_store):
                self._threads.append(
                    threading.Thread(target=task, name=f"watchdog{task.__name__}", daemon=True)
                )
                self._threads[-1].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(INTERVAL_S)  # not for ever: the store may be gone with who kept it
        if self._threads:
            self._here.mirror = -1
            self._book.close()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(INTERVAL_S):
            now = time.monotonic()
            with contextlib.suppress(RuntimeError):  # torch's errors of a store that does not answer
                self._look(now - last)
                self._looks += 1
            last = now
        with contextlib.suppress(RuntimeError):
            self._board.put(replace(self._now(), has_left=True))

    def _look(self, elapsed: float) -> None:
        """One sign of life, and a look at who else gives one."""
        self._beat = self._now()
        self._board.put(self._beat)
        alarm = self._board.alarm()
        if alarm is not None and (alarm.silent == self._rank or elapsed > self._recipe.watchdog.silent_s / 2):
            # this process was stopped and now goes on only so that others can ask it for its stacks
            time.sleep(2 * ANSWER_S)
        alarm = alarm or self._own_alarm(elapsed)
        if alarm is not None:
            self._end(alarm)

    def _now(self, with_module: bool = False) -> Beat:
        here = self._here
        code, is_waiting = here.code(with_module)
        return replace(
            self._beat,
            number=self._beat.number + 1,
            step=here.step,
            phase=here.phase,
            micro_batch=here.micro_batch,
            samples=here.samples,
            seconds=self._stuck.seconds,
            code=code,
            is_waiting=is_waiting,
        )

    def _own_alarm(self, elapsed: float) -> Alarm | None:
        """The alarm to raise, if this rank is stuck, or the next one silent."""
        stuck = self._stuck.see(self._here.mark(), elapsed)
        if stuck > self._patience():
            return self._board.raise_alarm(Alarm(self._rank, None, stuck, _folder_name()))
        if self._size == 1:
            return None
        neighbour = (self._rank + 1) % self._size
        beat = self._board.get(neighbour) or self._everyone[neighbour]  # it may stop before its first sign
        silent = self._silent.see(beat.number, elapsed)
        if beat.has_left or silent <= self._recipe.watchdog.silent_s:
            return None
        return self._board.raise_alarm(Alarm(self._rank, neighbour, silent, _folder_name()))

    def _patience(self) -> float:
        """Seconds without any progress that are a hang where the training loop is now."""
        settings, whole = self._recipe.watchdog, 0.9 * self._recipe.parallel.timeout_s
        longest = self._here.longest_step
        if self._here.phase not in STEP_PHASES:
            return whole
        if settings.stuck_s is not None:
            return settings.stuck_s
        # a collective that runs into its own timeout would end this rank before it can tell why
        return whole if longest is None else min(whole, max(MIN_STUCK_S, MANY_TIMES * longest))

    # --- the end ----------------------------------------------------------------------------------------

    def _end(self, alarm: Alarm) -> None:
        """Answer the alarm, have all stacks written, say who is to blame, and end this process."""
        folder = Path(self._recipe.run_dir) / FOLDER / alarm.folder
        mine = self._now(with_module=True)
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            write_own_stacks(mine, folder / _file_name(self._rank))
        asked: dict[int, Beat] = {}
        with contextlib.suppress(RuntimeError):  # the store has gone with the rank that keeps it
            self._board.answer(mine)
            last, answers = self._collect(folder, asked)
            if self._rank == min(answers):
                self._tell(judge(alarm, last, answers), folder)
                self._board.put(replace(mine, has_left=True))
                time.sleep(INTERVAL_S)  # for the others to see that
            else:
                self._wait_for_the_teller(min(answers))
        for beat in asked.values():
            kill(beat)
        os._exit(RankLost.exit_code)

    def _collect(self, folder: Path, asked: dict[int, Beat]) -> tuple[dict[int, Beat], dict[int, Beat]]:
        """The last signs of life of all ranks, and their answers. Those of a machine that do not answer are
        `asked` for their stacks by the first rank there that does."""
        started = time.monotonic()
        while True:
            last = {beat.rank: self._board.get(beat.rank) or beat for beat in self._everyone}
            answers = self._board.answers() or {self._rank: self._now(with_module=True)}
            missing = [rank for rank, beat in last.items() if not beat.has_left and rank not in answers]
            waited = time.monotonic() - started
            if waited > ANSWER_S or asked.keys() >= set(missing):
                return last, answers
            neighbours = [rank for rank, beat in answers.items() if beat.host == self._beat.host]
            if self._rank == min(neighbours) and waited > WAKE_AFTER_S:
                for rank in missing:
                    if last[rank].host == self._beat.host and rank not in asked:
                        asked[rank] = ask(last[rank], folder / _file_name(rank))
                        self._board.put(asked[rank])
            time.sleep(0.2)

    def _wait_for_the_teller(self, teller: int) -> None:
        deadline = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline:
            beat = self._board.get(teller)
            if beat is None or beat.has_left:
                return
            time.sleep(0.2)

    def _tell(self, verdict: Verdict, folder: Path) -> None:
        whole = f"{verdict.sentence}; the stacks of all ranks are in {folder}"
        record_incident(self._recipe.run_dir, "hang", verdict.step, sentence=whole, ranks=verdict.ranks)
        with contextlib.suppress(OSError), open(Path(self._recipe.run_dir) / "log.txt", "a") as log:
            log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {whole}\n")
        said = f"megamm: {whole}; the same command goes on from the last checkpoint"
        print(said, file=sys.stderr, flush=True)

    def _watch_store(self) -> None:
        """A thread of its own: some questions to a store whose process is stopped have no end. Where rank 0
        keeps the store, rank 0 is then silent."""
        last = time.monotonic()
        while not self._stop.wait(INTERVAL_S):
            now = time.monotonic()
            unheard = self._unheard.see(self._looks, now - last)
            if unheard > self._recipe.watchdog.silent_s and not host_of_store():
                self._end_without_store(unheard)
            last = now

    def _end_without_store(self, seconds: float) -> None:
        keeper, folder = self._everyone[0], Path(self._recipe.run_dir) / FOLDER / _folder_name()
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            write_own_stacks(self._now(with_module=True), folder / _file_name(self._rank))
        neighbours = [beat.rank for beat in self._everyone[1:] if beat.host == keeper.host]
        if self._rank == (neighbours or [1])[0]:
            if neighbours:
                keeper = ask(keeper, folder / _file_name(0))
            step = keeper.step or self._here.step
            self._tell(Verdict(step, [0], f"step {step}: {silent_sentence(keeper, seconds)}"), folder)
            if neighbours:
                kill(keeper)
        else:
            time.sleep(PATIENCE_S)  # for the one that asks it
        os._exit(RankLost.exit_code)


def _folder_name() -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())


def _file_name(rank: int) -> str:
    return f"rank_{rank:05d}.txt"
