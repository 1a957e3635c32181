"""A program that test_prepare_resume starts: `megamm prepare` killed at chosen operations on files.

    python -m tests.data.killed_prepare SOURCE IMAGES TOKENIZER OUT [KILL_AT ...]

Runs prepare in a child once for every KILL_AT, which is killed (SIGKILL) before its file operation of that
number, and once more to the end. Prints as JSON how many operations the last run had and how many chunks it
found done.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from megamm.data import prepare_writer
from megamm.data.prepare import prepare
from tests.data.helpers import use_chunks

CHANGES = ("write", "fsync", "rename", "mkdir", "unlink", "rmdir", "ftruncate")


def count_changes(kill_at: int | None) -> list[int]:
    """Count operations from now on, and die before one of them; the count, in a list."""
    count = [0]

    def counted(function):  # type: ignore[no-untyped-def]
        def run(*args, **options):  # type: ignore[no-untyped-def]
            count[0] += 1
            if count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return run

    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name)))
    opened = counted(lambda: None)
    sys.addaudithook(lambda event, _: opened() if event == "open" else None)  # reading too
    return count


def run(arguments: list[str], kill_at: int | None) -> dict[str, int] | None:
    """What one run in a child says, None if it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        count = count_changes(kill_at)
        source, images, tokenizer, out = map(Path, arguments)
        report = prepare([source], "llava", out, tokenizer, [images], "vicuna", 1)
        print(json.dumps({"operations": count[0], "resumed": report.resumed}), file=os.fdopen(writer, "w"))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read()
    os.waitpid(child, 0)
    return json.loads(said) if said else None


if __name__ == "__main__":
    use_chunks(4)
    prepare_writer.JOURNAL_SECONDS = 0.0
    for kill_at in sys.argv[5:]:
        run(sys.argv[1:5], int(kill_at))
    print(json.dumps(run(sys.argv[1:5], None)))
