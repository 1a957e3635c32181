"""All checks before the first step, on all ranks, and what becomes of their findings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch.distributed as dist

from megamm.config import Recipe
from megamm.data.tokenizer import Tokenizer
from megamm.engine.groups import Groups
from megamm.engine.ranks import describe, gather
from megamm.errors import InputError, MegammError, RunError
from megamm.training.preflight.data import check_data
from megamm.training.preflight.disk import check_disk
from megamm.training.preflight.found import Found
from megamm.training.preflight.memory import check_memory
from megamm.training.preflight.network import check_network

_MOST = 5  # problems of one kind that are told


@dataclass(frozen=True)
class _Outcome:
    """What a check came to on one rank.

    Attributes:
        crash: an error that no check should meet.
    """

    found: Found = field(default_factory=Found)
    crash: str = ""


def preflight(recipe: Recipe, layout: Groups, tokenizer: Tokenizer, report: Callable[[str], None]) -> None:
    """Check what `recipe.preflight` asks for (collective). Comes before the model is built: one that does not
    fit into memory would fail there, with less to say.

    Args:
        recipe: validated.
        layout: the groups of the run.
        tokenizer: of the run.
        report: takes warnings, and remarks on what is legal but probably not meant.
    Raises:
        InputError: something that is to stop the run does not hold, here or on another rank; one sentence for
            each problem.
        RunError: ranks do not answer.
    """
    checks: dict[str, Callable[[], Found]] = {
        "network": lambda: check_network(layout, recipe.parallel.timeout_s),
        "data": lambda: check_data(recipe, layout, tokenizer),
        "disk": lambda: check_disk(recipe),
        "memory": lambda: check_memory(recipe, layout),
    }
    for name, check in checks.items():
        level = getattr(recipe.preflight, name)
        if level != "off":
            _settle(name, level, check, report)


def _settle(name: str, level: str, check: Callable[[], Found], report: Callable[[str], None]) -> None:
    """Run a check on every rank; all of them go on, or none."""
    outcome, error = _Outcome(), None
    try:
        outcome = _Outcome(check())
    except RunError:
        raise  # ranks do not answer, so that nothing can be told them
    except (MegammError, OSError) as problem:
        outcome = _Outcome(Found([str(problem) if isinstance(problem, MegammError) else describe(problem)]))
    except Exception as caught:
        error, outcome = caught, _Outcome(crash=describe(caught))
    outcomes = gather(outcome)
    if error is not None:
        raise error
    crashes = [f"rank {rank}: {o.crash}" for rank, o in enumerate(outcomes) if o.crash]
    if crashes:
        raise RunError(
            f"preflight.{name}: the check failed on {crashes[0]}; see the log of that rank, or set "
            f"preflight.{name}=off"
        )
    for remark in dict.fromkeys(text for o in outcomes for text in o.found.remarks):
        report(f"preflight.{name}: {remark}")
    problems = list(dict.fromkeys(text for o in outcomes for text in o.found.problems))
    if not problems:
        return
    told = [f"preflight.{name}: {problem}" for problem in problems[:_MOST]]
    if len(problems) > _MOST:
        told.append(f"preflight.{name}: and {len(problems) - _MOST} problems more")
    if level == "stop":
        raise InputError(" | ".join(told))
    for line in told:
        report(f"warning: {line}")
    dist.barrier()  # a warning is no reason to go on before the others have read theirs
