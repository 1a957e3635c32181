"""What a run is trained on, in a few lines."""

from __future__ import annotations

from fractions import Fraction

from megamm.data.step_plan import StepPlanner

_WHAT = {"any": "samples", "images": "samples with images", "text": "samples of text alone"}


def describe_blend(planner: StepPlanner, steps: int) -> list[str]:
    """A line for each source: its samples, their share, and how often `steps` steps come to each of them. How
    many samples a packed step takes is known of the first step of each group alone: the rest is an estimate.
    """
    groups, lines = planner.groups, []
    total = sum((group.share for group in groups), Fraction(0))
    per_sample = Fraction(0)  # steps that the samples take, on average
    for number, group in enumerate(groups):
        plan = planner.plan_of(number, (0,) * len(groups))
        per_sample += group.share / total / plan.end[number]
    samples = steps / per_sample
    for number, group in enumerate(groups):
        length = group.sequence_length
        for part in group.parts:
            share = part.share / total
            epochs = float(samples * share / len(part.rows))
            together = f", in steps of group {number} of {len(groups)}" if len(groups) > 1 else ""
            lines.append(
                f"data: {part.source}: {len(part.rows):,} {_WHAT[part.kind]}, at most {length} "
                f"positions, {float(share):.1%} of what is trained on, about {epochs:.2f} epochs{together}"
            )
    return lines
