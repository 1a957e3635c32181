"""Who is to blame when a run hangs, told in one sentence."""

from __future__ import annotations

from collections.abc import Mapping

from megamm.training.watchdog.beat import Alarm, Beat

MANY = 16  # samples that a sentence names


def judge(alarm: Alarm, last: Mapping[int, Beat], answers: Mapping[int, Beat]) -> tuple[list[int], str]:
    """The ranks that hang, and the sentence.

    Args:
        alarm: that was raised.
        last: the last sign of life of every rank that ever gave one.
        answers: what the ranks answered to the alarm, which those that hang outside Python did not.
    """
    silent = sorted(rank for rank, beat in last.items() if rank not in answers and not beat.has_left)
    if silent:
        # what is known of it may be old, but it stopped within the step in which the others wait for it
        step = max(beat.step for beat in [*answers.values(), *(last[rank] for rank in silent)])
        told = "; ".join(_silent(last[rank], alarm) for rank in silent)
        return silent, f"step {step}: {told}{_samples(silent, last, answers)}"
    hung = sorted(_stuck(answers))
    told = "; ".join(_stuck_sentence(answers[rank]) for rank in hung)
    step = min(answers[rank].step for rank in hung)
    return hung, f"step {step}: {told}{_samples(hung, last, answers)}"


def _stuck(answers: Mapping[int, Beat]) -> list[int]:
    """Those the others wait for: who waits for nobody; else who is the farthest behind."""
    busy = [rank for rank, beat in answers.items() if not beat.is_waiting and not beat.has_left]
    if busy and len(busy) < len(answers):
        return busy
    behind = min((beat.step, beat.micro_batch) for beat in answers.values())
    return [rank for rank, beat in answers.items() if (beat.step, beat.micro_batch) == behind]


def _silent(beat: Beat, alarm: Alarm) -> str:
    return (
        f"rank {beat.rank} (process {beat.pid} on {beat.host}) has given no sign of life for "
        f"{alarm.seconds:.0f} s, last seen in {_place(beat)}"
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
