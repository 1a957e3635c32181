"""Loads the exported model with transformers and asks it what megamm was asked.

    python examples/quickstart/show_transformers.py HF_DIR DATA_DIR PREDICTIONS.jsonl

Fails if it answers one of them (five of each kind) in another way than megamm did.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from show import by_kind, pair_up, words
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.utils import logging

QUESTIONS_PER_KIND = 5


def ask(model: Any, processor: Any, row: dict[str, Any]) -> str:
    """The greedy answer to one question about its pictures."""
    conversation = [{"role": "user", "content": row["question"]}]
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    pictures = [Image.open(path).convert("RGB") for path in row["images"]]
    inputs = processor(images=pictures, text=prompt, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    answer = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(answer).strip()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("predictions", type=Path)
    args = parser.parse_args()
    logging.disable_progress_bar()
    model = LlavaForConditionalGeneration.from_pretrained(args.model).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    columns = by_kind(pair_up(args.data, args.predictions), QUESTIONS_PER_KIND)
    rows = [row for column in columns for row in column]
    answers = [ask(model, processor, row) for row in rows]
    differing = [(r, a) for r, a in zip(rows, answers, strict=True) if r["prediction"] != a]
    print(f"question: {words(rows[0]['question'])}\ntransformers: {answers[0]}")
    print(f"{len(rows) - len(differing)} of {len(rows)} answers are those of megamm")
    for row, answer in differing:
        print(f"{row['id']}: megamm {row['prediction']!r}, transformers {answer!r}", file=sys.stderr)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
