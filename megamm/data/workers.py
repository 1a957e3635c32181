"""Micro-batches made by other processes, in the order in which they were asked for.

The parent plans and hands out, a worker (worker.py) makes whole micro-batches, and since making one is a pure
function, neither the number of workers nor their deaths show in the stream:
    - A worker that dies (killed, out of memory, a broken decoder) is replaced, its micro-batch made again.
    - A micro-batch that has killed two is made once more with every image announced before it is decoded.
      If that worker dies too, the image is refused from then on, so its sample is replaced like that of any
      other bad image.
    - A worker that is busy for too long ends the run with the samples named.
    - Workers end with their parent, however that ends.
Workers are fresh interpreters, not forks, which inherit threads and devices in unknown states; they import
neither the main program nor megatron.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Generic, TypeVar

from megamm.data.batch_maker import Ingredients, Made
from megamm.data.quarantine import KILLS, FileName
from megamm.data.step_plan import Place
from megamm.data.worker_link import Announced, Failed, Finished, Job, Message, Ready, receive_made
from megamm.errors import MegammError, RunError

T = TypeVar("T")
AHEAD = 2  # micro-batches per worker that may be unfinished or wait for those before them
MAX_FAILED_STARTS = 3  # in a row
DEATHS_TO_SUSPECT = 2  # of workers over one micro-batch, before its images are tried one by one
POLL_S = 0.1  # how soon closing is noticed
GRACE_S = 5.0  # for a process that is ending
PROGRAM = (
    "import sys; sys.path[:] = {path!r}; from megamm.data.worker import main; main({descriptor}, {parent})"
)


class WorkerTraceback(Exception):
    """Where in a worker an error was raised: the cause of that error in the training process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass
class _Worker:
    """One process. `busy_since`: when it was started or given its job, by the monotonic clock."""

    process: subprocess.Popen[bytes]
    link: Connection
    busy_since: float
    ready: bool = False
    job: int | None = None
    announced: FileName | None = None


@dataclass
class _Open(Generic[T]):
    """A micro-batch that has not been handed on yet."""

    places: Sequence[Place]
    mark: T | None
    deaths: int = 0
    assigned: bool = False
    result: Made | Exception | None = None


@dataclass
class _Jobs(Generic[T]):
    """The micro-batches between the plan and the consumer."""

    source: Iterator[tuple[Sequence[Place], T]]
    open: dict[int, _Open[T]] = field(default_factory=dict)  # ascending
    count: int = 0
    exhausted: bool = False

    def fill(self, size: int) -> None:
        """Take from the source until `size` are open."""
        while len(self.open) < size and not self.exhausted:
            try:
                self.open[self.count] = _Open(*next(self.source))
            except StopIteration:
                self.exhausted = True
                return
            except Exception as error:  # raised when it is its turn
                self.exhausted = True
                self.open[self.count] = _Open([], None, assigned=True, result=error)
            self.count += 1


class Workers:
    """`count` processes that make micro-batches of `ingredients`.

    Attributes:
        refused: images that are not decoded, because they have killed workers.
    """

    def __init__(
        self,
        ingredients: Ingredients,
        count: int,
        timeout_s: float,
        refused: frozenset[FileName],
        stop: threading.Event,
    ):
        """
        Args:
            timeout_s: what a worker may take to start, and for one micro-batch.
            stop: ends `run` when it is set.
        """
        self.refused = refused
        self._ingredients, self._count, self._timeout_s, self._stop = ingredients, count, timeout_s, stop
        self._workers: list[_Worker] = []
        self._failed_starts = 0

    def run(self, jobs: Iterator[tuple[Sequence[Place], T]]) -> Iterator[tuple[Made, T]]:
        """The micro-batch of each of `jobs`, in their order, with the mark that came with its places.

        Raises:
            RunError: a worker hangs, or workers die and no image is to blame.
            Exception: what making the micro-batch raised, when it is its turn.
        """
        waiting: _Jobs[T] = _Jobs(jobs)
        try:
            while not self._stop.is_set():
                waiting.fill(AHEAD * self._count)
                if not waiting.open:
                    return
                self._assign(waiting)
                first = next(iter(waiting.open))
                self._listen(waiting, POLL_S if waiting.open[first].result is None else 0.0)
                result = waiting.open[first].result
                if isinstance(result, Exception):
                    raise result
                if result is not None:
                    self._assign(waiting)  # those that have finished, before the consumer keeps this thread
                    mark = waiting.open.pop(first).mark
                    yield result, mark  # type: ignore[misc]  # only errors have no mark
        finally:
            self.close()

    def close(self) -> None:
        """Kill the workers (they have nothing to put in order); may be called again."""
        while self._workers:
            self._remove(self._workers[-1], kill=True)

    def _assign(self, waiting: _Jobs[T]) -> None:
        while len(self._workers) < self._count:
            self._workers.append(self._start())
        for worker in self._workers:
            if not worker.ready or worker.job is not None:
                continue
            for number, job in waiting.open.items():
                if not job.assigned:
                    careful = job.deaths >= DEATHS_TO_SUSPECT
                    try:
                        worker.link.send(Job(number, job.places, self.refused, careful))
                    except OSError:
                        break  # it is dead, as `_listen` will find
                    job.assigned, worker.job = True, number
                    worker.busy_since, worker.announced = time.monotonic(), None
                    break

    def _start(self) -> _Worker:
        """A new process. In a session of its own, so that Ctrl-C reaches the parent alone."""
        ours, theirs = socket.socketpair()
        program = PROGRAM.format(path=sys.path, descriptor=theirs.fileno(), parent=os.getpid())
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", program],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,
            )
        link = Connection(ours.detach())
        with contextlib.suppress(OSError):  # it has died already, as `_listen` will find
            link.send(self._ingredients)
        return _Worker(process, link, time.monotonic())

    def _listen(self, waiting: _Jobs[T], timeout_s: float) -> None:
        """Take in the news of the workers, or wait for some, for `timeout_s` at most."""
        heard = wait([worker.link for worker in self._workers], timeout_s)
        for worker in list(self._workers):
            if worker.link not in heard:
                self._check_hang(worker, waiting)
                continue
            try:
                message = worker.link.recv()
                made = receive_made(worker.link, message) if isinstance(message, Finished) else None
            except (EOFError, OSError, RuntimeError) as error:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.process.wait(GRACE_S)
                if worker.process.returncode is None and not isinstance(error, EOFError):
                    raise  # it lives: this process is short of something
                self._replace(worker, waiting)
            else:
                self._note(worker, message, made, waiting)

    def _note(self, worker: _Worker, message: Message, made: Made | None, waiting: _Jobs[T]) -> None:
        if isinstance(message, Ready):
            worker.ready, self._failed_starts = True, 0
            return
        if isinstance(message, Announced):
            worker.announced = message.image
            return
        result: Made | Exception | None = made
        if isinstance(message, Failed):
            result = message.error
            if not isinstance(result, MegammError):
                result.__cause__ = WorkerTraceback(message.where)
            if message.number is None:
                raise result
        assert message.number is not None
        waiting.open[message.number].result, worker.job = result, None

    def _replace(self, worker: _Worker, waiting: _Jobs[T]) -> None:
        """After a worker has died: its micro-batch is made again, `_assign` starts another process."""
        status = self._remove(worker, kill=False)
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts == MAX_FAILED_STARTS:
                raise RunError(
                    f"data.workers: loader processes end while they start ({status}); look for what they "
                    "print and for memory running out, or set data.workers=0"
                )
        if worker.job is None:
            _say(f"a loader process died ({status}) and is replaced")
            return
        job = waiting.open[worker.job]
        samples = [place.sample for place in job.places]
        if job.deaths >= DEATHS_TO_SUSPECT:
            if worker.announced is None:
                raise RunError(
                    f"data.workers: loader processes die ({status}) over the samples {samples}, before any "
                    "image is decoded; look for memory running out, or set data.workers=0"
                )
            self.refused |= {worker.announced}
            _say(f"{worker.announced.source}: the image {worker.announced.key} {KILLS}, it is refused")
        job.assigned, job.deaths = False, job.deaths + 1
        _say(f"a loader process died ({status}) over the samples {samples}; another one reads them again")

    def _check_hang(self, worker: _Worker, waiting: _Jobs[T]) -> None:
        if time.monotonic() - worker.busy_since < self._timeout_s:
            return
        if not worker.ready:
            raise RunError(
                f"data.workers: a loader process has not started within {self._timeout_s:g} s; look for what "
                "keeps the machine busy, or set data.workers=0"
            )
        if worker.job is not None:
            samples = [place.sample for place in waiting.open[worker.job].places]
            raise RunError(
                f"data.workers: a loader process has been busy with the samples {samples} for more than "
                f"{self._timeout_s:g} s; look at their images and at the disk they lie on, or raise "
                "parallel.timeout_s"
            )

    def _remove(self, worker: _Worker, kill: bool) -> str:
        """Forget a worker once it has ended; how it ended."""
        self._workers.remove(worker)
        worker.link.close()
        if kill:
            worker.process.kill()
        try:
            code = worker.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:  # it has closed its end of the link, but goes on
            worker.process.kill()
            code = worker.process.wait()
        return f"signal {-code}" if code < 0 else f"exit status {code}"


def _say(text: str) -> None:
    print(f"megamm: {text}", file=sys.stderr, flush=True)
