"""Captions as the metrics compare them: Penn Treebank tokens, in small letters, without punctuation.

Stanford's PTBTokenizer 3.4.1, of pycocoevalcap, cuts a caption on each line. What separates lines in Java,
and in it alone, has to leave captions first, or all captions behind would be taken for others.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence

from megamm.errors import RunError
from megamm.evaluation.scores.java import jar, running

# As pycocoevalcap's ptbtokenizer.py has them.
PUNCTUATION = frozenset(
    {
        *("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-"),
        *(".", "?", "!", ",", ":", "-", "--", "...", ";"),
    }
)
_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
_BREAKS = re.compile("[\x00\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
_S_PER_CAPTION, _START_S = 0.05, 120.0  # a limit, hundreds of times what it takes


def tokenized(captions: Sequence[str]) -> list[str]:
    """Captions with a space between tokens, and none left of those that hold nothing but punctuation.

    Raises:
        InputError: Java or pycocoevalcap is missing.
        RunError: the tokenizer failed.
    """
    text = "\n".join(_BREAKS.sub(" ", caption) for caption in captions) + "\n"
    path = jar(_JAR)
    arguments = ["-cp", str(path), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    with running(arguments, path.parent) as process:
        try:
            found, _ = process.communicate(
                text.encode("utf-8", "replace"), timeout=_START_S + _S_PER_CAPTION * len(captions)
            )
        except subprocess.TimeoutExpired:
            raise RunError("PTBTokenizer: does not end; look for captions of a very unusual kind") from None
    lines = found.decode("utf-8", "replace").split("\n")
    if process.returncode or len(lines) != len(captions) + 1:
        raise RunError(
            f"PTBTokenizer: ended with {process.returncode} after {len(lines) - 1} of {len(captions)}"
            " captions; check that `java -version` works"
        )
    return [_without_punctuation(line) for line in lines[:-1]]


def _without_punctuation(line: str) -> str:
    return " ".join(token for token in line.rstrip().split(" ") if token not in PUNCTUATION)
