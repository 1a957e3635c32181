#!/usr/bin/env python
"""Tokens per second with a cache, against transformers' `generate` on the same weights.

    python tools/benchmark/generation.py [--rounds 5] [--prompts 64 256 1024] [--batch 1 8] [--dtype fp32]

A random LLaVA is saved by transformers, imported by megamm, and asked the same prompts on both sides in turn,
one way or the other first; the ids of the greedy answers must be the same in fp32. Time behind the prompt
("prefill", to the first token) and for each further token ("decode") are told apart by answers of one token
and of many.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Aim, Result, Table, load, machine, milliseconds, parser_of, timed

from megamm.convert import import_checkpoint
from megamm.inference import Decoding, Model
from megamm.inference import load as load_model
from megamm.inference.search import Vocabulary

SIZES = {
    "tiny": dict(hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4),
    "100m": dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12),
}
IMAGE, SPAN, VOCAB = 28, 4, 32001
COLUMNS = [
    *("batch", "beams", "prompt", "tokens/s", "transformers", "ratio"),
    *("ms to the first token", "transformers", "ms per further token", "transformers"),
]


def make(size: str, folder: Path, positions: int) -> Path:
    """A random model of transformers, saved."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=positions, **SIZES[size])
    eyes = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=IMAGE,
        patch_size=14,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=text, vision_config=eyes, image_token_index=VOCAB - 1, image_seq_length=SPAN
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # spread out the scores: random models say nearly the same of every token
        model.lm_head.weight.normal_(std=0.5)
    model.save_pretrained(folder / "hf")
    return folder / "hf"


class Sides:
    """The same model twice."""

    def __init__(self, directory: Path, checkpoint: Path, dtype: str) -> None:
        from transformers import LlavaForConditionalGeneration

        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        self.theirs: Any = LlavaForConditionalGeneration.from_pretrained(directory, dtype=kind).eval()
        self.ours: Model = load_model(checkpoint, "cpu", dtype, image_token_id=VOCAB - 1)  # type: ignore[arg-type]
        self.dtype = kind

    def ask(self, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, S] prompts with an image each, and the images."""
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(3, VOCAB - 1, (batch, length), generator=generator)
        ids[:, 1 : 1 + SPAN] = VOCAB - 1
        return ids, torch.randn(batch, 3, IMAGE, IMAGE, generator=generator)

    def megamm(self, ids: torch.Tensor, images: torch.Tensor, tokens: int, beams: int) -> list[list[int]]:
        words = Vocabulary(VOCAB, [], [VOCAB - 1])
        pixels = list(images.unsqueeze(1))
        return self.ours.generate_ids(ids.tolist(), pixels, Decoding(tokens, beams), words)

    def transformers(
        self, ids: torch.Tensor, images: torch.Tensor, tokens: int, beams: int
    ) -> list[list[int]]:
        with torch.no_grad():
            found = self.theirs.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=images.to(self.dtype),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                num_beams=beams,
                do_sample=False,
                suppress_tokens=[VOCAB - 1],
                eos_token_id=None,
                pad_token_id=0,
            )
        answers: list[list[int]] = found[:, ids.shape[1] :].tolist()
        return answers


def compare(sides: Sides, batch: int, length: int, tokens: int, beams: int, rounds: int) -> list[float]:
    """Of megamm and of transformers: tokens/s, seconds to the first token, seconds of a further one."""
    ids, images = sides.ask(batch, length)
    answers: dict[str, list[list[int]]] = {}

    def answer(name: str, count: int) -> Callable[[], None]:
        def run() -> None:
            answers[name] = getattr(sides, name)(ids, images, count, beams)

        return run

    names = ("megamm", "transformers")
    median = timed(
        {f"{name} {count}": answer(name, count) for name in names for count in (1, tokens)}, rounds
    )
    if sides.dtype == torch.float32:
        assert answers["megamm"] == answers["transformers"], "the answers differ"
    found = []
    for name in names:
        first, all_of_them = median[f"{name} 1"], median[f"{name} {tokens}"]
        found += [batch * tokens / all_of_them, first, (all_of_them - first) / (tokens - 1)]
    return found


COLUMNS = ["batch", "beams", "prompt", "tokens/s", "transformers", "ratio"]
COLUMNS += ["to the first token", "transformers", "each further token", "transformers"]


def table_of(sides: Sides, title: str, args: argparse.Namespace) -> tuple[Table, list[float]]:
    """A row for each setting, and the ratios of tokens per second."""
    table, ratios = Table(title, COLUMNS), []
    for batch in args.batch:
        for beams in args.beams if batch == 1 else [1]:
            for length in args.prompts:
                ours, first, further, theirs, their_first, their_further = compare(
                    sides, batch, length, args.tokens, beams, args.rounds
                )
                ratios.append(ours / theirs)
                seconds = (first, their_first, further, their_further)
                cells = [f"{ours:.0f}", f"{theirs:.0f}", f"{ratios[-1]:.2f}", *map(milliseconds, seconds)]
                table.add(batch, beams, length, *cells)
                print("  ".join(table.rows[-1]), flush=True)
    return table, ratios


def main() -> None:
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    args = parser.parse_args()
    torch.set_num_threads(2)
    result, ratios = Result(f"{machine()}; median of {args.rounds} turns; load {load()}"), []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            directory = make(size, Path(folder), max(args.prompts) + args.tokens)
            checkpoint = import_checkpoint([directory], Path(folder) / "checkpoint")
            for dtype in args.dtype:
                title = f"{size}, {dtype}, {args.tokens} new tokens"
                print(title, flush=True)
                table, found = table_of(Sides(directory, checkpoint, dtype), title, args)
                result.tables.append(table)
                ratios += found
    middle, slowest = statistics.median(ratios), min(ratios)
    words = f"{middle:.2f} times (median of {len(ratios)} settings; {slowest:.2f} to {max(ratios):.2f})"
    result.aims.append(
        Aim("generation with a cache", ">= 1 times transformers", words, "generate", middle >= 1)
    )
    result.write(args.json)


if __name__ == "__main__":
    main()
