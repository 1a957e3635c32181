"""Few-shot prompts, as exact texts, and which demonstrations they hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megamm.errors import InputError
from megamm.evaluation.tasks import TaskSettings
from megamm.evaluation.tasks.few_shot import POOL, cut_answer, draw_pool
from megamm.evaluation.tasks.item import Item
from megamm.evaluation.tasks.prompts import load_prompts
from megamm.inference import Decoding
from tests.evaluation.tasks import layouts
from tests.evaluation.tasks.stand_in import Killed, StandIn, always, evaluated, recipe, without_java

FLAMINGO = recipe(assembly="cross_attention")


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))


def few_shot(tmp_path: Path, model: StandIn, shots: int | None, seed: int = 0) -> list[dict[str, str]]:
    """The predictions of VQAv2 behind demonstrations of two training questions."""
    data = layouts.vqa(tmp_path / "val")
    training = layouts.vqa(tmp_path / "train", split="train2014", count=2)
    settings = TaskSettings(
        shots=shots, demonstrations=files(training), seed=seed, images=tmp_path, prompts="open_flamingo"
    )
    for name in ("val", "train"):
        for path in (tmp_path / name).glob("*2014"):
            path.rename(tmp_path / path.name)
    out = tmp_path / "out.jsonl"
    evaluated(model, "vqav2", data, out, settings, FLAMINGO)
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_two_shots_of_vqa(tmp_path: Path) -> None:
    model = always(" two, Question: Is it? Short answer: no")
    rows = few_shot(tmp_path, model, 2)
    for prompt, numbers, decoding in model.asked:
        first, second = ("0", "1") if "of 0? Short answer:one" in prompt.splitlines()[0] else ("1", "0")
        asked = numbers[-1]
        assert prompt == (
            f"<image>Question:How many of {first}? Short answer:one<|endofchunk|>\n"
            f"<image>Question:How many of {second}? Short answer:one<|endofchunk|>\n"
            f"<image>Question:How many of {asked}? Short answer:"
        )
        assert numbers == [int(first), int(second), asked]
        assert decoding == Decoding(max_new_tokens=5, beams=3, length_penalty=0.0, stop=("<|endofchunk|>",))
    assert rows[0]["prediction"] == "two" and rows[0]["completion"].endswith("no")


def test_no_shots_are_two_demonstrations_without_pictures(tmp_path: Path) -> None:
    model = always("2")
    few_shot(tmp_path, model, 0)
    for prompt, numbers, _ in model.asked:
        assert len(numbers) == 1
        assert re.fullmatch(
            r"Question:How many of [01]\? Short answer:one<\|endofchunk\|>\n"
            r"Question:How many of [01]\? Short answer:one<\|endofchunk\|>\n"
            rf"<image>Question:How many of {numbers[0]}\? Short answer:",
            prompt,
        )


def test_one_shot_of_a_caption(tmp_path: Path) -> None:
    path = layouts.karpathy(tmp_path, coco=True)
    model = always(' a "big" dog Output: more')
    settings = TaskSettings(shots=1, demonstrations=[path], limit=1)
    evaluated(model, "coco_caption", path, tmp_path / "out.jsonl", settings, FLAMINGO, without_java)
    ((prompt, numbers, decoding),) = model.asked
    demonstrated = numbers[0]
    assert demonstrated in (0, 2, 5) and numbers[1] == 1  # of the training and of the test split
    assert prompt == f"<image>Output:caption {demonstrated} of one.<|endofchunk|>\n<image>Output:"
    assert decoding == Decoding(max_new_tokens=20, beams=3, length_penalty=0.0, stop=("<|endofchunk|>",))
    assert json.loads((tmp_path / "out.jsonl").read_text())["prediction"] == "a big dog"


def test_demonstrations_follow_from_seed_and_question(tmp_path: Path) -> None:
    path = layouts.karpathy(tmp_path, coco=True)

    def prompts(seed: int, batch_size: int) -> dict[int, str]:
        model = always("x")
        settings = TaskSettings(shots=1, demonstrations=[path], seed=seed, batch_size=batch_size)
        evaluated(model, "coco_caption", path, tmp_path / "out.jsonl", settings, FLAMINGO, without_java)
        return {numbers[-1]: prompt for prompt, numbers, _ in model.asked}

    assert prompts(0, 1) == prompts(0, 8)
    assert len({json.dumps(prompts(seed, 8)) for seed in range(8)}) > 1


def test_killed_ones_go_on_with_the_same_demonstrations(tmp_path: Path) -> None:
    path = layouts.karpathy(tmp_path, coco=True)
    settings = TaskSettings(shots=2, demonstrations=[path], batch_size=1)
    found = []
    for name, kill_after in (("whole", None), ("killed", 1), ("killed", None)):
        model = StandIn(lambda prompt, numbers, decoding: f"{numbers}", kill_after)
        out = tmp_path / f"{name}.jsonl"
        try:
            evaluated(model, "coco_caption", path, out, settings, FLAMINGO, without_java)
            found.append(out.read_text())
        except Killed:
            assert not out.exists()
    assert len(model.batches) == 1 and found[0] == found[1]


def test_the_pool_is_a_fair_sample() -> None:
    items = [Item(id=str(n), kind="vqa", answer="a" if n % 2 else "") for n in range(4 * POOL)]
    pool = draw_pool(iter(items), 0, 2, need_images=True)
    assert len({item.id for item in pool}) == POOL and all(item.answer for item in pool)
    late = sum(int(item.id) >= 2 * POOL for item in pool)
    assert 0.45 < late / POOL < 0.55
    assert [item.id for item in pool] == [item.id for item in draw_pool(items, 0, 2, need_images=True)]
    with pytest.raises(InputError, match="--demonstrations: 1 items with an answer, but 2 are needed"):
        draw_pool(items[:2], 0, 2, need_images=False)


@pytest.mark.parametrize(
    ("kind", "text", "answer"),
    [
        ("vqa", "yes Question:is", "yes"),
        ("vqa", "yes Answer:is", "yes"),
        ("vqa", "yes Short answer", "yes"),
        ("vqa", "red, white", "red"),
        ("vqa", "red,white", "red,white"),
        ("vqa", "Answer: red", ""),
        ("vqa", "red<|endofchunk|>\n", "red"),
        ("caption", 'a "dog", here Output:a', "a dog, here"),
        ("caption", "a dog. Question", "a dog. Question"),
    ],
)
def test_answers_end_where_the_next_demonstration_begins(kind: str, text: str, answer: str) -> None:
    assert cut_answer(text, load_prompts()["open_flamingo"].kinds[kind]) == answer


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("vqav2", {"shots": 4}, "--demonstrations: the prompts open_flamingo need the training split"),
        ("vqav2", {"shots": 4, "prompts": "llava"}, "--shots: the prompts llava have no demonstrations"),
        ("pope", {"shots": 0}, "--shots: pope has no training split"),
        ("vqav2", {"demonstrations": [Path("x")], "prompts": "llava"}, "--demonstrations: the prompts llava"),
    ],
)
def test_what_does_not_fit(task: str, settings: dict[str, object], message: str, tmp_path: Path) -> None:
    data = layouts.FOLDERS[task](tmp_path)
    with pytest.raises(InputError, match=message):
        evaluated(always(""), task, data, tmp_path / "o", TaskSettings(**settings), FLAMINGO)  # type: ignore[arg-type]


def test_merged_models_take_no_demonstrations(tmp_path: Path) -> None:
    data = layouts.vqa(tmp_path)
    settings = TaskSettings(shots=1, demonstrations=files(data))
    with pytest.raises(
        InputError, match=r"gated cross-attention, and model\.assembly of the recipe is merged"
    ):
        evaluated(always(""), "vqav2", data, tmp_path / "o", settings)


def test_demonstrations_need_their_pictures_only_when_they_are_shown(tmp_path: Path) -> None:
    data = layouts.vqa(tmp_path / "val")
    training = layouts.vqa(tmp_path / "train", split="train2014")
    for path in (training / "train2014").iterdir():
        path.unlink()
    blind = TaskSettings(shots=0, demonstrations=files(training))
    assert evaluated(always("2"), "vqav2", data, tmp_path / "o.jsonl", blind, FLAMINGO).not_asked == [0]
    seeing = TaskSettings(shots=2, demonstrations=files(training))
    with pytest.raises(InputError, match="0 items with an answer and a picture, but 2 are needed"):
        evaluated(always("2"), "vqav2", data, tmp_path / "p.jsonl", seeing, FLAMINGO)


def test_what_is_asked_is_no_demonstration(tmp_path: Path) -> None:
    data = layouts.vqa(tmp_path)
    settings = TaskSettings(shots=2, demonstrations=files(data), limit=2)
    with pytest.raises(InputError, match="1 items with an answer and a picture, but 2 are needed"):
        evaluated(always("2"), "vqav2", data, tmp_path / "o.jsonl", settings, FLAMINGO)
    folder = TaskSettings(shots=2, demonstrations=[data])
    with pytest.raises(InputError, match=r"is a folder; give the files of the training split"):
        evaluated(always("2"), "vqav2", data, tmp_path / "o.jsonl", folder, FLAMINGO)
