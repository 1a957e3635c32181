"""Work dealt out to processes and taken back in order; an item that ends its process is found out."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Generic, TypeVar

from megamm.errors import RunError

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[Sequence[Item]], Result]

MAX_CRASHES = 100  # more mean that the machine is at fault, not the items


class Pool(Generic[Item, Result]):
    """Runs `start(*arguments)` once per process, which gives the work; then the work on many tasks.

    Args:
        workers: processes; 0: all is done here, without protection from items that end the process.
        crashed: the result of an item that ended its process.
    """

    def __init__(
        self,
        workers: int,
        start: Callable[..., Work[Item, Result]],
        arguments: tuple[Any, ...],
        crashed: Callable[[Item], Result],
    ) -> None:
        self._workers, self._start, self._arguments, self._crashed = workers, start, arguments, crashed
        self._executor: ProcessPoolExecutor | None = None
        self._crashes = 0

    def results(self, tasks: Iterable[Sequence[Item]]) -> Iterator[Result]:
        """Results in the order of the tasks; a task that ended a process has several, in the order of its
        items.

        Raises:
            RunError: very many items end their process.
        """
        if self._workers == 0:
            yield from map(self._start(*self._arguments), tasks)
            return
        waiting: deque[tuple[Sequence[Item], Future[Result]]] = deque()
        try:
            for task in tasks:
                waiting.append((task, self._submit(task)))
                if len(waiting) > 3 * self._workers:  # bounds memory
                    yield from self._next(waiting)
            while waiting:
                yield from self._next(waiting)
        finally:
            self._stop()

    def _next(self, waiting: deque[tuple[Sequence[Item], Future[Result]]]) -> Iterator[Result]:
        task, future = waiting.popleft()
        try:
            yield future.result()
            return
        except BrokenProcessPool:
            self._stop()
        yield from self._alone(task)
        again = [other for other, _ in waiting]
        waiting.clear()
        waiting.extend((other, self._submit(other)) for other in again)

    def _alone(self, task: Sequence[Item]) -> Iterator[Result]:
        """The results of a task while nothing else runs, in ever smaller pieces."""
        try:
            yield self._submit(task).result()
            return
        except BrokenProcessPool:
            self._stop()
        if len(task) == 1:
            self._crashes += 1
            if self._crashes > MAX_CRASHES:
                raise RunError(f"{MAX_CRASHES} processes died; try fewer --workers or more memory")
            yield self._crashed(task[0])
            return
        yield from self._alone(task[: len(task) // 2])
        yield from self._alone(task[len(task) // 2 :])

    def _submit(self, task: Sequence[Item]) -> Future[Result]:
        try:
            return self._running().submit(_work, task)
        except BrokenProcessPool:  # noticed before this task was sent; it comes to nobody's harm
            future: Future[Result] = Future()
            future.set_exception(BrokenProcessPool())
            return future

    def _running(self) -> ProcessPoolExecutor:
        if self._executor is None:
            # Spawned, not forked: this process may hold threads that do not survive a fork.
            self._executor = ProcessPoolExecutor(
                self._workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_process,
                initargs=(self._start, self._arguments),
            )
        return self._executor

    def _stop(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None


_work_here: Work[Any, Any] | Exception | None = None  # of this worker process


def _start_process(start: Callable[..., Work[Any, Any]], arguments: tuple[Any, ...]) -> None:
    global _work_here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _work_here = start(*arguments)
    except Exception as error:  # told by the first task: an initializer that fails looks like a crash
        _work_here = error


def _end_with_parent() -> None:
    """A process of a pool holds both ends of its queue, so it would wait there for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(task: Sequence[Any]) -> Any:
    assert _work_here is not None, "the initializer of the pool has run"
    if isinstance(_work_here, Exception):
        raise _work_here
    return _work_here(task)
