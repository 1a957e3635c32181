"""SPICE (Anderson et al. 2016), where its models are.

They (Stanford CoreNLP 3.6.0, two jars) are not part of pycocoevalcap, which fetches hundreds of MB when SPICE
is first asked for. This never does: where they are missing, SPICE is left out.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megamm.evaluation.scores.java import jar, package_folder, running

_JAR = "spice/spice-1.0.jar"
_MODELS = ("spice/lib/stanford-corenlp-3.6.0.jar", "spice/lib/stanford-corenlp-3.6.0-models.jar")
# It reaches into classes that Java closes from version 16 on. Version 8 knows neither option nor variable.
_OPENED = ("java.base/java.lang", "java.base/java.util", "java.base/java.nio", "java.base/sun.nio.ch")
_OPTIONS = {"JDK_JAVA_OPTIONS": " ".join(f"--add-opens={module}=ALL-UNNAMED" for module in _OPENED)}
_START_S, _S_PER_CAPTION = 600.0, 5.0


def spice(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float | None, str | None]:
    """SPICE of tokenized captions, between 0 and 1, and None; or None, and why it is left out."""
    folder = package_folder()
    missing = [name for name in _MODELS if not (folder / name).is_file()]
    if missing:
        return None, (
            f"SPICE is left out: {folder / missing[0]} is missing; put the two jars of Stanford CoreNLP 3.6.0"
            " (stanford-corenlp-full-2015-12-09.zip) there"
        )
    with tempfile.TemporaryDirectory(prefix="megamm-spice-") as place:
        given, found = Path(place, "captions.json"), Path(place, "scores.json")
        rows = [
            {"image_id": number, "test": caption, "refs": list(refs)}
            for number, (caption, refs) in enumerate(zip(captions, references, strict=True))
        ]
        given.write_text(json.dumps(rows))
        path = jar(_JAR)
        arguments = ["-Xmx8G", "-jar", str(path), str(given), "-out", str(found), "-subset", "-silent"]
        try:
            with running(arguments, path.parent, _OPTIONS) as process:
                process.communicate(timeout=_START_S + _S_PER_CAPTION * len(captions))
            scores = [float(row["scores"]["All"]["f"]) for row in json.loads(found.read_text())]
            mean = statistics.fmean(scores)
        except subprocess.TimeoutExpired:
            return None, "SPICE is left out: its Java program does not end"
        except (OSError, ValueError, KeyError, TypeError):
            return None, f"SPICE is left out: its Java program ended with {process.returncode} and no scores"
    if math.isnan(mean):
        return None, "SPICE is left out: it is no number for some of these captions"
    return mean, None
