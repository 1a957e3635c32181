"""The errors a user may see: one clear sentence that names the file or key and the remedy.

`megamm.cli` prints them on stderr without a traceback (unless --debug) and maps them to exit codes.
Everything else that escapes is a defect of megamm and keeps its traceback.
"""

from __future__ import annotations

STOPPED = 75  # a signal asked for it, after a checkpoint: EX_TEMPFAIL, "try again later"
LOST = 69  # another rank died or hung: EX_UNAVAILABLE
UNEXPECTED = 70  # a defect, with its traceback: EX_SOFTWARE
INTERRUPTED = 130  # Ctrl-C: 128 + SIGINT, as shells count


def is_final(code: int) -> bool:
    """Whether a process that ended so (negative: of a signal) would end so again, or was asked to end. What
    is not final goes on from the last checkpoint when it is started again: a lost rank, death by a signal, a
    defect."""
    return code in (0, 1, 2, STOPPED, INTERRUPTED)


class MegammError(Exception):
    """Base of the errors that are written for users; `exit_code` is what the process returns."""

    exit_code = 1


class InputError(MegammError):
    """Wrong usage, recipe, data or checkpoint: something the user can correct. Exit code 2."""

    exit_code = 2


class RunError(MegammError):
    """A run that was asked for correctly but failed (diverged, disk full, ...). Exit code 1."""

    exit_code = 1


class RankLost(RunError):
    """Another rank has died or does not answer; the run goes on from its last checkpoint. Exit code 69.

    Attributes:
        is_known: the launcher knows it already (it asked this rank to end), so this rank need not say it.
    """

    exit_code = LOST

    def __init__(self, message: str, is_known: bool = False) -> None:
        super().__init__(message)
        self.is_known = is_known
