"""What a rank that torchrun has started owes it: not to outlive it, and not to be started again in vain.

torchrun's store (its key-value server) lives as long as the launch, longer than the ranks of one attempt.
How an attempt ended is kept there, so that the next one, which torchrun starts whatever the exit code was,
ends the same way instead of going on against the user's will.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from megamm.errors import INTERRUPTED, UNEXPECTED, MegammError, is_final

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_END = "megamm/end"  # key of the store
END_FILE = "MEGAMM_END_FILE"  # set by examples/cluster/train.sbatch: where it reads the exit code of a run
_PATIENCE = timedelta(seconds=5)


def run_as_rank(run: Callable[[], int], environment: Mapping[str, str]) -> int:
    """Call `run`, of one rank of a training run, unless an earlier attempt of the same launch has ended for
    good.

    Args:
        run: returns an exit code.
        environment: of this process.
    Returns:
        The exit code; UNEXPECTED for a defect, whose traceback is printed: unlike the errors that are raised
        on, it may be cured by starting again.
    """
    end_with_launcher(environment)
    if (earlier := earlier_end(environment)) is not None:
        return earlier
    code, reason = UNEXPECTED, ""
    try:
        code = run()
        reason = "stopped by a signal"
    except KeyboardInterrupt:
        code, reason = INTERRUPTED, "interrupted"
        raise
    except MegammError as error:
        code, reason = error.exit_code, str(error)
        raise
    except BaseException as error:  # megatron's CheckpointException is not an Exception
        if isinstance(error, SystemExit) or (isinstance(error, OSError) and error.filename is not None):
            code, reason = 1, str(error)
            raise
        traceback.print_exc()
    finally:
        keep_end(environment, code, reason)
    return code


def end_with_launcher(environment: Mapping[str, str]) -> None:
    """Under torchrun: have the kernel send SIGTERM to this process when its launcher ends, however that
    ends, upon which it saves and stops. torchrun's own word would never come if it was killed.

    Args:
        environment: of this process.
    """
    if "TORCHELASTIC_RUN_ID" not in environment or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended in between
        os.kill(os.getpid(), signal.SIGTERM)


def earlier_end(environment: Mapping[str, str]) -> int | None:
    """The exit code with which an earlier attempt of this launch has ended for good; None if there was none.
    Rank 0 says so."""
    store = _store_of_launch(environment)
    if store is None or not store.check([_END]):
        return None
    end = json.loads(store.get(_END))
    if environment.get("RANK") == "0":
        print(
            f"megamm: this launch has ended with exit code {end['code']} ({end['reason']}), and restarting "
            "its processes does not change that; start it anew",
            file=sys.stderr,
            flush=True,
        )
    return int(end["code"])


def keep_end(environment: Mapping[str, str], code: int, reason: str) -> None:
    """Tell later attempts of this launch that it has ended for good, if `code` says that; also the script of
    a Slurm job, which hears from srun the highest exit code, that of ranks which srun itself has killed.

    Args:
        environment: of this process.
        code: exit code.
        reason: of the end, in a few words.
    """
    if code == 0 or not is_final(code):
        return
    if END_FILE in environment:
        with contextlib.suppress(OSError):
            Path(environment[END_FILE]).write_text(f"{code}\n")
    with contextlib.suppress(RuntimeError):  # the launcher ends at this moment
        store = _store_of_launch(environment)
        if store is not None and not store.check([_END]):
            store.set(_END, json.dumps({"code": code, "reason": reason}))


def _store_of_launch(environment: Mapping[str, str]) -> Any:
    """The store of torchrun; None where there is none, or where nothing will be started again."""
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    if int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0")) == 0:
        return None
    place = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    try:  # TCPStore itself would try again and again, aloud
        socket.create_connection(place, _PATIENCE.total_seconds()).close()
    except OSError:  # the launcher has ended: nobody will start anything
        return None
    from torch.distributed import TCPStore

    return TCPStore(*place, is_master=False, timeout=_PATIENCE, wait_for_workers=False)
