"""The words in which questions are asked, as exact texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamm.cli import evaluate as command
from megamm.config.stage import TemplateName
from megamm.errors import InputError
from megamm.evaluation.tasks import TASKS, read_items
from megamm.evaluation.tasks.prompts import choose_prompts, load_prompts, question_text
from tests.evaluation.tasks import layouts

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def asked(task: str, root: Path, name: str, number: int = 0) -> str:
    """The prompt of one question of a tiny benchmark."""
    item = read_items(TASKS[task], [layouts.FOLDERS[task](root)], None, None)[number]
    return question_text(load_prompts()[name].of(item.kind, task), item)


def test_command_line_knows_the_names() -> None:
    assert tuple(TASKS) == command.TASKS
    assert tuple(load_prompts()) == command.PROMPTS


def test_each_template_has_a_set_of_its_own_but_one() -> None:
    known = [template for prompts in load_prompts().values() for template in prompts.templates]
    assert len(known) == len(set(known))
    assert set(TemplateName.__args__) - set(known) == {"text"}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("task", "name", "text"),
    [
        ("coco_caption", "llava", "<image>\nProvide a one-sentence caption for the provided image."),
        ("coco_caption", "infimm", "<image>\nPlease describe the image."),
        ("coco_caption", "caption_only", "<image>"),
        ("vqav2", "llava", f"<image>\nHow many of 0?{SHORT}"),
        ("okvqa", "infimm", f"<image>\nHow many of 0?{SHORT}"),
        ("gqa", "xcomposer", f"<image>\nIs it overcast?{SHORT}"),
        ("textvqa", "llava", f"<image>\nwhat is the brand?\nReference OCR token: nous, les, gosses{SHORT}"),
        ("textvqa", "infimm", f"<image>\nwhat is the brand?{SHORT}"),
        (
            *("vizwiz", "llava"),
            "<image>\nWhat is this?\nWhen the provided information is insufficient, respond with "
            f"'Unanswerable'.{SHORT}",
        ),
        (
            *("vizwiz", "infimm"),
            "<image>\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
            f"What is this?{SHORT}",
        ),
        ("pope", "llava", f"<image>\nIs there a bear?{SHORT}"),
        ("mme", "llava", f"<image>\nIs this an artwork?{SHORT}"),
        ("mme", "infimm", f"<image>\nIs this an artwork? Please answer yes or no.{SHORT}"),
        ("mmbench", "llava", f'<image>\nHe sings.\nWho is "he"?\nA. Ann\nB. Bob{LETTER}'),
        ("scienceqa_img", "llava", f"<image>\nWhich burns?\nA. stone\nB. wood{LETTER}"),
        (
            *("mmmu", "llava"),
            f"Compare <image> with <image>.\n(A) like <image>\n(B) it's new\n{LETTER}",
        ),
    ],
)
def test_prompts(task: str, name: str, text: str, tmp_path: Path) -> None:
    assert asked(task, tmp_path, name) == text


def test_context_of_scienceqa_and_open_questions_of_mmmu(tmp_path: Path) -> None:
    assert asked("scienceqa_img", tmp_path / "a", "llava", 1) == (
        f"<image>\nContext: A pond.\nWhich floats?\nA. stone\nB. wood{LETTER}"
    )
    assert asked("mmmu", tmp_path / "b", "infimm", 2) == f"How long is <image>?{SHORT}"


def test_words_of_a_question_are_not_filled_in_again(tmp_path: Path) -> None:
    root = layouts.vizwiz(tmp_path)
    entry = {"image": "VizWiz_val_00000000.jpg", "question": "{choices} <image>{ocr}?"}
    path = layouts.put(root / "odd.json", [entry])
    (item,) = read_items(TASKS["vizwiz"], [path], root / "val", None)
    assert question_text(load_prompts()["llava"].of("vqa", "vizwiz"), item) == (
        f"<image>\n{{choices}} {{ocr}}?{SHORT}"
    )


def test_defaults_follow_the_template() -> None:
    assert choose_prompts(None, "vicuna", False).name == "llava"
    assert choose_prompts(None, "infimm", False).name == "infimm"
    assert choose_prompts(None, "xcomposer", False).name == "xcomposer"
    assert choose_prompts(None, "vicuna", True).name == "open_flamingo"
    assert choose_prompts("infimm", "vicuna", False).name == "infimm"
    with pytest.raises(InputError, match="--prompts: there is no 'x'"):
        choose_prompts("x", "vicuna", False)
    with pytest.raises(InputError, match="--prompts: none go with the recipe's template text"):
        choose_prompts(None, "text", False)


def test_a_set_without_words_for_a_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="caption_only has no words for --task pope; use one of llava"):
        asked("pope", tmp_path, "caption_only")
