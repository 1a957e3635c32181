"""The errors a user may see: one clear sentence that names the file or key and the remedy.

`megamm.cli` prints them on stderr without a traceback (unless --debug) and maps them to exit codes.
Everything else that escapes is a defect of megamm and keeps its traceback.
"""

from __future__ import annotations


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
    """A process of the run was lost or hangs; started again, the run goes on. Exit code 69."""

    exit_code = 69
