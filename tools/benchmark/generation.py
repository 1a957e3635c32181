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
import time
from pathlib import Path
from typing import Any

import common
import torch
from common import Result, Table, add_json, machine

from megamm.convert import import_checkpoint
from megamm.inference import Decoding, Model, load
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
        self.ours: Model = load(checkpoint, "cpu", dtype, image_token_id=VOCAB - 1)  # type: ignore[arg-type]
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


def compare(sides: Sides, batch: int, length: int, tokens: int, beams: int, rounds: int) -> list[str]:
    """A row of the table."""
    ids, images = sides.ask(batch, length)
    names = ("megamm", "transformers")
    seconds: dict[tuple[str, int], list[float]] = {(n, t): [] for n in names for t in (1, tokens)}
    answers = {}
    for turn in range(rounds + 1):  # the first one warms up
        for name in names if turn % 2 else reversed(names):
            for count in (1, tokens):
                started = time.perf_counter()
                answers[name] = getattr(sides, name)(ids, images, count, beams)
                if turn:
                    seconds[name, count].append(time.perf_counter() - started)
    if sides.dtype == torch.float32:
        assert answers["megamm"] == answers["transformers"], "the answers differ"
    median = {key: statistics.median(times) for key, times in seconds.items()}
    prefill = {name: median[name, 1] for name in names}
    decode = {name: (median[name, tokens] - median[name, 1]) / (tokens - 1) for name in names}
    rate = {name: batch * tokens / median[name, tokens] for name in names}
    return [
        *(str(batch), str(beams), str(length), f"{rate['megamm']:.0f}", f"{rate['transformers']:.0f}"),
        f"{rate['megamm'] / rate['transformers']:.2f}",
        *(f"{1e3 * prefill[name]:.0f}" for name in names),
        *(f"{1e3 * decode[name]:.1f}" for name in names),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    add_json(parser)
    args = parser.parse_args()
    torch.set_num_threads(2)
    result = Result(f"{machine()}; median of {args.rounds}; load {common.load()}")
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            directory = make(size, Path(folder), max(args.prompts) + args.tokens)
            checkpoint = import_checkpoint([directory], Path(folder) / "checkpoint")
            for dtype in args.dtype:
                sides = Sides(directory, checkpoint, dtype)
                table = Table(f"{size}, {dtype}, {args.tokens} new tokens, 2 threads", COLUMNS)
                for batch in args.batch:
                    for beams in args.beams if batch == 1 else [1]:
                        for length in args.prompts:
                            table.add(*compare(sides, batch, length, args.tokens, beams, args.rounds))
                print(table.markdown(), flush=True)
                result.tables.append(table)
    result.write(args.json)


if __name__ == "__main__":
    main()
