"""The requests of lmms-eval, against the model itself. Runs with lmms-eval where that is installed."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from megamm.convert import export_checkpoint
from megamm.data.templates import Turn
from megamm.engine import groups
from megamm.errors import InputError
from megamm.inference import Decoding
from megamm.integrations import lmms_eval as plugin
from tests.inference.conftest import ASSEMBLIES

TASK, SPLIT = "colours", "test"
TEXTS = ("what is shown?", "describe a red circle", "is <image> like <image>?", "a dog")
GREEDY = {"max_new_tokens": 6, "temperature": 0, "top_p": None, "num_beams": 1, "do_sample": False}


def opened(checkpoint: Path, options: str = "batch_size=2", **more: Any) -> Any:
    """The model as `lmms_eval --model_args` opens it, with documents to ask about."""
    from megamm.integrations.lmms_eval.model import Megamm

    given = {"batch_size": "1", "max_batch_size": None, "device": "cpu", **more}  # as the evaluator passes
    return Megamm.create_from_arg_string(f"checkpoint={checkpoint},{options}", given)


@pytest.fixture(scope="module", params=ASSEMBLIES)
def model(checkpoints: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Any]:
    yield opened(checkpoints[request.param])
    groups.shutdown()


@pytest.fixture
def documents(model: Any, pictures: list[Path]) -> list[list[Image.Image] | None]:
    """The pictures of each document, as data sets hold them."""
    first, second = (Image.open(path) for path in pictures)
    shown = [[first], None, [first, second], [second.convert("CMYK")]]
    model.task_dict[TASK] = {SPLIT: shown}
    return shown


def requested(*middle: Any, context: str, document: int) -> SimpleNamespace:
    """A request as `Task.construct_requests` makes one."""
    show = lambda shown: shown  # noqa: E731
    if len(middle) == 1:
        return SimpleNamespace(args=(context, middle[0], show, document, TASK, SPLIT))
    return SimpleNamespace(args=(context, middle[0], show, middle[1], document, TASK, SPLIT))


def scored(model: Any, requests: list[Any]) -> list[tuple[float, bool]]:
    """What the evaluation sees of the answers."""
    from lmms_eval.api.instance import GenerationResult

    found = model.loglikelihood(requests)
    assert all(isinstance(one, GenerationResult) for one in found)
    return [one.text for one in found]


def itself(model: Any, texts: Sequence[str], pictures: Sequence[Sequence[Path]], **options: Any) -> list[str]:
    """What the model says without lmms-eval, one question at a time."""
    return [
        model._model.generate([[Turn("user", text)]], [files], decoding=Decoding(6, **options))[0]
        for text, files in zip(texts, pictures, strict=True)
    ]


def test_lmms_eval_finds_the_model() -> None:
    section = '[project.entry-points."lmms_eval.models"]\nmegamm = "'
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    module, _, name = text[text.index(section) + len(section) :].partition('"')[0].partition(":")
    manifest = getattr(importlib.import_module(module), name)()
    assert manifest.model_id == "megamm" and manifest.chat_class_path is None
    module, _, name = manifest.simple_class_path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    from lmms_eval.api.model import lmms

    assert issubclass(found, lmms) and found.is_simple and plugin.manifest is not None


def test_answers_are_those_of_the_model(
    model: Any, documents: list[Any], pictures: list[Path], tmp_path: Path
) -> None:
    asked = [requested(dict(GREEDY), context=text, document=row) for row, text in enumerate(TEXTS)]
    asked[3].args[1]["max_new_tokens"] = 3
    converted = tmp_path / "converted.png"
    documents[3][0].convert("RGB").save(converted)
    texts = ["<image>\nwhat is shown?", TEXTS[1], TEXTS[2], "<image>\na dog"]
    files = [pictures[:1], [], pictures, [converted]]
    wanted = itself(model, texts[:3], files[:3])
    wanted += model._model.generate([[Turn("user", texts[3])]], [files[3]], 3)
    assert model.generate_until(asked) == wanted and len(set(wanted)) == 4 and all(wanted)
    assert model.generate_until([asked[2], asked[0]]) == [wanted[2], wanted[0]]


def test_settings_of_a_task(model: Any, documents: list[Any], pictures: list[Path]) -> None:
    def answer(**settings: Any) -> str:
        return model.generate_until([requested(GREEDY | settings, context=TEXTS[0], document=0)])[0]

    text, files = ["<image>\nwhat is shown?"], [pictures[:1]]
    (greedy,) = itself(model, text, files)
    assert answer(temperature=0.7) == answer(do_sample=True) == answer(image_aspect_ratio="pad") == greedy
    assert [answer(num_beams=3)] == itself(model, text, files, beams=3)
    drawn = answer(do_sample=True, temperature=5.0, top_p=0.9)
    assert [drawn] == itself(model, text, files, sample=True, temperature=5.0, top_p=0.9)
    stop = greedy[2:4]
    assert answer(until=[stop, ""]) == greedy[: greedy.index(stop)].strip() == answer(until=stop)


def test_repeated_requests_are_drawn_anew(model: Any, documents: list[Any]) -> None:
    settings = {"max_new_tokens": 6, "temperature": 5.0}
    one = requested(settings, context=TEXTS[0], document=0)
    answers = model.generate_until([one] * 4)
    assert len(set(answers)) > 1
    assert model.generate_until([one] * 4) == answers


def by_steps(model: Any, turns: list[Turn], files: list[Path], answer: str) -> tuple[float, bool]:
    """Log-probability of an answer and whether it is greedy, one position after another."""
    from megamm.inference.asking import evaluation_loader, load_pictures

    inner, asking = model._model, model._asking
    pixels = load_pictures(files, evaluation_loader(inner.recipe))
    ids, total, greedy = asking.prompt(turns), 0.0, True
    for token in model._model.tokenizer.encode(f" {answer}", prefix=False):
        logits = inner.logits(torch.tensor([ids]), pixels)[0, -1]
        total += float(logits.log_softmax(-1)[token])
        greedy &= int(asking.words.silence(logits[None].clone()).argmax()) == token
        ids.append(token)
    return total, greedy


def likeliest_word(model: Any, files: list[Path]) -> tuple[str, str]:
    """A question, and the word that the model begins its answer with: one token, which is how text is cut
    too."""
    from megamm.inference.asking import evaluation_loader, load_pictures

    tokenizer = model._model.tokenizer
    pixels = load_pictures(files, evaluation_loader(model._model.recipe))
    for first in ("red", "cat", "dog", "circle", "what", "picture", "blue", "square", "describe", "image"):
        for second in ("is", "of", "on", "with", "shown", "this"):
            question = f"{first} {second}"
            ids = model._asking.prompt([Turn("user", f"<image>\n{question}")])
            scores = model._asking.words.silence(model._model.logits(torch.tensor([ids]), pixels)[0, -1:])
            token = int(scores.argmax())
            word = tokenizer.decode([token]).strip()
            if tokenizer.encode(f" {word}", prefix=False) == [token]:
                return question, word
    raise AssertionError("the random model says nothing that its tokenizer would cut so")


def test_log_likelihoods(model: Any, documents: list[Any], pictures: list[Path]) -> None:
    question, word = likeliest_word(model, pictures[:1])
    turns = [Turn("user", f"<image>\n{question}")]
    choices = ["a red circle", word, "cat"]
    asked = [requested(f" {choice}", context=question, document=0) for choice in choices]
    found = scored(model, asked)
    wanted = [by_steps(model, turns, pictures[:1], choice) for choice in choices]
    assert [number for number, _ in found] == pytest.approx([-number for number, _ in wanted], rel=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert found[1][1] and not found[0][1]
    # of the choices lmms-eval takes the one with the lowest number
    likely = max(range(3), key=lambda row: wanted[row][0])
    assert min(range(3), key=lambda row: found[row][0]) == likely


def test_choices_are_words(model: Any, documents: list[Any]) -> None:
    asked = [requested(text, context="a dog", document=0) for text in ("<image> 0</s>", "< image> 0</s>")]
    # each alone: rows of a batch may be added up in another order
    one, other = (scored(model, [each])[0][0] for each in asked)
    assert one == other < float("inf")


def test_a_task_that_wants_perplexity_gets_the_log_probability(model: Any, documents: list[Any]) -> None:
    choice = requested("a cat", context=TEXTS[1], document=1)
    target = requested(lambda document: "a cat", context=TEXTS[1], document=1)
    assert scored(model, [target])[0][0] == pytest.approx(-scored(model, [choice])[0][0])
    assert scored(model, [target])[0][0] < 0
    alone = SimpleNamespace(args=("", "a cat"))  # without context, pictures or document
    assert scored(model, [alone])[0][0] > 0


def test_what_is_too_long_costs_its_own_answer_only(
    model: Any, documents: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    short = requested(dict(GREEDY), context="a dog", document=1)
    long = requested(dict(GREEDY), context="red " * 300, document=1)
    with caplog.at_level(logging.WARNING):
        first, second = model.generate_until([long, short])
    assert first == "" and second == model.generate_until([short])[0] != ""
    assert "colours, test, document 1" in caplog.text and "not answered" in caplog.text
    caplog.clear()
    choices = [requested(text, context="a dog", document=1) for text in ("red " * 300, "cat")]
    impossible, possible = scored(model, choices)
    assert impossible == (float("inf"), False) and possible == scored(model, choices[1:])[0]
    assert "taken as impossible" in caplog.text


def test_answers_have_the_room_that_is_left(model: Any, documents: list[Any]) -> None:
    """A task may ask for more new tokens than the model has positions."""
    settings = GREEDY | {"max_new_tokens": 1024}
    one, two = (requested(dict(settings), context=text, document=1) for text in ("red", "a dog " * 20))
    answers = model.generate_until([one, two])
    assert answers == [model.generate_until([each])[0] for each in (one, two)] and len(answers[0]) > 50


def test_rounds(model: Any, documents: list[Any], pictures: list[Path]) -> None:
    seen = []

    def following(document: Any, previous_output: list[str], round_idx: int, previous_round_info: Any) -> Any:
        seen.append((round_idx, list(previous_output), previous_round_info))
        return [document[0]], "a dog", round_idx == 2, previous_output, {"round": round_idx}

    (answers,) = model.generate_until_multi_round(
        [requested(dict(GREEDY), following, context=TEXTS[0], document=0)]
    )
    wanted = itself(model, ["<image>\nwhat is shown?", "<image>\na dog"], [pictures[:1]] * 2)
    assert answers == wanted and isinstance(answers, list)
    assert seen == [(1, wanted[:1], None), (2, wanted, {"round": 1})]


def test_videos_are_refused_by_name(model: Any, documents: list[Any]) -> None:
    documents[0] = ["video.mp4"]
    with pytest.raises(InputError, match="colours, test, document 0: shows a str"):
        model.generate_until([requested(dict(GREEDY), context="what?", document=0)])


def test_an_exported_directory(checkpoints: dict[str, Path], pictures: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    export_checkpoint(checkpoints["merged"], tmp_path / "hf", "llava")
    turns = [[Turn("user", "<image>\nwhat is shown?")]]
    answers = [
        opened(path)._model.generate(turns, [pictures[:1]], 6)
        for path in (checkpoints["merged"], tmp_path / "hf")
    ]
    groups.shutdown()
    assert answers[0] == answers[1] != [""]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("batch_size=none", "batch_size: 'none'; use a whole number above 0"),
        ("precision=fp7", "precision: 'fp7' is unknown"),
        ("template=none", "template: there is no 'none'"),
        ("pretrained=x", "--model_args: .*'pretrained'.*it takes checkpoint"),
    ],
)
def test_wrong_arguments(options: str, sentence: str, checkpoints: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=sentence):
        opened(checkpoints["merged"], options)


def test_a_batch_size_among_the_arguments_counts(checkpoints: dict[str, Path]) -> None:
    assert opened(checkpoints["merged"], "batch_size=3").batch_size == 3
    assert opened(checkpoints["merged"], "precision=fp32", batch_size="5").batch_size == 5
    groups.shutdown()
