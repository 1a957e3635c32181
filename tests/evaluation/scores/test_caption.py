"""Captions: the numbers of pycocoevalcap called directly, captions that break programs, failures."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megamm.errors import InputError, MegammError, RunError
from megamm.evaluation.scores import caption, java, score_rows
from megamm.evaluation.scores.captions_text import tokenized
from megamm.evaluation.scores.meteor import meteor
from megamm.evaluation.scores.spice import spice

ROOT = Path(__file__).parents[3]
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None, reason="pycocoevalcap is not installed"
)
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="Java is not installed")

SUBJECTS = ["a dog", "two dogs", "the man", "A woman in red", "several children", "an old train"]
VERBS = ["runs", "is running", "sits", "is standing", "jumps", "rides"]
PLACES = [
    "on the beach.",
    "in a park",
    "near the water",
    "on a red bench.",
    "down the street",
    "in front of it",
]
ODD = [
    "A dog\nruns on the beach",
    "a dog\r\nruns\x85on\u2028the beach\u2029",
    "",
    " ",
    ".",
    '"!?',
    "a ||| dog",
    "|||",
    "a|||b ||| c",
    "SCORE ||| a dog",
    "caf\u00e9 na\u00efve \u72ac \U0001f415",
    "\u00a0dog\u00a0",
    "(555) 123-4567 and 1 1/2 dogs",
    "it's the dog's <b>bone</b> & more",
    "a\tdog",
    "a\x00dog\x0b\x0c\x1c",
    "lone \ud83d half",
    "word " * 3000,
    "a " * 400,
    "x" * 5000,
]


def sentence(generator: random.Random) -> str:
    return " ".join(generator.choice(words) for words in (SUBJECTS, VERBS, PLACES))


def corpus(images: int) -> tuple[dict[int, str], dict[int, list[str]]]:
    """Captions and five references for each image, which share words."""
    generator = random.Random(0)
    captions = {n: sentence(generator) for n in range(images)}
    return captions, {n: [sentence(generator) for _ in range(5)] for n in range(images)}


def scored(captions: dict[Any, str], references: dict[Any, list[str]]) -> dict[str, Any]:
    predictions = [{"id": key, "prediction": text} for key, text in captions.items()]
    rows = [{"id": key, "references": texts} for key, texts in references.items()]
    return score_rows("caption", predictions, rows).as_dict()


@pytest.mark.slow
@needs_package
@needs_java
def test_numbers_of_pycocoevalcap() -> None:
    """Its own tokenizer, its own METEOR process, on captions that it can take."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions, references = corpus(30)
    captions |= {30: "A dog's (old) bone, isn't it?", 31: "...", 32: "caf\u00e9 \u2014 na\u00efve"}
    references |= {n: ["The dog's bone isn't \"old\"!", "a café; a na\u00efve -- bone"] for n in (30, 31, 32)}
    theirs = PTBTokenizer()
    found = theirs.tokenize({n: [{"caption": text}] for n, text in captions.items()})
    wanted = theirs.tokenize({n: [{"caption": text} for text in texts] for n, texts in references.items()})
    expected = dict(
        zip(("bleu1", "bleu2", "bleu3", "bleu4"), Bleu(4).compute_score(wanted, found, 0)[0], strict=True)
    )
    expected |= {"meteor": Meteor().compute_score(wanted, found)[0]}
    expected |= {
        "rouge_l": Rouge().compute_score(wanted, found)[0],
        "cider": Cider().compute_score(wanted, found)[0],
    }
    ours = scored(captions, references)
    for name, value in expected.items():
        assert value > 0.01, name
        assert ours[name] == pytest.approx(100 * value, abs=1e-9), name
    assert ours["n"] == 33 and ours["empty"] == 1


@needs_package
@needs_java
def test_every_caption_keeps_its_line() -> None:
    """Each odd caption stands between two marked ones, and has to come out between them."""
    marked = [text for n, odd in enumerate(ODD) for text in (f"before{n}", odd, f"after{n}")]
    found = tokenized(marked)
    assert len(found) == len(marked)
    for n, odd in enumerate(ODD):
        assert found[3 * n] == f"before{n}" and found[3 * n + 2] == f"after{n}", repr(odd)
    between = dict(zip(ODD, found[1::3], strict=True))
    assert between["A dog\nruns on the beach"] == "a dog runs on the beach"
    assert between["a dog\r\nruns\x85on\u2028the beach\u2029"] == "a dog runs on the beach"
    assert [between[odd] for odd in ("", " ", ".")] == ["", "", ""]
    assert between["caf\u00e9 na\u00efve \u72ac \U0001f415"].startswith("caf\u00e9 na\u00efve \u72ac")
    assert len(between["word " * 3000].split()) == 3000
    assert tokenized(["end"] * 3 + ["", ""]) == ["end"] * 3 + ["", ""]


@pytest.mark.slow
@needs_package
@needs_java
def test_odd_captions_do_not_change_the_scores_of_others() -> None:
    """One process of METEOR: an odd caption between good ones, as caption and as reference."""
    good = "a dog runs on the beach"
    odd = [*tokenized(ODD), "a ||| dog", "two\nlines", "||| |||"]
    captions = [text for one in odd for text in (one, good)]
    references = [given for one in odd for given in ([good, "a cat"], [one[:200], good])]
    overall, each = meteor(captions, references)
    assert 0.0 < overall < 1.0 and len(each) == len(captions)
    assert each[1::2] == [1.0] * len(odd)
    assert all(0.0 <= value < 1.0 for value, one in zip(each[::2], odd, strict=True) if one != good)
    assert [each[2 * n] for n, one in enumerate(odd) if not one] == [0.0] * odd.count("")


@pytest.mark.slow
@needs_package
@needs_java
def test_an_image_without_a_prediction_has_an_empty_caption() -> None:
    """Compared with an empty one, whose references come as COCO's annotations."""
    captions, references = corpus(4)
    missing = scored({n: captions[n] for n in range(3)}, references)
    texts = [(key, text) for key, given in references.items() for text in given]
    annotations = [{"id": 1000 + n, "image_id": key, "caption": text} for n, (key, text) in enumerate(texts)]
    results = [{"image_id": key, "caption": text} for key, text in {**captions, 3: ""}.items()]
    empty = score_rows("caption", results, annotations)
    assert empty.numbers == {name: missing[name] for name in empty.numbers}
    assert empty.numbers["bleu1"] > 10.0 and empty.numbers["cider"] > 10.0
    assert missing["unanswered"] == 1 and missing["empty"] == empty.counts["empty"] == 1


@pytest.mark.slow
@needs_package
@needs_java
def test_no_words_at_all() -> None:
    found = scored({1: ".", 2: ""}, {1: ["..."], 2: ["!"]})
    assert (found["cider"], found["meteor"], found["empty"]) == (0.0, 0.0, 2)


@needs_package
@pytest.mark.parametrize(
    ("references", "message"),
    [
        ([{"id": 1}], 'has no "references"'),
        ([{"id": 1, "references": []}], 'has no "references"'),
        ([{"id": 1, "references": "a dog"}], 'has no "references"'),
        ([{"id": 1, "references": ["a", 3]}], "a caption is 3; give text"),
        ([{"image_id": 1, "caption": None}], "a caption is None"),
        ([{"id": 2, "references": ["a"]}], "no reference has the id '1'"),
    ],
)
@needs_java
def test_bad_references(references: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        score_rows("caption", [{"id": 1, "prediction": "a dog"}], references)


def test_missing_package_and_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(java.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"java: not installed.*; install a Java runtime"):
        java.java()
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pycocoevalcap: not installed.*pip install 'megamm\[eval\]'"):
        scored({1: "a"}, {1: ["a"]})
    monkeypatch.setattr(java, "package_folder", lambda: tmp_path)
    with pytest.raises(InputError, match="missing; install it again"):
        java.jar("meteor/meteor-1.5.jar")


def test_spice_is_left_out_without_its_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("megamm.evaluation.scores.spice.package_folder", lambda: tmp_path)
    value, reason = spice(["a dog"], [["a dog"]])
    assert value is None and reason is not None
    assert "stanford-corenlp-3.6.0.jar is missing; put" in reason


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.5, 0.25], 0.375),
        ([0.5, None], "ended with 0 and no scores"),
        ([], "ended with 0 and no scores"),
        ([float("nan")], "no number"),
    ],
)
def test_spice_with_its_models(
    scores: list[Any], expected: Any, fake_java: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What its program (a stand-in) is given, and what is made of its answer."""
    (tmp_path / "spice" / "lib").mkdir(parents=True)
    for name in ("", "-models"):
        (tmp_path / "spice" / "lib" / f"stanford-corenlp-3.6.0{name}.jar").touch()
    monkeypatch.setattr("megamm.evaluation.scores.spice.package_folder", lambda: tmp_path)
    rows = [{"image_id": n, "scores": {"All": {"f": value}}} for n, value in enumerate(scores)]
    pid = fake_java(
        "place = sys.argv.index('-out')\n"
        f"open({str(tmp_path / 'given')!r}, 'w').write(open(sys.argv[place - 1]).read())\n"
        f"open(sys.argv[place + 1], 'w').write({json.dumps(rows)!r})"
    )
    value, reason = spice(["a dog", "caf\u00e9"], [["one"], ["two", "three"]])
    assert json.loads((tmp_path / "given").read_text()) == [
        {"image_id": 0, "test": "a dog", "refs": ["one"]},
        {"image_id": 1, "test": "caf\u00e9", "refs": ["two", "three"]},
    ]
    if isinstance(expected, float):
        assert (value, reason) == (expected, None)
    else:
        assert value is None and reason is not None and expected in reason
    assert not is_alive(pid)


@pytest.fixture
def fake_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Puts a Python script in the place of Java, and a file in that of the jars. It writes down its id."""

    def install(code: str) -> Path:
        script, pid = tmp_path / "java", tmp_path / "pid"
        prelude = f"import os, sys, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\n"
        script.write_text(f"#!{sys.executable}\n{prelude}{code}\n")
        script.chmod(0o755)
        monkeypatch.setattr(java.shutil, "which", lambda name: str(script))
        for name in ("meteor", "captions_text", "spice"):
            monkeypatch.setattr(f"megamm.evaluation.scores.{name}.jar", lambda name: script)
        return pid

    return install


def is_alive(pid: Path) -> bool:
    """Whether the process runs; one that nobody has waited for yet does not."""
    try:
        return psutil.Process(int(pid.read_text())).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("sys.exit(1)", "METEOR: the Java program ended"),
        ("print('Error: out of memory', flush=True)\nsys.stdin.read()", "answered 'Error: out of memory'"),
        ("for line in sys.stdin: print('1.0 2.0', flush=True)", "answered '1.0 2.0'"),
        ("sys.stdin.readline()", "METEOR: the Java program ended"),
    ],
)
def test_meteor_that_fails(fake_java: Any, code: str, message: str) -> None:
    pid = fake_java(code)
    with pytest.raises(RunError, match=message):
        meteor(["a dog", "a cat"], [["a dog"], ["a cat"]])
    assert not is_alive(pid)


def test_meteor_asks_line_by_line(fake_java: Any, tmp_path: Path) -> None:
    """What it is asked, with the answers of a program that counts words."""
    asked = tmp_path / "asked"
    fake_java(
        f"asked = open({str(asked)!r}, 'w')\n"
        "for line in sys.stdin:\n"
        "    asked.write(line); asked.flush()\n"
        "    fields = line.rstrip('\\n').split(' ||| ')\n"
        "    numbers = ['0.5' for _ in fields[1:]] + ['0.25']\n"
        "    print('1 2' if fields[0] == 'SCORE' else '\\n'.join(numbers), flush=True)"
    )
    assert meteor(["a dog", "|||"], [["one", "two\nlines"], ["x ||| y"]]) == (0.25, [0.5, 0.5])
    assert asked.read_text().splitlines() == [
        "SCORE ||| one ||| two lines ||| a dog",
        "SCORE ||| x y ||| ",
        "EVAL ||| 1 2 ||| 1 2",
    ]


def test_an_interrupted_meteor_leaves_no_process(fake_java: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = fake_java("time.sleep(600)")

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        with pytest.raises(KeyboardInterrupt):
            meteor(["a dog"], [["a dog"]])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not is_alive(pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_command_leaves_no_process(number: int, fake_java: Any, tmp_path: Path) -> None:
    pid = fake_java("time.sleep(600)")
    code = (
        "import pathlib, sys; from megamm.evaluation.scores import java\n"
        f"java.shutil.which = lambda name: {str(tmp_path / 'java')!r}\n"
        "with java.running([], pathlib.Path('.')) as process: process.wait()"
    )
    command = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    command.send_signal(number)
    assert command.wait(60) == -number
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(pid)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("sys.exit(3)", "ended with 3 after 0 of 2 captions"),
        ("sys.stdin.read()\nprint('one')", "ended with 0 after 1 of 2 captions"),
        ("sys.stdin.read()\ntime.sleep(600)", "does not end"),
    ],
)
def test_tokenizer_that_fails(
    fake_java: Any, code: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megamm.evaluation.scores.captions_text._START_S", 2.0)
    pid = fake_java(code)
    with pytest.raises(RunError, match=message):
        tokenized(["one", "two"])
    assert not is_alive(pid)


def test_java_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "java"
    script.write_text("no program")
    monkeypatch.setattr(java.shutil, "which", lambda name: str(script))
    with pytest.raises(MegammError, match="java: cannot be started"), java.running([], tmp_path):
        pass


def test_captions_of_an_image_are_gathered() -> None:
    rows = [
        {"image_id": 1, "id": 7, "caption": "a"},
        {"image_id": 2, "id": 8, "caption": "b"},
        {"image_id": "1", "id": 9, "caption": "c"},
        {"id": 3, "references": ["d"]},
    ]
    assert list(caption._by_image(rows)) == [
        {"id": 3, "references": ["d"]},
        {"id": "1", "references": ["a", "c"]},
        {"id": "2", "references": ["b"]},
    ]
