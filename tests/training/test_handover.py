"""The plan of a hand-over: what is taken, and everything that does not fit in one list."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megamm.config import EMBEDDING, OUTPUT, part_of
from megamm.data.tokenizer import Tokenizer, train_tokenizer
from megamm.engine import handover
from megamm.engine.checkpoint import write_weights
from megamm.engine.groups import Groups
from megamm.engine.handover import Stage
from megamm.errors import InputError
from megamm.training.handover import Plan, plan_handover
from tests.conftest import TEXTS
from tests.dist.tiny import LORA, tiny_recipe
from tests.one_process import build, layout, whole

__all__ = ["layout"]


def planned(
    folder: Path, groups: Groups, there: tuple[str, dict[str, Any]], here: tuple[str, dict[str, Any]]
) -> Plan:
    """The plan from a checkpoint of weights of one recipe to the model of another."""
    old, new = (tiny_recipe(kind, overrides) for kind, overrides in (there, here))
    weights = whole(build(old, groups))
    if not folder.exists():
        write_weights(folder, weights, old, None)
    stage = handover.open_stage(folder)
    return plan_handover(stage, new, handover.wanted_by([build(new, groups)], groups))


@pytest.mark.parametrize(
    "there, here, lines",
    [
        (
            ("qformer", {}),
            ("merged", {}),
            ["model.connector.kind: there qformer, here mlp"],
        ),
        (
            ("cross_attention", {}),
            ("merged", {}),
            [
                "cross_attention: there 22 weights, which would be lost, here no such part",
                "model.connector.kind: there resampler, here mlp",
            ],
        ),
        (
            ("merged", {}),
            (
                "merged",
                {
                    "model.language.norm_eps": 0.001,
                    "model.vision.activation": "gelu",
                    "model.language.vocab_size": 60,
                },
            ),
            [
                "model.vision.activation: there quick_gelu, here gelu",
                "model.language.norm_eps: there 1e-05, here 0.001",
                "model.language.vocab_size: there 67, here 60, so that tokens would be lost",
            ],
        ),
        (
            ("merged", LORA),
            ("merged", {**LORA, "model.lora.rank": 8}),
            ["model.lora.rank: there 4, here 8"],
        ),
    ],
    ids=["connector", "lost", "settings", "adapters"],
)
def test_what_does_not_fit_is_listed(
    there: Any, here: Any, lines: list[str], layout: Groups, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="does not fit this recipe; correct the model section") as refused:
        planned(tmp_path / "there", layout, there, here)
    assert [line.strip() for line in str(refused.value).splitlines()[1:]] == lines


def test_what_fits_is_told(layout: Groups, tmp_path: Path) -> None:
    new = {**LORA, "model.language.max_positions": 128, "model.vision.feature_layer": -1}
    with pytest.raises(InputError, match=r"feature_layer: there -2, here -1$"):
        planned(tmp_path / "there", layout, ("merged", {}), ("merged", new))
    del new["model.vision.feature_layer"]
    plan = planned(tmp_path / "there", layout, ("merged", {}), ("merged", new))
    assert plan.fresh == ["lora"] and not plan.made and OUTPUT in plan.as_they_are
    assert plan.lines == [
        f"weights from {tmp_path / 'there'}; lora start from random weights",
        "model.language.max_positions was 64, is 128",
    ]


def test_a_long_list_is_cut(layout: Groups, tmp_path: Path) -> None:
    recipe = tiny_recipe("merged")
    weights = whole(build(recipe, layout))
    some = {n: w for n, w in weights.items() if "vision.blocks.0" not in n and n != OUTPUT}
    write_weights(tmp_path / "half", {**some, "vision.more": torch.zeros(2)}, recipe, None)
    stage = handover.open_stage(tmp_path / "half")
    wanted = handover.wanted_by([build(recipe, layout)], layout)
    with pytest.raises(InputError) as refused:
        plan_handover(stage, recipe, wanted)
    missing = len(weights) - len(some) + 1
    lines = str(refused.value).splitlines()
    assert lines[1] == "  language.output_layer.weight: there none, here [67, 64]"
    assert len(lines) == 12 and lines[-1] == f"  and {missing - 10} more"


def test_the_optimizer_of_another_stage_is_refused(layout: Groups, tmp_path: Path) -> None:
    """Also where shapes would fit: another precision, rows that were not trained, tensors made anew."""
    then = {"model.language.added_vocab": 2, "training.freeze": "[connector, vision]"}
    keep = {
        **then,
        "training.init_from": "x",
        "training.init_optimizer": "keep",
        "training.freeze": "[language, vision]",
        "training.unfreeze.new_tokens": True,
    }
    old, now = tiny_recipe("merged", then), tiny_recipe("merged", keep)
    model = build(now, layout)
    write_weights(tmp_path / "there", whole(model), old, None)
    stage = handover.open_stage(tmp_path / "there")
    wanted = handover.wanted_by([model], layout)
    assert wanted.by_rows == {EMBEDDING, OUTPUT} < wanted.trained
    has_state = replace(stage.manifest, has_optimizer=True)
    moments = frozenset(name for name in stage.weights if part_of(name) == "language")

    def refused(stage: Stage, **overrides: Any) -> list[str]:
        with pytest.raises(InputError, match="init_optimizer to reset") as error:
            plan_handover(stage, tiny_recipe("merged", {**keep, **overrides}), wanted)
        return [line.strip() for line in str(error.value).splitlines()[1:]]

    assert refused(stage) == ["optimizer state: there none, here kept"]
    stage = replace(stage, manifest=has_state, moments=moments)
    lines = refused(stage, **{"training.precision": "bf16"})
    assert lines[0] == "training.precision: there fp32, here bf16"
    assert "connector.linear_1.weight: there not trained, here trained" in lines
    assert f"{EMBEDDING}: there state of other rows, here only new tokens trained" in lines
    # the output layer was trained whole, along with the last block
    last_block = tiny_recipe("merged", {**keep, "training.unfreeze.language": 3})
    whole_output = replace(stage, recipe=last_block, moments=wanted.trained)
    assert refused(whole_output) == [f"{OUTPUT}: there state of other rows, here only new tokens trained"]
    same_rows = replace(stage, recipe=now, moments=wanted.trained)
    assert len(plan_handover(same_rows, now, wanted).lines) == 3
    grown = refused(same_rows, **{"model.language.vocab_size": 69})
    assert f"{OUTPUT}: there state of another tensor, here trained" in grown and len(grown) == 2


def test_ids_that_mean_another_token_are_listed(layout: Groups, tokenizer: Tokenizer, tmp_path: Path) -> None:
    recipe = tiny_recipe("merged", {"model.language.vocab_size": tokenizer.vocab_size})
    model = build(recipe, layout)
    write_weights(tmp_path / "there", whole(model), recipe, None)
    stage, wanted = handover.open_stage(tmp_path / "there"), handover.wanted_by([model], layout)
    more = Tokenizer.load(_saved(tokenizer, tmp_path / "same"), new_tokens=["<new>"])
    plan_handover(stage, recipe, wanted, tokenizer, more)
    other = train_tokenizer([text[::-1] for text in TEXTS] * 4, tmp_path / "other", 400)
    with pytest.raises(InputError) as refused:
        plan_handover(stage, recipe, wanted, tokenizer, other)
    lines = str(refused.value).splitlines()
    assert lines[1].startswith("  token 259: there ") and len(lines) == 12


def _saved(tokenizer: Tokenizer, directory: Path) -> Path:
    tokenizer.save(directory)
    return directory
