"""Who is to blame when a run hangs, told in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megamm.training.watchdog.beat import Alarm, Beat

MANY = 16  # samples that a sentence names


@dataclass(frozen=True)
class Verdict:
    """Which ranks hang, in which step, and the sentence that says so."""

    step: int
    ranks: list[int]
    sentence: str


def judge(alarm: Alarm, last: Mapping[int, Beat], answers: Mapping[int, Beat]) -> Verdict:
    """Who is to blame.

    Args:
        alarm: that was raised.
        last: the last sign of life of every rank.
        answers: what the ranks answered to the alarm, which those that hang outside Python did not.
    """
    silent = sorted(rank for rank, beat in last.items() if rank not in answers and not beat.has_left)
    if silent:
        first, told = last[silent[0]], [silent_sentence(last[rank], alarm.seconds) for rank in silent]
        # what is known of it may be old: then it stopped about where the others wait for it
        step = first.step if first.is_exact else max(beat.step for beat in answers.values())
    else:
        silent = sorted(_stuck(answers))
        told = [_stuck_sentence(answers[rank]) for rank in silent]
        step = min(answers[rank].step for rank in silent)
    return Verdict(step, silent, f"step {step}: {'; '.join(told)}{_samples(silent, last, answers)}")


def _stuck(answers: Mapping[int, Beat]) -> list[int]:
    """Those the others wait for: who waits for nobody; else who is the farthest behind."""
    busy = [rank for rank, beat in answers.items() if not beat.is_waiting and not beat.has_left]
    if busy and len(busy) < len(answers):
        return busy
    behind = min((beat.step, beat.micro_batch) for beat in answers.values())
    return [rank for rank, beat in answers.items() if (beat.step, beat.micro_batch) == behind]


def silent_sentence(beat: Beat, seconds: float) -> str:
    """What there is to say of a rank that gave no sign of life for so long."""
    return (
        f"rank {beat.rank} (process {beat.pid} on {beat.host}) has given no sign of life for "
        f"{seconds:.0f} s, {'' if beat.is_exact else 'last seen '}in {_place(beat)}"
    )


def _stuck_sentence(beat: Beat) -> str:
    return (
        f"rank {beat.rank} (process {beat.pid} on {beat.host}) has got no further for {beat.seconds:.0f} s "
        f"in {_place(beat)}"
    )


def _place(beat: Beat) -> str:
    micro_batch = f" of micro-batch {beat.micro_batch}" if beat.micro_batch else ""
    code = f": {beat.code}" if beat.code else ""
    return f"{beat.phase}{micro_batch} of step {beat.step}{code}"


def _samples(ranks: list[int], last: Mapping[int, Beat], answers: Mapping[int, Beat]) -> str:
    """The samples of the copies of the model that the ranks belong to, as far as they are known."""
    known = {**last, **answers}
    leaders = sorted({known[rank].leader for rank in ranks})
    found = [
        sample
        for leader in leaders
        if leader in known
        for micro_batch in known[leader].samples
        for sample in micro_batch
    ]
    if not found:
        return ""
    more = f" and {len(found) - MANY} more" if len(found) > MANY else ""
    return f"; samples {', '.join(map(str, found[:MANY]))}{more}"
