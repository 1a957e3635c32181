"""Answers of tiny random models, token by token those of transformers' `generate` on the exported model, in
every layout; of models that transformers does not know, those of a computation without a cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megamm.batch import Batch
from megamm.convert import export_checkpoint, import_checkpoint
from tests.convert.families import hf_idefics
from tests.convert.helpers import VOCAB_SIZE, hf_llava, save_hf, train_tiny_tokenizer
from tests.dist.harness import run_distributed
from tests.inference.workers import recompute, save_questions
from tests.parity.families import by_sample

NUM_PROMPTS = 50
LENGTH = 14
LAYOUTS = {"tp1": (1, 1), "tp2": (2, 1), "pp2": (1, 2)}
# as transformers' generate takes them; num_beams is our `beams`
WAYS: list[dict[str, Any]] = [
    {},
    {"num_beams": 5},
    {"num_beams": 3, "length_penalty": 0.0, "repetition_penalty": 1.5},
    {"num_beams": 5, "temperature": 0.2, "length_penalty": 2.0},
    {"repetition_penalty": 1.3},
]


@dataclass
class Case:
    """A model on both sides, and what it is asked.

    Attributes:
        path: our checkpoint.
        exported: the directory that transformers loads.
        questions: file of workers.save_questions.
    """

    path: Path
    exported: Path | None
    prompts: list[list[int]]
    images: list[torch.Tensor]
    questions: str
    image_id: int
    stop: int


def make_case(
    root: Path, path: Path, exported: Path | None, vocab_size: int, image_id: int, span: int, size: int
) -> Case:
    """Prompts of 3 to 30 tokens, with up to two images at any place."""
    generator = torch.Generator().manual_seed(5)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    prompts, images = [], []
    for _ in range(NUM_PROMPTS):
        prompt: list[int] = []
        count = number(0, 2)
        for place in range(count + 1):
            words = torch.randint(3, vocab_size, (number(1, 8),), generator=generator).tolist()
            prompt += [word for word in words if word != image_id] or [4]
            if place < count:
                prompt += [image_id] * span
        prompts.append(prompt)
        images.append(torch.randn(count, 3, size, size, generator=generator))
    stop = 2
    words = {"size": vocab_size, "stops": [stop], "unsaid": [image_id]}
    questions = save_questions(root / "questions.pt", prompts, images, words)
    return Case(path, exported, prompts, images, questions, image_id, stop)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("llava")
    tokenizer = train_tiny_tokenizer(root / "tokenizer")
    checkpoint = import_checkpoint([save_hf(hf_llava(), tokenizer, root / "hf")], root / "checkpoint")
    export_checkpoint(checkpoint, root / "out", "llava")
    return make_case(root, checkpoint, root / "out", VOCAB_SIZE, VOCAB_SIZE - 1, 4, 28)


@pytest.fixture(scope="module")
def idefics(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("idefics")
    hf_idefics(qk_layer_norms=True, alpha_type="vector").save_pretrained(root / "hf")
    checkpoint = import_checkpoint([root / "hf"], root / "checkpoint")
    return make_case(root, checkpoint, root / "hf", 67, 61, 1, 28)


@pytest.fixture(scope="module")
def flamingo(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Case:
    path = checkpoints["cross_attention"]
    from megamm.engine import checkpoint

    recipe = checkpoint.read_recipe(checkpoint.resolve(path))
    image_id = VOCAB_SIZE - 1
    root = tmp_path_factory.mktemp("flamingo")
    return make_case(root, path, None, VOCAB_SIZE, image_id, 1, recipe.model.vision.image_size)


def our_options(ways: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As Decoding calls them."""
    names = {"num_beams": "beams"}
    return [{"max_new_tokens": LENGTH, **{names.get(k, k): v for k, v in way.items()}} for way in ways]


def answers(case: Case, layout: str, ways: list[dict[str, Any]]) -> list[list[list[int]]]:
    """Of every way, by processes that all must say the same."""
    tensor, pipeline = LAYOUTS[layout]
    args = dict(
        path=str(case.path),
        questions=case.questions,
        decodings=our_options(ways),
        image_id=case.image_id,
        tensor=tensor,
        pipeline=pipeline,
    )
    first, *others = run_distributed(tensor * pipeline, "tests.inference.workers:answer", args)
    assert all(other == first for other in others)
    return first


@torch.no_grad()
def theirs(case: Case, model: Any, is_idefics: bool) -> list[list[list[int]]]:
    """transformers' answers to one prompt at a time, without what ends them."""
    found = []
    for way in WAYS:
        options = dict(max_new_tokens=LENGTH, do_sample=False, eos_token_id=case.stop, pad_token_id=0)
        options |= dict(suppress_tokens=[case.image_id], bos_token_id=1, **way)
        of_way = []
        for prompt, pixels in zip(case.prompts, case.images, strict=True):
            ids = torch.tensor([prompt])
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if is_idefics:
                inputs |= idefics_images(case, ids, pixels)
            elif len(pixels):
                inputs["pixel_values"] = pixels
            answer = model.generate(**inputs, **options)[0, len(prompt) :].tolist()
            of_way.append(answer[: answer.index(case.stop)] if case.stop in answer else answer)
        found.append(of_way)
    return found


def idefics_images(case: Case, ids: torch.Tensor, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    if not len(pixels):
        size = pixels.shape[-1]
        shown = torch.zeros(1, 1, 3, size, size)
        return {"pixel_values": shown, "image_attention_mask": torch.zeros(*ids.shape, 1, dtype=torch.bool)}
    counts = torch.tensor([len(pixels)])
    batch = Batch(ids, ids, ids, pixels, counts, counts)
    images, mask = by_sample(batch, case.image_id)
    return {"pixel_values": images, "image_attention_mask": mask}


def assert_same(
    ways: list[dict[str, Any]], found: list[list[list[int]]], wanted: list[list[list[int]]]
) -> None:
    for way, ours, others in zip(ways, found, wanted, strict=True):
        differing = [i for i, pair in enumerate(zip(ours, others, strict=True)) if pair[0] != pair[1]]
        assert not differing, (way, differing, [(ours[i], others[i]) for i in differing[:3]])
    texts = {tuple(answer) for answer in wanted[0]}
    assert len(texts) > NUM_PROMPTS / 2, "the answers hardly depend on the prompts"
    assert any(greedy != beams for greedy, beams in zip(wanted[0], wanted[1], strict=True))


@pytest.fixture(scope="module")
def llava_wanted(llava: Case) -> list[list[list[int]]]:
    from transformers import LlavaForConditionalGeneration

    return theirs(llava, LlavaForConditionalGeneration.from_pretrained(llava.exported).eval(), False)


@pytest.fixture(scope="module")
def idefics_wanted(idefics: Case) -> list[list[list[int]]]:
    from transformers import IdeficsForVisionText2Text

    return theirs(idefics, IdeficsForVisionText2Text.from_pretrained(idefics.exported).eval(), True)


@pytest.fixture(scope="module")
def flamingo_wanted(flamingo: Case) -> list[list[list[int]]]:
    return recompute(str(flamingo.path), flamingo.questions, our_options(WAYS))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llava", "idefics", "flamingo"])
def test_token_by_token(family: str, layout: str, request: pytest.FixtureRequest) -> None:
    case, wanted = request.getfixturevalue(family), request.getfixturevalue(f"{family}_wanted")
    ways = WAYS[: len(wanted)]
    assert_same(ways, answers(case, layout, ways), wanted)
