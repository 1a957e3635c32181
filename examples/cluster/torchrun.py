"""torchrun for runs that end in more ways than well and badly.

    python examples/cluster/torchrun.py TORCHRUN'S ARGUMENTS

- Processes are started again (--max-restarts) only after an end that this can cure: a rank was lost, killed
  or crashed. A run that a signal has stopped (75), wrong input (2) and a failure that would repeat itself
  (1) end the launch.
- SIGTERM, SIGINT and SIGUSR1 go to all ranks, which get STOP_GRACE_S seconds (unset: 600) to save.
- It ends with the run's exit code, and no traceback of its own stands below the sentence that says why.
"""

import os
import signal
import sys
from collections.abc import Collection
from types import FrameType

from torch.distributed import run
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megamm.errors import LOST, UNEXPECTED, is_final

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
HOW_RUNS_END = (
    *("--signals-to-handle", SIGNALS),
    *("--shutdown-timeout", os.environ.get("STOP_GRACE_S", "600")),
)


class Launch:
    """The agent of this node, watched. torchrun has no place for a policy of restarts, so some of its
    methods are replaced by ones that do a little more."""

    def __init__(self) -> None:
        self.ranks: SubprocessContext | None = None  # those of the current attempt
        self.told: signal.Signals | None = None
        self._monitor = LocalElasticAgent._monitor_workers
        self._initialize = LocalElasticAgent._initialize_workers
        assert callable(api._terminate_process_handler)
        LocalElasticAgent._monitor_workers = lambda agent, group: self._watch(agent, group)
        LocalElasticAgent._initialize_workers = lambda agent, group: self._begin(agent, group)
        api._terminate_process_handler = self._hand_on

    def exit_codes(self) -> list[int]:
        """Of the ranks of this node that have ended (of a signal: its negative), by rank."""
        if self.ranks is None:
            return []
        codes = [handler.proc.poll() for handler in self.ranks.subprocess_handlers.values()]
        return [code for code in codes if code is not None]

    def _begin(self, agent: LocalElasticAgent, group: WorkerGroup) -> None:
        self.ranks = None
        self._initialize(agent, group)
        self.ranks = agent._pcontext

    def _watch(self, agent: LocalElasticAgent, group: WorkerGroup) -> RunResult:
        result = self._monitor(agent, group)
        if result.state == WorkerState.FAILED:
            codes = [failure.exitcode for failure in result.failures.values()]
            if any(is_final(code) for code in codes):
                assert isinstance(agent._remaining_restarts, int)
                agent._remaining_restarts = 0
            elif agent._remaining_restarts:
                left = agent._remaining_restarts
                say(f"{how(codes)}; starting again from the last checkpoint ({left} restarts left)")
        return result

    def _hand_on(self, number: int, _: FrameType | None) -> None:
        """The first signal ends the loop of the agent, which hands it to the ranks and waits for them; one
        that comes while it waits goes to them directly."""
        if self.told is None:
            self.told = signal.Signals(number)
            raise SignalException(f"{self.told.name}", self.told)
        for handler in self.ranks.subprocess_handlers.values() if self.ranks else ():
            if handler.proc.poll() is None:
                os.killpg(handler.proc.pid, number)


def verdict(codes: Collection[int]) -> int:
    """The exit code of a launch whose ranks ended with `codes`: what is final decides; a defect tells more
    than that a rank was lost."""
    final = [code for code in codes if code and is_final(code)]
    if final:
        return final[0]
    return UNEXPECTED if UNEXPECTED in codes else LOST


def how(codes: Collection[int]) -> str:
    """How ranks ended, the one that caused it first: killed ones before those that missed them."""
    worst = min(codes, key=lambda code: (code == LOST, code == -signal.SIGTERM))
    return f"a rank was ended by {signal.Signals(-worst).name}" if worst < 0 else f"a rank ended with {worst}"


def say(text: str) -> None:
    print(f"torchrun.py: {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Returns the exit code."""
    launch = Launch()
    try:
        run.main([*HOW_RUNS_END, *sys.argv[1:]])
    except ChildFailedError as failed:
        return verdict([failure.exitcode for failure in failed.failures.values()])
    except SignalException as told:
        codes = launch.exit_codes()
        if any(code and is_final(code) for code in codes):
            return verdict(codes)
        return 128 + told.sigval if any(codes) or not codes else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
