"""megamm convert, megamm verify: checkpoints in and out, and whether they are whole."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megamm.cli.common import add_command, positive

FAMILIES = ("llava",)


def add_parsers(commands: Any) -> None:
    """Add the subcommands."""
    convert = commands.add_parser(
        "convert",
        help="convert weights from and to Hugging Face format",
        epilog="example: megamm convert export --checkpoint runs/llava --out llava-hf --family llava",
        allow_abbrev=False,
    )
    directions = convert.add_subparsers(dest="direction", metavar="DIRECTION", required=True)
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
        help="model directory; give it again for each part (language model, vision encoder)",
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
        "--family", choices=FAMILIES, default="llava", help="model class to write (default llava)"
    )
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


def import_weights(args: argparse.Namespace) -> int:
    """Run `megamm convert import`."""
    from megamm.config import ParallelConfig
    from megamm.convert import import_checkpoint
    from megamm.recipe import load_recipe

    recipe = load_recipe(args.recipe) if args.recipe else None
    layout = ParallelConfig(tensor=args.tp or 1, pipeline=args.pp or 1) if args.tp or args.pp else None
    written = import_checkpoint(args.sources, args.out, recipe, args.tokenizer, layout)
    print(f"wrote {written}")
    if not (written / "tokenizer").is_dir():
        print("note: no tokenizer.model in the sources; to train or to generate, import with --tokenizer")
    return 0


def export_weights(args: argparse.Namespace) -> int:
    """Run `megamm convert export`."""
    from megamm.convert import export_checkpoint

    report = export_checkpoint(args.checkpoint, args.out, args.family)
    print(f"wrote {report.out}: {report.num_tensors} tensors, {report.num_bytes / 1e6:,.1f} MB")
    for note in report.notes:
        print(f"note: {note}")
    return 0


def verify(args: argparse.Namespace) -> int:
    """Run `megamm verify`."""
    from megamm.engine import manifest

    path = manifest.resolve(args.checkpoint)
    found = manifest.verify(path)
    size = sum(entry.size for entry in found.files.values())
    print(f"{path}: {len(found.files)} files, {size / 1e6:,.1f} MB, all as the manifest says")
    return 0
