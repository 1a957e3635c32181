#!/usr/bin/env python
"""What freezing saves: the time of a step with and without it, on this machine.

    python tools/benchmark/frozen_parts.py [--rounds 9] [--json FILE]

The peer freezes as training scripts commonly do: it computes every gradient and hands the optimizer only
the parameters to be trained. Both sides see the same weights and batches and take turns; the gradients of
the trained parameters must agree.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Result, Table, load, machine, milliseconds, parser_of, timed

from megamm.batch import IGNORE_INDEX, Batch
from megamm.config import Recipe
from megamm.engine import groups
from megamm.engine.optimizer import wrap_data_parallel
from megamm.engine.pipeline import forward_backward
from megamm.engine.weights import initialize
from megamm.layers.decoder import Decoder
from megamm.models.initialization import weight_drawer
from megamm.models.vlm import build_model
from megamm.parity.processes import run_processes
from megamm.recipe import recipe_from_dict

IMAGE_ID = 3
LANGUAGE = {
    "num_layers": 8,
    "hidden_size": 512,
    "num_heads": 8,
    "ffn_hidden_size": 1408,
    "vocab_size": 16000,
    "max_positions": 512,
}
VISION = {
    "image_size": 112,
    "patch_size": 14,
    "width": 256,
    "num_layers": 6,
    "num_heads": 8,
    "mlp_width": 1024,
}
RESAMPLER = {"kind": "resampler", "num_latents": 16, "depth": 2}
MODELS = {
    "merged": {"assembly": "merged", "connector": {"kind": "mlp"}},
    "cross": {"assembly": "cross_attention", "connector": RESAMPLER, "cross_attention": {"every": 4}},
}
# (model, what is frozen, share of the positions that carry loss)
STEPS = {
    "LLaVA stage 1: encoder and decoder frozen": ("merged", "[vision, language]", 0.2),
    "Flamingo: encoder and decoder frozen": ("cross", "[vision, language]", 0.9),
    "LLaVA stage 2: encoder frozen": ("merged", "[vision]", 0.4),
}


def recipe_of(model: str, **overrides: Any) -> Recipe:
    raw = {
        "name": "benchmark",
        "run_dir": "unused",
        "tokenizer": "unused",
        "model": {**MODELS[model], "language": LANGUAGE, "vision": VISION},
        "data": {"sequence_length": 256, "max_images": 1},
        "training": {"global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32"},
    }
    return recipe_from_dict(raw, overrides=[f"{key}={value}" for key, value in overrides.items()])


def batch_of(recipe: Recipe, labelled: float, seed: int) -> Batch:
    """Samples of one image and text, of whose positions the last `labelled` share carries loss."""
    generator = torch.Generator().manual_seed(seed)
    size, length = recipe.training.micro_batch_size, recipe.data.sequence_length
    ids = torch.randint(IMAGE_ID + 1, recipe.model.language.vocab_size, (size, length), generator=generator)
    ids[:, 1 : 1 + recipe.model.tokens_per_image] = IMAGE_ID
    labels = ids.roll(-1, 1)
    labels[:, : round(length * (1 - labelled))] = IGNORE_INDEX
    pixels = recipe.model.vision.image_size
    return Batch(
        input_ids=ids,
        labels=labels,
        position_ids=torch.arange(length).expand(size, -1),
        images=torch.randn(size, 3, pixels, pixels, generator=generator),
        images_per_sample=torch.ones(size, dtype=torch.int64),
        sample_ids=torch.arange(size),
    )


class Side:
    """A model of one side of a comparison, ready for steps."""

    def __init__(self, recipe: Recipe, layout: groups.Groups, labelled: float) -> None:
        self.layout = layout
        models = build_model(recipe, layout, "local", IMAGE_ID)
        draw = weight_drawer(recipe.model, recipe.seed)
        # closed gates would give the media no gradient
        initialize(models, lambda name, shape: draw(name, shape) + (0.5 if name.endswith("_gate") else 0.0))
        self.models = models
        self.wrapped = wrap_data_parallel(models, recipe, layout)
        count = recipe.training.global_batch_size // recipe.training.micro_batch_size
        self.batches = [batch_of(recipe, labelled, seed) for seed in range(count)]

    def step(self) -> float:
        for model in self.wrapped:
            model.zero_grad_buffer()
        return forward_backward(self.wrapped, self.batches, self.layout)

    def gradients(self) -> dict[str, torch.Tensor]:
        return {
            name: p.main_grad.clone()
            for model in self.models
            for name, p in model.named_parameters()
            if p.requires_grad
        }


def seconds(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def compare(ours: Side, peer: Side, rounds: int) -> tuple[float, float]:
    """Median seconds of a step of both, in turns, after their gradients were found equal."""
    losses = ours.step(), peer.step()
    assert abs(losses[0] - losses[1]) <= 1e-6 * abs(losses[1]), losses
    theirs = peer.gradients()
    for name, gradient in ours.gradients().items():
        difference = float((gradient - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1e-12))
        assert difference <= 1e-5, (name, difference)
    found = timed({"ours": ours.step, "peer": peer.step}, rounds, warm_up=0)  # (they have taken a step above)
    return found["ours"], found["peer"]


def every_position(decoder: Decoder) -> None:
    """Let the output layer and the loss see all positions, as megatron-core's GPTModel does."""

    def losses(hidden_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits, _ = decoder.output_layer(hidden_states)
        return decoder.compute_language_model_loss(labels.clamp(min=0), logits)

    decoder._losses = losses  # type: ignore[method-assign]


def one_process(rounds: int) -> list[tuple[str, float, float]]:
    """(step, seconds of ours, of the peer): what is frozen known or not, then the output layer's share
    alone."""
    torch.set_num_threads(2)
    found = []
    for name, (model, frozen, labelled) in STEPS.items():
        recipe = recipe_of(model, **{"training.freeze": frozen})
        layout = groups.initialize(recipe.parallel, torch.device("cpu"), "gloo")
        ours = Side(recipe, layout, labelled)
        peer = Side(recipe_of(model), layout, labelled)
        found.append((name, *compare(ours, peer, rounds)))
        report(*found[-1])
        peer = Side(recipe, layout, labelled)
        every_position(peer.models[0].language)  # type: ignore[arg-type]
        head = f"- of which the output layer at the {labelled:.0%} of positions with loss, alone"
        found.append((head, *compare(ours, peer, rounds)))
        report(*found[-1])
    groups.shutdown()
    return found


def two_stages(rounds: int) -> tuple[float, float]:
    """The upper half of the decoder trained, over two pipeline stages: the lower has no backward pass."""
    torch.set_num_threads(1)
    frozen = {"training.freeze": "[vision, connector, language]", "training.unfreeze.language": 4}
    recipe = recipe_of("merged", **{"parallel.pipeline": 2, **frozen})
    layout = groups.initialize(recipe.parallel, torch.device("cpu"), "gloo")
    ours = Side(recipe, layout, 0.4)
    peer = Side(recipe_of("merged", **{"parallel.pipeline": 2}), layout, 0.4)
    return compare(ours, peer, rounds)


def over_two_stages(rounds: int) -> tuple[str, float, float]:
    """`two_stages` in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        env = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
        files = run_processes(2, "frozen_parts:two_stages", {"rounds": rounds}, Path(folder), 600, env)
        ours, peer = torch.load(files[0], weights_only=True)
    return "Upper half of the decoder trained, two pipeline stages of one core each", ours, peer


def table_of(rows: list[tuple[str, float, float]]) -> Table:
    """The peer computes every gradient, and all positions where the output layer is looked at alone."""
    table = Table("What knowing the frozen parts saves, fp32", ["step", "ours", "peer", "ratio"])
    for name, ours, peer in rows:
        table.add(name, milliseconds(ours), milliseconds(peer), f"{peer / ours:.2f}")
    return table


def report(name: str, ours: float, peer: float) -> None:
    print(f"{name}: {ours * 1e3:.0f} ms, peer {peer * 1e3:.0f} ms, ratio {peer / ours:.2f}", flush=True)


def main() -> None:
    args = parser_of(__doc__, rounds=9).parse_args()
    setting = f"{machine()}; median of {args.rounds} turns; load {load()}"
    rows = one_process(args.rounds)
    rows.append(over_two_stages(args.rounds))
    report(*rows[-1])
    Result(setting, [table_of(rows)]).write(args.json)


if __name__ == "__main__":
    main()
