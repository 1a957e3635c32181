"""Work dealt over processes, results in order: what `megamm prepare` runs its chunks with.

Every worker is spawned, since this process may hold threads (torch, an image library) that do not survive a
fork, and lives no longer than its pipe to the parent: a parent that is killed leaves none behind.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from megamm.errors import MegammError, RunError

AHEAD = 2  # items that a worker has beside the one it works on
WINDOW = 8  # items per worker between the first that is waited for and the last that was given out

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """`function` of every item in the order of `items`, by `workers` processes (one: this process).

    Function, items and results are pickled where there are several processes. An error of an item, or of
    `items` themselves, is raised when its turn comes: which one is met first does not depend on `workers`.

    Raises:
        RunError: a process died.
    """
    if workers == 1:
        yield from map(function, items)
        return
    pool = [_Worker(function) for _ in range(workers)]
    try:
        yield from _deal(pool, iter(items))
    finally:
        for worker in pool:
            worker.stop()


def _deal(pool: list[_Worker], items: Iterator[Any]) -> Generator[Any, None, None]:
    done: dict[int, Any] = {}  # results that came before their turn
    given = turn = 0
    more = True
    while more or turn < given:
        while more and given - turn < WINDOW * len(pool):
            worker = min(pool, key=lambda one: len(one.has))
            if len(worker.has) > AHEAD:
                break
            try:
                item = next(items)
            except StopIteration:
                more = False
                break
            except MegammError as error:
                done[given], given, more = error, given + 1, False
                break
            worker.give(given, item)
            given += 1
            _collect(pool, done, timeout=0)
        while turn in done:
            yield _value(done.pop(turn))
            turn += 1
        if turn < given and turn not in done:
            _collect(pool, done, timeout=None)


def _collect(pool: list[_Worker], done: dict[int, Any], timeout: float | None) -> None:
    """Take the results that are there; without a timeout, wait for one."""
    busy = {worker.pipe: worker for worker in pool if worker.has}
    for pipe in wait(list(busy), timeout):
        number, result = busy[pipe].take()  # type: ignore[index]
        done[number] = result


def _value(result: Any) -> Any:
    if isinstance(result, MegammError):
        raise result
    if isinstance(result, _Failure):
        raise RuntimeError(f"in a worker process:\n{result}")
    return result


class _Failure(str):
    """The traceback of a defect that a worker met."""


class _Worker:
    """The parent's end of a worker; `has` are the numbers of its items, in their order."""

    def __init__(self, function: Callable[[Any], Any]):
        self.has: deque[int] = deque()
        context = multiprocessing.get_context("spawn")
        self.pipe, child = context.Pipe()
        self.process = context.Process(target=_work, args=(child, function), daemon=True)
        # Ctrl-C is the parent's, which ends the workers: they never see the signal, even while they start.
        resource_tracker.ensure_running()  # which lifts the block when it starts
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            child.close()

    def give(self, number: int, item: Any) -> None:
        with self._alive():
            self.pipe.send(item)
        self.has.append(number)

    def take(self) -> tuple[int, Any]:
        with self._alive():
            result = self.pipe.recv()
        return self.has.popleft(), result

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join(5)
            code = self.process.exitcode
            how = f"exit code {code}" if code is None or code >= 0 else f"signal {-code}"
            memory = ", perhaps memory ran out" if code == -signal.SIGKILL else ""
            raise RunError(
                f"prepare: a worker process died ({how}{memory}); run the same command again, which goes on "
                "where this one was, or with fewer --workers"
            ) from None

    def stop(self) -> None:
        self.pipe.close()
        self.process.kill()  # it writes no files
        self.process.join()


def _work(pipe: Connection, function: Callable[[Any], Any]) -> None:
    """A worker's life: it ends with its pipe."""
    items: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, items), daemon=True).start()
    while True:
        try:
            result: Any = function(items.get())
        except MegammError as error:
            result = error
        except Exception:
            result = _Failure(traceback.format_exc())
        try:
            pipe.send(result)
        except OSError:
            os._exit(0)


def _receive(pipe: Connection, items: queue.SimpleQueue[Any]) -> None:
    """Take items at once, so that the parent never waits for a worker that waits for the parent."""
    try:
        while True:
            items.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(0)  # the parent is gone, whatever the other thread is doing
