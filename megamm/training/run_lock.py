"""RUN_DIR/lock: no two runs write into one directory.

The kernel keeps the lock, for rank 0 as long as it lives, so that a killed run leaves none behind; the file
says who has it. Other commands (report, evaluate, generate, verify) only read what is committed, and ask for
no lock.
"""

from __future__ import annotations

import errno
import fcntl
import getpass
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import psutil

from megamm.engine.ranks import describe, from_rank_0
from megamm.errors import InputError

FILE = "lock"
# A predecessor that was killed a moment ago may not be gone yet.
PATIENCE_S = 10.0
_POLL_S = 0.1
_TAKEN = (errno.EACCES, errno.EAGAIN)


@dataclass(frozen=True)
class Owner:
    """Who has the lock.

    Attributes:
        host, pid, user: of rank 0.
        since: time of day, with the zone.
        slurm_job: its id, "" without one.
        launch: what torchrun or Slurm calls the launch, "" without one.
    """

    host: str
    pid: int
    user: str
    since: str
    slurm_job: str = ""
    launch: str = ""

    @staticmethod
    def here() -> Owner:
        """This process."""
        job = os.environ.get("SLURM_JOB_ID", "")
        launch = os.environ.get("TORCHELASTIC_RUN_ID", job)
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        return Owner(socket.gethostname(), os.getpid(), _user(), since, job, launch)

    def is_on_its_way_out(self) -> bool:
        """Whether it is an earlier attempt of this launch, or a process of this machine that has ended
        already."""
        mine = Owner.here()
        if self.launch and self.launch == mine.launch:
            return True
        return self.host == mine.host and not psutil.pid_exists(self.pid)

    def __str__(self) -> str:
        job = f" (Slurm job {self.slurm_job})" if self.slurm_job else ""
        return f"process {self.pid} of {self.user} on {self.host}{job}, since {self.since}"


class RunLock:
    """The lock of a run directory, taken when this is made, given back at the end of the context or of the
    process. All ranks call this together; rank 0 holds it.

    Args:
        run_dir: made if it is missing.
        report: takes a line for the log where the file system knows no locks.
    Raises:
        InputError: another run has it; names that; on every rank.
    """

    def __init__(self, run_dir: Path, report: Callable[[str], None]) -> None:
        self._file: IO[str] | None = None
        if remark := from_rank_0(lambda: self._take(run_dir)):
            report(remark)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def _take(self, run_dir: Path) -> str | None:
        """On rank 0; why there is no lock, if there is none."""
        path = run_dir / FILE
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            # not inherited by processes that this one starts; "a" keeps what the owner has written
            file = path.open("a+", encoding="utf-8")
        except OSError as error:  # whether the directory can be written at all is the preflight's to say
            return _unlocked(path, error)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                # a POSIX lock: forks do not inherit it, and network file systems have it if they have any
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                owner = _read_owner(file)
                if error.errno not in _TAKEN:
                    file.close()
                    return _unlocked(path, error)
                if time.monotonic() > deadline or not (owner and owner.is_on_its_way_out()):
                    file.close()
                    raise _refusal(run_dir, owner) from None
            time.sleep(_POLL_S)
        self._file = file
        return _write_owner(file)


def _read_owner(file: IO[str]) -> Owner | None:
    try:
        file.seek(0)
        return Owner(**json.load(file))
    except (OSError, ValueError, TypeError):  # it is being written, or was by another version
        return None


def _write_owner(file: IO[str]) -> str | None:
    try:
        file.truncate(0)
        json.dump(asdict(Owner.here()), file)
        file.flush()
    except OSError as error:  # a full disk: locked all the same
        return f"{file.name}: its owner cannot be written into it ({describe(error)})"
    return None


def _refusal(run_dir: Path, owner: Owner | None) -> InputError:
    name = str(owner) if owner is not None else "an unknown process"
    stop = "stop it"
    if owner is not None:
        stop = f"stop it (scancel {owner.slurm_job})" if owner.slurm_job else f"stop it (kill {owner.pid})"
    return InputError(
        f"run_dir: {run_dir} is in use by another run: {name}; wait for its end, {stop}, or give another "
        "run_dir"
    )


def _unlocked(path: Path, error: OSError) -> str:
    return (
        f"warning: {path}: cannot be locked here ({describe(error)}), so a second run in this directory "
        "would not be noticed; start none"
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without this user
        return str(os.getuid())
