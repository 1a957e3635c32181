"""The Java programs behind captions' metrics: where they are, and processes that never outlive their use."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from megamm.errors import InputError, RunError

_REMEDY = "pip install 'megamm[eval]'"
# Nothing depends on the locale.
_UTF8 = ("-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-Dstdin.encoding=UTF-8")
_END_S = 5.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def package_folder() -> Path:
    """Where pycocoevalcap lies.

    Raises:
        InputError: it is not installed.
    """
    found = importlib.util.find_spec("pycocoevalcap")
    if found is None or not found.submodule_search_locations:
        raise InputError(f"pycocoevalcap: not installed, and captions are scored with it; {_REMEDY}")
    return Path(next(iter(found.submodule_search_locations)))


def jar(name: str) -> Path:
    """A jar of pycocoevalcap.

    Raises:
        InputError: it is missing.
    """
    path = package_folder() / name
    if not path.is_file():
        raise InputError(f"{path}: missing; install it again: pip install --force-reinstall pycocoevalcap")
    return path


def java() -> str:
    """The command `java`.

    Raises:
        InputError: there is none.
    """
    found = shutil.which("java")
    if found is None:
        raise InputError(
            "java: not installed, and METEOR and the tokenizer of captions need it (8 or later); install"
            " a Java runtime (Debian, Ubuntu: apt install default-jre-headless)"
        )
    return found


@contextmanager
def running(
    arguments: Sequence[str], folder: Path, variables: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A Java process with pipes, in `folder`; killed at the end of the block, whatever ended it.

    Args:
        variables: of its environment, besides those of this process.

    If this process is killed, Linux kills the other one, too; elsewhere that ends at the end of its input.

    Raises:
        InputError: there is no Java.
        RunError: it cannot be started.
    """
    command = [java(), *_UTF8, *arguments]
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def end_with_parent() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **(variables or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            preexec_fn=end_with_parent,
        )
    except OSError as error:
        raise RunError(
            f"java: cannot be started ({error.strerror}); check the installation of Java"
        ) from None
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:  # what was still to be written
                continue
    process.wait(_END_S)
