"""The generated parts of RESULTS.md: what stands between two marks of a name is replaced, nothing else."""

from __future__ import annotations


def marks(name: str) -> tuple[str, str]:
    """The lines around the part `name`."""
    return f"<!-- generated: {name} -->", f"<!-- end: {name} -->"


def rewritten(text: str, name: str, content: str, at_top: bool = False) -> str:
    """The text with `content` as its part `name`.

    A part that has no place yet gets one at the end, or behind the first heading.

    Raises:
        ValueError: its marks stand there more than once, one without the other, or in the wrong order.
    """
    first, last = marks(name)
    block = f"{first}\n{content.strip()}\n{last}"
    lines = text.splitlines()
    begins = [number for number, line in enumerate(lines) if line.strip() == first]
    ends = [number for number, line in enumerate(lines) if line.strip() == last]
    if not begins and not ends:
        return _placed(text, block, f"## {name}\n\n" if not at_top else "", at_top)
    if len(begins) != 1 or len(ends) != 1 or begins[0] > ends[0]:
        raise ValueError(
            f"the marks of {name} do not enclose one part: {first} and {last} must stand once each"
        )
    kept = [*lines[: begins[0]], *block.splitlines(), *lines[ends[0] + 1 :]]
    return "\n".join(kept) + "\n"


def part_of(text: str, name: str) -> str:
    """What stands in the part `name`; nothing where there is none."""
    first, last = marks(name)
    _, begins, rest = text.partition(first)
    content, ends, _ = rest.partition(last)
    return content if begins and ends else ""


def _placed(text: str, block: str, heading: str, at_top: bool) -> str:
    if not at_top:
        return f"{text.rstrip()}\n\n{heading}{block}\n"
    lines = text.splitlines()
    titles = [number for number, line in enumerate(lines) if line.startswith("# ")]
    place = titles[0] + 1 if titles else 0
    return "\n".join([*lines[:place], "", *block.splitlines(), *lines[place:]]) + "\n"
