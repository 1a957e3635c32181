"""Shows what the model answered: a panel of pictures as PNG, one of them in the terminal.

python examples/quickstart/show.py DATA_DIR PREDICTIONS.jsonl --out panel.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

ROWS = 3
TILE = 150  # pixels of a picture in the panel
CELL = (2 * TILE + 20, TILE + 64)  # two pictures and two lines of text
SHADES = "@%#*+=-:. "  # dark to light
RIGHT, WRONG = (20, 110, 50), (180, 30, 30)


def pair_up(data: Path, predictions: Path) -> list[dict[str, Any]]:
    """Prediction rows with the paths of their pictures under "images"."""
    entries = json.loads((data / "heldout.json").read_text(encoding="utf-8"))
    names = {e["id"]: e["image"] if isinstance(e["image"], list) else [e["image"]] for e in entries}
    rows = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    return [row | {"images": [data / name for name in names[row["id"]]]} for row in rows]


def by_kind(rows: list[dict[str, Any]], count: int) -> list[list[dict[str, Any]]]:
    """For each kind of question, `count` rows spread evenly over the data set."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    return [of_kind[:: max(1, len(of_kind) // count)][:count] for of_kind in kinds.values()]


def words(question: str) -> str:
    """The question without its image placeholders."""
    return question.replace("<image>", "").strip()


def panel(columns: list[list[dict[str, Any]]]) -> Image.Image:
    """One column for each kind of question; right answers green, wrong ones red with the right one."""
    sheet = Image.new("RGB", (CELL[0] * len(columns), CELL[1] * ROWS), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, column in enumerate(columns):
        for j, row in enumerate(column):
            left, top = i * CELL[0] + 6, j * CELL[1] + 6
            for k, path in enumerate(row["images"]):
                with Image.open(path) as picture:
                    sheet.paste(picture.convert("RGB").resize((TILE, TILE)), (left + k * (TILE + 6), top))
            answer = row["prediction"] if row["correct"] else f"{row['prediction']} (is: {row['answer']})"
            pen.text((left, top + TILE + 6), words(row["question"]), fill="black", font=font)
            pen.text((left, top + TILE + 26), answer, fill=RIGHT if row["correct"] else WRONG, font=font)
    return sheet


def in_letters(path: Path, width: int = 32) -> str:
    """A picture as text; letters are about twice as high as wide."""
    with Image.open(path) as picture:
        small = ImageOps.autocontrast(picture.convert("L").resize((width, width // 2), Image.Resampling.BOX))
    levels = list(small.tobytes())
    letters = [SHADES[level * len(SHADES) // 256] for level in levels]
    return "\n".join("".join(letters[i : i + width]) for i in range(0, len(letters), width))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("predictions", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    columns = by_kind(pair_up(args.data, args.predictions), ROWS)
    panel(columns).save(args.out)
    first = columns[0][0]
    print(in_letters(first["images"][0]))
    print(f"question: {words(first['question'])}\nanswer:   {first['prediction']}")
    print(f"more pictures with questions and answers: {args.out}")


if __name__ == "__main__":
    main()
