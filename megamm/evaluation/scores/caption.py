"""Captions: BLEU-1 to 4, METEOR, ROUGE-L, CIDEr-D and SPICE, by pycocoevalcap, as the COCO server computes
them.

BLEU is that of the corpus, with the references' closest lengths; CIDEr weighs words by how many of these
images' references have them, so it depends on which images are scored (and is 0 for a single one). An image
without a prediction has an empty caption; so has one whose caption is nothing but punctuation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from megamm.evaluation.scores.captions_text import tokenized
from megamm.evaluation.scores.java import java, package_folder
from megamm.evaluation.scores.meteor import meteor
from megamm.evaluation.scores.pairing import Question, paired, placed, row_id
from megamm.evaluation.scores.result import Groups, Numbers, Scores
from megamm.evaluation.scores.spice import spice

_KEYS = ("references", "answers", "captions")


def score_caption(
    predictions: Iterable[Mapping[str, Any]], references: Iterable[Mapping[str, Any]]
) -> Scores:
    """All numbers in percent; CIDEr, whose own scale ends at 10, times 100.

    Args:
        references: {"id", "references": [text, ...]}; or rows of COCO, {"image_id", "caption"}, one for each
            caption.
    Raises:
        InputError: Java or pycocoevalcap is missing; of `paired`; also for a prediction without a reference,
            as COCO's evaluator demands; an image without captions.
        RunError: a Java program failed.
    """
    package_folder(), java()  # before anything is read
    pairs = paired(predictions, _by_image(references), strict=True)
    given = [_captions(question) for question in pairs.questions]
    texts = [question.prediction or "" for question in pairs.questions]
    tokens = tokenized([*texts, *(caption for captions in given for caption in captions)])
    found, rest = tokens[: len(texts)], iter(tokens[len(texts) :])
    wanted = [[next(rest) for _ in captions] for captions in given]
    numbers: Numbers = {
        **_bleu(found, wanted),
        "meteor": 100.0 * meteor(found, wanted)[0],
        "rouge_l": 100.0 * _rouge_l(found, wanted),
        "cider": 100.0 * _cider(found, wanted),
    }
    value, reason = spice(found, wanted)
    numbers["spice"] = None if value is None else 100.0 * value
    counts = {**pairs.counts, "empty": sum(not caption for caption in found)}
    groups: Groups = {}
    return Scores("caption", numbers, counts, groups, (reason,) if reason else ())


def _bleu(found: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for caption, references in zip(found, wanted, strict=True):
        scorer += (caption, list(references))
    values, _ = scorer.compute_score(option="closest")
    return {f"bleu{n}": 100.0 * float(value) for n, value in enumerate(values, start=1)}


def _rouge_l(found: Sequence[str], wanted: Sequence[Sequence[str]]) -> float:
    from pycocoevalcap.rouge.rouge import Rouge

    value, _ = Rouge().compute_score(*_as_dicts(found, wanted))
    return float(value)


def _cider(found: Sequence[str], wanted: Sequence[Sequence[str]]) -> float:
    if not any(any(references) for references in wanted):
        return 0.0  # no words at all, which its code does not expect
    from pycocoevalcap.cider.cider import Cider

    value, _ = Cider().compute_score(*_as_dicts(found, wanted))
    return float(value)


def _as_dicts(
    found: Sequence[str], wanted: Sequence[Sequence[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """References and captions as pycocoevalcap takes them."""
    return {n: list(refs) for n, refs in enumerate(wanted)}, {n: [text] for n, text in enumerate(found)}


def _by_image(references: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """References with all captions of an image in one row. Those that have them stay what they are."""
    images: dict[str, dict[str, Any]] = {}
    for place, row in placed(references, "references"):
        if "caption" not in row or any(key in row for key in _KEYS):
            yield row
        else:
            image = images.setdefault(row_id(row, place), {"id": row_id(row, place), "references": []})
            image["references"].append(row["caption"])
    yield from images.values()


def _captions(question: Question) -> list[str]:
    captions = next((question.row[key] for key in _KEYS if key in question.row), None)
    if not isinstance(captions, list | tuple) or not captions:
        question.fail('has no "references"; give the list of captions that people wrote')
    for caption in captions:
        if not isinstance(caption, str):
            question.fail(f"a caption is {caption!r}; give text")
    return list(captions)
