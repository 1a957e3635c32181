"""A model that answers from what it is shown, and a recipe to evaluate it with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megamm.config import Recipe
from megamm.data.templates import Turn
from megamm.errors import InputError
from megamm.evaluation.scores import Scores
from megamm.evaluation.tasks import Result, TaskSettings
from megamm.evaluation.tasks.run import prepare
from megamm.evaluation.tasks.scoring import Scorer, official
from megamm.inference import Decoding
from megamm.recipe import recipe_from_dict
from tests.evaluation.tasks.layouts import number_of

Answer = Callable[[str, list[int], Decoding], str]


class Killed(BaseException):
    """As a signal: nothing may catch it."""


class StandIn:
    """Answers with a function of prompt, numbers of the pictures, and decoding.

    Attributes:
        asked: prompts, numbers of pictures and decoding of every question, in the order in which they came.
        batches: sizes of the batches.
        kill_after: batches that are answered before it is killed; None: never.
    """

    def __init__(self, answer: Answer, kill_after: int | None = None, longest: int = 10_000) -> None:
        self.num_copies, self.copy, self.is_spokesman = 1, 0, True
        self.asked: list[tuple[str, list[int], Decoding]] = []
        self.batches: list[int] = []
        self._answer, self.kill_after, self._longest = answer, kill_after, longest

    def generate(
        self, conversations: Sequence[Sequence[Turn]], images: Any, *, decoding: Decoding
    ) -> list[str]:
        assert all(turn.role == "user" for turns in conversations for turn in turns)
        return self._answers([turns[0].text for turns in conversations], images, decoding)

    def complete(self, prompts: Sequence[str], images: Any, *, decoding: Decoding) -> list[str]:
        return self._answers(list(prompts), images, decoding)

    def _answers(self, prompts: list[str], images: Any, decoding: Decoding) -> list[str]:
        if any(len(prompt) > self._longest for prompt in prompts):
            raise InputError(f"a prompt of more than {self._longest} positions; shorten the prompt")
        if self.kill_after == len(self.batches):
            raise Killed
        self.batches.append(len(prompts))
        found = []
        for prompt, shown in zip(prompts, images, strict=True):
            numbers = [number_of(data) for data in shown]
            assert prompt.count("<image>") == len(numbers)
            self.asked.append((prompt, numbers, decoding))
            found.append(self._answer(prompt, numbers, decoding))
        return found


def always(text: str) -> StandIn:
    """A model with one answer."""
    return StandIn(lambda prompt, numbers, decoding: text)


def recipe(template: str = "vicuna", assembly: str = "merged") -> Recipe:
    return recipe_from_dict(
        {
            **{"name": "n", "run_dir": "r", "tokenizer": "t", "template": template},
            "model": {
                "language": {"preset": "tiny-llama", "num_layers": 4},
                "vision": {"preset": "tiny-vit"},
                **({} if assembly == "merged" else CROSS_ATTENTION),
            },
            "data": {"sequence_length": 128},
        }
    )


CROSS_ATTENTION: dict[str, Any] = {
    "assembly": "cross_attention",
    "vision": {"preset": "tiny-vit", "feature_layer": -1, "feature_select": "all"},
    "connector": {
        **{"kind": "resampler", "num_latents": 8, "depth": 1, "num_heads": 4, "head_dim": 32},
        "ffn_multiple": 2,
    },
    "cross_attention": {"every": 2, "num_heads": 4, "head_dim": 32, "ffn_multiple": 2},
}


def evaluated(
    model: StandIn,
    task: str,
    data: Path | Sequence[Path],
    out: Path,
    settings: TaskSettings | None = None,
    of: Recipe | None = None,
    scorer: Scorer = official,
) -> Result:
    """What an evaluation of the stand-in finds."""
    files = [data] if isinstance(data, Path) else data
    examination = prepare(of or recipe(), task, files, out, settings or TaskSettings())
    result = examination.take(model, scorer)
    assert result is not None
    return result


def without_java(metric: str, predictions: Any, references: Any, vqa_rule: str) -> Scores:
    """Stands in for the metrics of captions, which run Java: the share of captions that are a reference."""
    known = {row["id"]: row["references"] for row in references}
    flags = [row["prediction"] in known[row["id"]] for row in predictions]
    return Scores(metric, {"cider": 100.0 * sum(flags) / len(known)}, {"n": len(known)})
