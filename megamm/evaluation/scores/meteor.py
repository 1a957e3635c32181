"""METEOR 1.5 (Denkowski and Lavie 2014), by the jar of pycocoevalcap.

The program reads a line and answers with a line: SCORE with the references and the caption gives the
statistics of a pair, EVAL with all statistics gives a score for each and one for all. Fields are parted by
"|||", which therefore leaves the texts.
"""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Sequence

from megamm.errors import RunError
from megamm.evaluation.scores.java import jar, running

_JAR = "meteor/meteor-1.5.jar"
_ARGUMENTS = ("-", "-", "-stdio", "-l", "en", "-norm")


def meteor(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """METEOR of tokenized captions, between 0 and 1: over all of them, and of each.

    (That over all is made of their statistics; it is not the mean.)
    A caption that repeats one word thousands of times costs seconds; hundreds in its reference, too, minutes.

    Raises:
        InputError: Java or pycocoevalcap is missing.
        RunError: the program failed.
    """
    path = jar(_JAR)
    with running(["-Xmx2G", "-jar", str(path), *_ARGUMENTS], path.parent) as process:
        statistics = [
            _asked(process, " ||| ".join(["SCORE", *map(_field, given), _field(caption)]))
            for caption, given in zip(captions, references, strict=True)
        ]
        _write(process, " ||| ".join(["EVAL", *statistics]))
        each = [_number(process) for _ in statistics]
        return _number(process), each


def _field(text: str) -> str:
    """A text without what parts fields and lines."""
    return re.sub(r"[\r\n]", " ", text.replace("|||", "")).replace("  ", " ")


def _asked(process: subprocess.Popen[bytes], line: str) -> str:
    _write(process, line)
    return _read(process)


def _write(process: subprocess.Popen[bytes], line: str) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(line.encode("utf-8", "replace") + b"\n")
        process.stdin.flush()
    except OSError:
        raise _failure("ended") from None


def _read(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().decode("utf-8", "replace").strip()
    if not line or line.startswith("Error"):
        raise _failure(f"answered {line!r}" if line else "ended")
    return line


def _number(process: subprocess.Popen[bytes]) -> float:
    line = _read(process)
    try:
        value = float(line)
    except ValueError:
        raise _failure(f"answered {line[:60]!r}") from None
    return 0.0 if math.isnan(value) else value


def _failure(what: str) -> RunError:
    return RunError(
        f"METEOR: the Java program {what}; check that `java -version` works and that 2 GB are free"
    )
