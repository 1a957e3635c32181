"""What the recipes of a system read with `--preset tiny`: a tokenizer, prepared data sets and questions.

    python examples/tiny/make.py SYSTEM

reads every recipe of examples/SYSTEM with the preset and makes what stands there below runs/tiny, with the
commands that real data are prepared with, from pictures of digits in the layouts of the real data sets.
What is there already stays. To start anew: rm -r runs/tiny.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pictures as digits
from layouts import LAYOUTS
from make_data import Picture, write_json

from megamm.cli.entry import main as megamm
from megamm.config import Recipe
from megamm.data.templates import Template
from megamm.recipe import load_recipe
from megamm.recipe_presets import tiny
from megamm.recipe_presets.tiny import ROOT

EXAMPLES = Path(__file__).parents[1]
# Format of a data set by its name, the first that fits; others are taken for what their stage is about.
FORMATS = (
    ("obelics|interleaved", "obelics"),
    ("mmc4", "mmc4"),
    ("textcaps", "textcaps"),
    ("aokvqa|a-okvqa", "aokvqa"),
    ("ok-?vqa", "okvqa"),
    ("text-?vqa", "textvqa"),
    ("ocr-?vqa", "ocrvqa"),
    ("st-?vqa", "stvqa"),
    ("doc-?vqa", "docvqa"),
    ("gqa", "gqa"),
    ("vizwiz(?!.*cap)", "vizwiz"),
    ("vqa", "vqav2"),
    ("llava|instruct|sharegpt|conversation|dialogue", "llava"),
    ("multitask", "vqav2"),
    ("pair|laion|coyo|cc3m|cc12m|webli|sbu|pmd", "webdataset"),
    ("coco|cap", "coco"),
)
DOCUMENTS = ("obelics", "mmc4")
NO_TASK = (*DOCUMENTS, "llava")  # there are no words to be put around these


@dataclass(frozen=True)
class DataSet:
    """One that a recipe names: its directory, its format, and what its samples are rendered with."""

    path: Path
    format: str
    template: str
    tokenizer: Path


def data_sets(recipe: Recipe) -> Iterator[DataSet]:
    """What a recipe trains on and looks at."""
    paths = [source.path for source in recipe.data.sources()]
    for path in [*paths, recipe.validation.data]:
        if path is not None:
            format = _format(recipe, Path(path).name.lower())
            yield DataSet(Path(path), format, _template(recipe, format), Path(recipe.tokenizer))


def _format(recipe: Recipe, name: str) -> str:
    default = "webdataset" if recipe.stage == "pretrain" else "llava"
    return next((format for pattern, format in FORMATS if re.search(pattern, name)), default)


def _template(recipe: Recipe, format: str) -> str:
    """That of the recipe's questions, if samples of this format can have it."""
    takes = Template.by_name(recipe.template).takes
    if format in DOCUMENTS:
        return "interleaved"
    if takes == "document" or (takes == "pair" and format not in ("webdataset", "coco", "textcaps")):
        return "pair" if format == "webdataset" else "infimm"
    return recipe.template


def fingerprint(files: list[Path]) -> str:
    """Of the recipes, of the preset and of these scripts."""
    digest = hashlib.sha256()
    for path in [*files, *sorted(Path(__file__).parent.glob("*.py")), Path(tiny.__file__)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def make_tokenizer(
    recipe: Recipe, templates: list[str], chat: str, work: Path, training: list[Picture]
) -> Path:
    """Train the tokenizer of a system, of as many tokens as its model has embeddings; returns its path."""
    out = Path(recipe.tokenizer)
    if out.exists():
        return out
    folder = out.parent if out.suffix else out
    texts, trained = _texts(work, training), work / "trained"
    tokens = list(dict.fromkeys(t for name in templates for t in Template.by_name(name).tokens))
    size = recipe.model.language.vocab_size - len(tokens)
    shutil.rmtree(trained, ignore_errors=True)
    run("prepare", "tokenizer", texts, "--format", "llava", "--vocab-size", size, "--template", chat,
        "--out", trained)  # fmt: skip
    added = [part for token in tokens for part in ("--add-token", token)]
    run("prepare", "tokenizer", "--from", trained / "tokenizer.model", *added, "--out", folder)
    return out


def _texts(work: Path, training: list[Picture]) -> Path:
    """Conversations with everything that is said of the pictures."""
    rng = np.random.default_rng(digits.SEED)
    entries = digits.conversations(training, rng)
    for picture in training:
        for answer in (digits.caption(picture, rng), *digits.document([picture], rng)):
            turns = [
                {"from": "human", "value": "Please describe the image."},
                {"from": "gpt", "value": answer},
            ]
            entries.append({"id": f"text-{len(entries)}", "conversations": turns})
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / "texts.json", entries)
    return work / "texts.json"


def make_data_set(data_set: DataSet, system: str, work: Path, shown: list[Picture]) -> None:
    """Write its source files and prepare them."""
    sources = work / f"{data_set.path.name}-{data_set.format}"
    images = Path(ROOT / "pictures")
    rng = np.random.default_rng([digits.SEED, zlib.crc32(str(data_set.path).encode())])
    unfinished = sources.with_name(sources.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    files = [path.name for path in LAYOUTS[data_set.format](unfinished, images, shown, rng)]
    if sources.exists():
        shutil.rmtree(unfinished)  # the same files
    else:
        unfinished.rename(sources)
    options = [] if data_set.format == "webdataset" else ["--images", images]
    if data_set.format not in NO_TASK and Template.by_name(data_set.template).takes == "conversation":
        options += ["--instructions", "infimm" if system.startswith("infimm") else "llava"]
    run("prepare", *(sources / name for name in files), "--format", data_set.format, "--template",
        data_set.template, "--tokenizer", data_set.tokenizer, *options, "--out", data_set.path)  # fmt: skip


def make_questions(recipe: Recipe, heldout: list[Picture]) -> None:
    """Write the questions of `validation`, and their pictures where the recipe looks for them."""
    if recipe.validation.questions is None:
        return
    path = Path(recipe.validation.questions)
    folder = Path(recipe.validation.images or path.parent)
    for place in (folder, path.parent):
        place.mkdir(parents=True, exist_ok=True)
    for picture in heldout:
        shutil.copyfile(Path(ROOT / "pictures" / picture.path), folder / picture.path)
    has_words = Template.by_name(recipe.template).takes == "conversation"
    write_json(path, digits.questions(heldout, has_words))


def run(*arguments: object) -> None:
    """A megamm command, as a user would type it."""
    words = [str(argument) for argument in arguments]
    print("$ megamm " + " ".join(words), flush=True)
    if code := megamm(words):
        sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("system", help="a folder of examples/ with recipes")
    system = parser.parse_args().system
    files = sorted((EXAMPLES / system).glob("*.yaml"))
    if not files:
        parser.error(f"{system}: is no folder of examples/ with recipes")
    work, recipes = Path(ROOT / "sources" / system), [load_recipe(file, preset="tiny") for file in files]
    wanted = list({found.path: found for recipe in recipes for found in data_sets(recipe)}.values())
    asked = [recipe.validation.questions for recipe in recipes]
    out = [found.path for found in wanted] + [found.tokenizer for found in wanted]
    out += [Path(path) for path in asked if path is not None]
    made, stamp = work / "made", fingerprint(files)
    if made.is_file() and made.read_text() == stamp and all(path.exists() for path in out):
        print(f"{ROOT}: data of {system} are up to date")
        return
    training, heldout = digits.draw(Path(ROOT / "pictures"))
    templates = [*(found.template for found in wanted), *(recipe.template for recipe in recipes)]
    chat = next((t for t in templates if Template.by_name(t).takes == "conversation"), "vicuna")
    for recipe in recipes:
        make_tokenizer(recipe, templates, chat, work, training)
    seen = [recipe.validation.data for recipe in recipes]
    for found in wanted:
        make_data_set(found, system, work, heldout if str(found.path) in seen else training)
    for recipe in recipes:
        make_questions(recipe, heldout)
    made.write_text(stamp)


if __name__ == "__main__":
    main()
