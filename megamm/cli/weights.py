"""megamm convert, megamm verify: checkpoints in and out, and whether they are whole."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megamm.cli.common import add_command, positive, positive_number

# as in convert/families.py, which would take a second to import
FAMILIES = (
    *("llava", "llava_original", "idefics", "infimm", "open_flamingo", "xcomposer"),
    *("llama", "internlm", "clip", "openclip", "eva", "peft"),
)
DEFAULT_TOLERANCE = 1e-4


def add_parsers(commands: Any) -> None:
    """Add the subcommands."""
    convert = commands.add_parser(
        "convert",
        help="convert weights from and to Hugging Face format",
        epilog="example: megamm convert export --checkpoint runs/llava --out llava-hf --family llava",
        allow_abbrev=False,
    )
    directions = convert.add_subparsers(dest="direction", metavar="DIRECTION", required=True)
    _add_import(directions)
    _add_export(directions)
    _add_comparison(directions)
    verify_parser = add_command(
        commands,
        "verify",
        verify,
        "check every byte of a checkpoint against its manifest",
        "megamm verify runs/llava/checkpoints/step_00000500",
    )
    verify_parser.add_argument(
        "checkpoint", type=Path, metavar="CKPT", help="checkpoint or run directory (its newest checkpoint)"
    )
    verify_parser.add_argument(
        "--all", action="store_true", help="every checkpoint of a run directory; exit code 2 if one is bad"
    )


def _add_import(directions: Any) -> None:
    importing = add_command(
        directions,
        "import",
        import_weights,
        "read Hugging Face models into a checkpoint; the architecture is read from their config.json",
        "megamm convert import --from llava-1.5-7b-hf --out ckpt/llava",
    )
    importing.add_argument(
        "--from",
        dest="sources",
        action="append",
        type=Path,
        required=True,
        metavar="HF_DIR",
        help="model directory or file of weights; give it again for each part (language model, encoder, ...)",
    )
    importing.add_argument("--out", type=Path, required=True, metavar="CKPT", help="checkpoint to write")
    importing.add_argument(
        "--recipe", type=Path, metavar="R", help="recipe whose model the weights have to fit"
    )
    importing.add_argument(
        "--tokenizer", type=Path, metavar="T", help="tokenizer, where the sources bring none"
    )
    for option, meaning in (("--tp", "tensor"), ("--pp", "pipeline")):
        importing.add_argument(
            option,
            type=positive,
            metavar="N",
            help=f"{meaning} parallel size that the checkpoint's recipe names (any layout can load it)",
        )


def _add_export(directions: Any) -> None:
    exporting = add_command(
        directions,
        "export",
        export_weights,
        "write a checkpoint as a Hugging Face model",
        "megamm convert export --checkpoint runs/llava --out llava-hf --family llava",
    )
    exporting.add_argument(
        "--checkpoint", type=Path, required=True, metavar="CKPT", help="checkpoint or run directory"
    )
    exporting.add_argument("--out", type=Path, required=True, metavar="HF_DIR", help="directory to write")
    exporting.add_argument(
        "--family", choices=FAMILIES, default="llava", help="format to write (default llava)"
    )
    exporting.add_argument(
        "--merge-lora",
        action="store_true",
        help="add adapters to the weights that they adapt, also if the format has a place for them",
    )


def _add_comparison(directions: Any) -> None:
    comparing = add_command(
        directions,
        "verify",
        verify_weights,
        "compare a checkpoint's logits with those of transformers, on random ids and images",
        "megamm convert verify --checkpoint ckpt/llava --against llava-1.5-7b-hf",
    )
    comparing.add_argument(
        "--checkpoint", type=Path, required=True, metavar="CKPT", help="checkpoint or run directory"
    )
    comparing.add_argument(
        "--against", type=Path, required=True, metavar="HF_DIR", help="model that transformers loads"
    )
    comparing.add_argument(
        "--tolerance",
        type=positive_number,
        default=DEFAULT_TOLERANCE,
        metavar="X",
        help=f"largest difference of logits, as a share of the largest logit (default {DEFAULT_TOLERANCE:g})",
    )


def import_weights(args: argparse.Namespace) -> int:
    """Run `megamm convert import`."""
    from megamm.config import ParallelConfig
    from megamm.convert import import_checkpoint
    from megamm.recipe import load_recipe

    recipe = load_recipe(args.recipe) if args.recipe else None
    layout = ParallelConfig(tensor=args.tp or 1, pipeline=args.pp or 1) if args.tp or args.pp else None
    written = import_checkpoint(args.sources, args.out, recipe, args.tokenizer, layout, report=print)
    print(f"wrote {written}")
    if not (written / "tokenizer").is_dir():
        print("note: no tokenizer in the sources; to train or to generate, import with --tokenizer")
    return 0


def export_weights(args: argparse.Namespace) -> int:
    """Run `megamm convert export`."""
    from megamm.convert import export_checkpoint

    report = export_checkpoint(args.checkpoint, args.out, args.family, merge_lora=args.merge_lora)
    print(f"wrote {report.out}: {report.num_tensors} tensors, {report.num_bytes / 1e6:,.1f} MB")
    for note in report.notes:
        print(f"note: {note}")
    return 0


def verify_weights(args: argparse.Namespace) -> int:
    """Run `megamm convert verify`."""
    from megamm.evaluation.reference import compare_with_reference

    found = compare_with_reference(args.checkpoint, args.against)
    is_same = found.is_within(args.tolerance)
    images = f", {found.num_images} image(s)" if found.num_images else ""
    print(
        f"{'same' if is_same else 'DIFFERENT'}: logits differ by at most {found.difference:.1e} (the largest"
        f" is {found.scale:.1e}, tolerance {args.tolerance:g}) over {found.num_sequences} sequences of"
        f" {found.num_positions} positions{images}"
    )
    return 0 if is_same else 1


def verify(args: argparse.Namespace) -> int:
    """Run `megamm verify`."""
    from megamm.engine import manifest

    newest = manifest.resolve(args.checkpoint)
    is_run = newest != args.checkpoint.expanduser()
    found = manifest.list_checkpoints(newest.parent) if is_run and args.all else [newest]
    num_bad = sum(_is_bad(path, is_run, catch=args.all) for path in found)
    return 2 if num_bad else 0


def _is_bad(path: Path, is_run: bool, catch: bool) -> bool:
    """Verify one checkpoint and print what was found; `catch`: also if it is bad."""
    from megamm.engine import manifest

    try:
        found = manifest.verify(path, of_a_run=is_run)
    except manifest.DamagedCheckpoint as error:
        if not catch:
            raise
        print(f"BAD {error}")
        return True
    size = sum(entry.size for entry in found.files.values())
    print(f"{path}: {len(found.files)} files, {size / 1e6:,.1f} MB, all as the manifest says")
    return False
