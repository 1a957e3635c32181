"""The comparisons of `step.py`: LLaVA with a frozen language model, LLaVA fine-tuned, a Flamingo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import timed
from plain_flamingo import PlainFlamingo
from sides import DTYPES, RATE, Ours, Peer, Transformers, assert_equal, whole_weights
from step_sizes import (
    IMAGE_ID,
    PAD_ID,
    SIZES,
    Mixture,
    Size,
    alignment_batches,
    batch_of,
    instruction_samples,
    interleaved_samples,
    mixture,
    pixels_of,
    recipe_values,
)

from megamm.batch import Batch
from megamm.config import ParallelConfig, Recipe
from megamm.convert import import_checkpoint
from megamm.engine import checkpoint, groups
from megamm.engine.groups import Groups
from megamm.models.initialization import weight_drawer
from megamm.recipe import recipe_from_dict

OURS = "megamm"
MICRO_BATCHES = 2  # of a step
LATENTS, IMAGES_PER_SAMPLE, EVERY = 16, 4, 2  # of the Flamingo


@dataclass(frozen=True)
class Comparison:
    """What one case found.

    Attributes:
        what: it compares, with its sizes.
        seconds: of a step, ours first.
        positions: of a step that hold a sample.
        departure: of a trained gradient from the peer's, relative.
        parameters: of the whole model.
    """

    what: str
    seconds: dict[str, float]
    positions: int
    departure: float
    parameters: int

    def ratio(self, peer: str) -> float:
        """How many times as fast as the peer."""
        return self.seconds[peer] / self.seconds[OURS]


# --- LLaVA ------------------------------------------------------------------------------------------------


def save_llava(size: Size, packed: bool, folder: Path) -> Path:
    """A random LLaVA of transformers, saved; the folder."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    c, v = size.language, size.vision
    text = LlamaConfig(
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["ffn_hidden_size"],
        num_hidden_layers=c["num_layers"],
        num_attention_heads=c["num_heads"],
        max_position_embeddings=c["max_positions"],
    )
    eyes = CLIPVisionConfig(
        hidden_size=v["width"],
        intermediate_size=v["mlp_width"],
        num_hidden_layers=v["num_layers"],
        num_attention_heads=v["num_heads"],
        **size.image(packed),
    )
    span = size.positions(packed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=eyes, image_token_index=IMAGE_ID, image_seq_length=span)
    )
    model.save_pretrained(folder / "hf")
    return folder / "hf"


def llava_recipe(size: Size, imported: Path, precision: str, frozen: list[str], pack: bool) -> Recipe:
    """A stage of the imported model."""
    model = asdict(checkpoint.read_recipe(imported).model)
    rows = MICRO_BATCHES if pack else MICRO_BATCHES * size.rows
    return _recipe(
        model, precision, frozen, size.capacity if pack else size.length, rows, 1 if pack else size.rows, pack
    )


def _recipe(
    model: dict[str, Any],
    precision: str,
    frozen: list[str],
    length: int,
    global_batch: int,
    micro_batch: int,
    pack: bool,
) -> Recipe:
    return recipe_from_dict(
        {
            "name": "benchmark",
            "run_dir": "unused",
            "tokenizer": "unused",
            "model": model,
            "data": {"sequence_length": length, "max_images": 64, "pack": pack},
            "training": {
                "global_batch_size": global_batch,
                "micro_batch_size": micro_batch,
                "precision": precision,
                "freeze": frozen,
            },
            "optimizer": {"lr": RATE, "schedule": "constant", "weight_decay": 0.01, "beta2": 0.999},
            "parallel": {"backend": "local"},
        }
    )


def llava_sides(
    size: Size, precision: str, frozen: list[str], pack: bool, folder: Path
) -> tuple[Ours, Callable[..., Transformers]]:
    """Both sides from the same files; peers are made when they are called for."""
    source = save_llava(size, pack, folder)
    imported = import_checkpoint([source], folder / "checkpoint")
    recipe = llava_recipe(size, imported, precision, frozen, pack)
    ours = Ours(recipe, one_process(), whole_weights(checkpoint.read_weights(imported)), IMAGE_ID)
    theirs = {"vision": ["vision_tower"], "language": ["language_model", "lm_head"]}
    names = [name for part in frozen for name in theirs[part]]
    return ours, partial(Transformers, source, DTYPES[precision], names)


PROJECTOR = "connector.linear_2.weight", "model.multi_modal_projector.linear_2.weight"


def llava_alignment(name: str, precision: str, rounds: int, folder: Path) -> Comparison:
    """Encoder and language model frozen, the projector trained: LLaVA's first stage."""
    size = SIZES[name]
    ours, peer = llava_sides(size, precision, ["vision", "language"], False, folder)
    batches = alignment_batches(size, MICRO_BATCHES)
    peers: dict[str, Peer] = {
        "transformers": peer(),
        "transformers, head at labels": peer(head_at_labels=True),
    }
    departure = compare_sides(ours, batches, peers, batches, PROJECTOR, precision)
    steps: dict[str, Callable[[], object]] = {OURS: lambda: ours.step(batches)}
    steps |= {name: partial(side.step, batches) for name, side in peers.items()}
    shape = f"{MICRO_BATCHES} micro-batches of {size.rows} x {size.length} positions"
    return Comparison(
        f"LLaVA {name}, language model frozen, {precision}: {shape}, {size.positions(False)} of each row an "
        f"image, {ours_labels(batches):.0%} with loss",
        timed(steps, rounds),
        sum(batch.input_ids.numel() for batch in batches),
        departure,
        ours.num_parameters,
    )


def ours_labels(batches: list[Batch]) -> float:
    """Share of the positions that carry loss."""
    return sum(batch.num_labels for batch in batches) / sum(batch.input_ids.numel() for batch in batches)


def llava_finetuning(name: str, precision: str, rounds: int, folder: Path) -> Comparison:
    """Projector and language model trained on samples of different lengths, packed against padded."""
    size = SIZES[name]
    ours, peer = llava_sides(size, precision, ["vision"], True, folder)
    pixels, span = size.image(True)["image_size"], size.positions(True)
    mixed = mixture(
        instruction_samples(size, 4 * MICRO_BATCHES * 64 // size.scale + 64),
        *(span, pixels, MICRO_BATCHES, size.capacity, 64),
    )
    sides: dict[str, Peer] = {"transformers, padded to the longest": peer(pad_id=PAD_ID)}
    return packed_against_padded(f"LLaVA {name}", ours, sides, mixed, PROJECTOR, precision, rounds)


def packed_against_padded(
    what: str,
    ours: Ours,
    peers: dict[str, Peer],
    mixed: Mixture,
    names: tuple[str, str],
    precision: str,
    rounds: int,
) -> Comparison:
    """The same samples on both sides."""
    departure = compare_sides(ours, mixed.packed, peers, mixed.padded, names, precision)
    steps: dict[str, Callable[[], object]] = {OURS: lambda: ours.step(mixed.packed)}
    steps |= {name: partial(side.step, mixed.padded) for name, side in peers.items()}
    used = [
        mixed.positions / sum(batch.input_ids.numel() for batch in batches)
        for batches in (mixed.packed, mixed.padded)
    ]
    rows = sum(len(batch.input_ids) for batch in mixed.padded)
    return Comparison(
        f"{what}, {precision}: {rows} samples, {mixed.positions} positions; packed rows are {used[0]:.0%} "
        f"full, padded ones {used[1]:.0%}",
        timed(steps, rounds),
        mixed.positions,
        departure,
        ours.num_parameters,
    )


# --- Flamingo ---------------------------------------------------------------------------------------------


class Plain(Peer):
    """`PlainFlamingo` with the weights of ours."""

    def __init__(self, recipe: Recipe, ours: Ours, dtype: torch.dtype) -> None:
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # nothing is ever there in fp32, for which there may be no room
        with torch.device(ours.layout.device):
            model = PlainFlamingo(recipe.model, IMAGE_ID)
        torch.set_default_dtype(default)
        own = dict(ours.models[0].named_parameters())
        model.load_state_dict({name: own[name].detach() for name in model.state_dict()})
        assert len(own) == len(dict(model.named_parameters())), "a weight of ours has no place there"
        super().__init__(model, FROZEN_NAMES)

    def loss(self, batch: Batch, num_labels: int) -> torch.Tensor:
        model: Any = self.model
        found: torch.Tensor = model.loss(batch, num_labels)
        return found


# of the decoder; its gated blocks are trained
FROZEN_NAMES = (
    "vision.", "embedding.", "self_attention.", "mlp.", "input_layernorm", "pre_mlp_layernorm",
    "final_layernorm", "output_layer",
)  # fmt: skip


def flamingo_model(size: Size) -> dict[str, Any]:
    """The model section: gated blocks before every second layer, a resampler of two layers."""
    return recipe_values(
        size,
        True,
        assembly="cross_attention",
        connector={"kind": "resampler", "num_latents": LATENTS, "depth": 2},
        cross_attention={"every": EVERY, "gate_init": 0.5},  # closed gates give the media no gradient
    )


def flamingo(name: str, precision: str, rounds: int, packed: bool) -> Comparison:
    """Resampler and gated blocks trained, against a dense mask over all media."""
    size = SIZES[name]
    length = size.capacity if packed else size.capacity // 2
    rows, micro = MICRO_BATCHES, 1 if packed else size.rows
    recipe = _recipe(
        flamingo_model(size), precision, ["vision", "language"], length, rows * micro, micro, packed
    )
    ours = Ours(recipe, one_process(), weight_drawer(recipe.model, recipe.seed), IMAGE_ID)
    peers: dict[str, Peer] = {"plain torch, dense mask": Plain(recipe, ours, DTYPES[precision])}
    mixed = flamingo_batches(size, recipe, packed)
    gate = "language.decoder.layers.1.gated_cross_attention.attention.to_kv.weight"
    what = f"Flamingo {name}, {'packed' if packed else 'equal rows'}"
    return packed_against_padded(what, ours, peers, mixed, (gate, gate), precision, rounds)


def flamingo_batches(size: Size, recipe: Recipe, packed: bool) -> Mixture:
    """Documents with images, of different lengths, or all as long as a row."""
    vocab, length = size.language["vocab_size"], recipe.data.sequence_length
    pixels, micro = recipe.model.vision.image_size, recipe.training.micro_batch_size
    if packed:
        samples = interleaved_samples(vocab, length // 2, IMAGES_PER_SAMPLE, 16 * MICRO_BATCHES, False)
        return mixture(samples, 1, pixels, MICRO_BATCHES, length, 64)
    batches = []
    for number in range(MICRO_BATCHES):
        own = interleaved_samples(vocab, length, IMAGES_PER_SAMPLE, (number + 1) * micro, True)[-micro:]
        batches.append(batch_of(own, 1, pixels_of(own, pixels), pixels, None))
    return Mixture(batches, batches, sum(batch.input_ids.numel() for batch in batches))


# --- both -------------------------------------------------------------------------------------------------


def one_process() -> Groups:
    """Groups of one; made behind imports, which make and leave their own."""
    return groups.initialize(ParallelConfig(), torch.device("cpu"), "gloo")


def compare_sides(
    ours: Ours,
    batches: list[Batch],
    peers: dict[str, Peer],
    theirs: list[Batch],
    names: tuple[str, str],
    precision: str,
) -> float:
    """Largest departure of one trained gradient, after losses and that gradient were found equal."""
    loss = ours.backward(batches)
    gradient = ours.gradients()[names[0]]
    return max(
        assert_equal((loss, gradient), (side.backward(theirs), side.gradients()[names[1]]), precision, name)
        for name, side in peers.items()
    )
