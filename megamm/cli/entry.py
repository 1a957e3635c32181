"""The parser of all subcommands, and how errors reach the user."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

from megamm import __version__
from megamm.cli import (
    answers,
    chat,
    data,
    doctor,
    evaluate,
    inspect,
    parity,
    plan,
    report,
    score,
    tokenizer,
    train,
    weights,
)
from megamm.cli.interrupt import interruptible
from megamm.errors import INTERRUPTED, MegammError, RankLost

# Time that rank 0 gets to report an error which all ranks have, before another rank speaks. The
# launcher ends the other processes as soon as rank 0 has failed, so normally they never do.
RANK_PATIENCE_S = 3.0
# Time that a rank which lost another waits for the launcher to end it: the other one may be about to speak.
LOSS_PATIENCE_S = 4.0

DESCRIPTION = "Training of vision-language models with tensor, pipeline, sequence and data parallelism."
EPILOG = """\
first steps:
  megamm doctor                                   what is installed and what works
  megamm plan examples/quickstart/llava.yaml      does it fit, how long does it take, in which layout
  megamm train examples/quickstart/llava.yaml --dry-run
  megamm SUBCOMMAND --help                        options and an example of each
"""


class Parser(argparse.ArgumentParser):
    """ArgumentParser that speaks like the rest of megamm: one sentence, exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"megamm: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = Parser(
        prog="megamm",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"megamm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="SUBCOMMAND", required=True)
    modules = (
        doctor,
        plan,
        data,
        tokenizer,
        inspect,
        weights,
        train,
        report,
        parity,
        answers,
        chat,
        evaluate,
        score,
    )
    for module in modules:
        module.add_parsers(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code (0, 1: failed run, 2: wrong input, 130: Ctrl-C; of `train`
    also those of megamm/errors.py)."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if argv[:2] == ["prepare", "tokenizer"]:  # the one subcommand of two words beside positional sources
        argv[:2] = ["prepare tokenizer"]
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not hasattr(args, "overrides"):
        parser.error(f"unknown argument {rest[0]!r}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    if not args.debug:  # advice of libraries to their own authors
        warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    try:
        with interruptible():
            return args.run(args)
    except KeyboardInterrupt:
        return _report("interrupted", INTERRUPTED, debug=False)
    except RankLost as error:
        _end_after_loss(error, args.debug)
    except MegammError as error:
        return _report(str(error), error.exit_code, args.debug)
    except BrokenPipeError:  # the reader of our output has gone (`megamm ... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        return _report(f"{error.filename}: {error.strerror}", 1, args.debug)


def _report(sentence: str, code: int, debug: bool) -> int:
    """Print the error once, also when every process of a distributed run has it; returns `code`."""
    if debug:
        traceback.print_exc()
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0 and code != INTERRUPTED:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # so that the launcher can end the wait
        time.sleep(RANK_PATIENCE_S)
        sentence = f"rank {rank}: {sentence}"
    if rank == 0 or code != INTERRUPTED:
        print(f"megamm: {sentence}", file=sys.stderr, flush=True)
    return code


def _end_after_loss(error: RankLost, debug: bool) -> NoReturn:
    """Report that another rank was lost, after that rank itself or, if the launcher has noticed, instead of
    it."""
    told = [signal.SIGTERM] if error.is_known else []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda received, _: told.append(signal.Signals(received)))
    deadline = time.monotonic() + LOSS_PATIENCE_S
    while not told and time.monotonic() < deadline:
        time.sleep(0.05)
    if debug:
        traceback.print_exc()
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or not told:  # one sentence; the launcher names the rank that was lost
        print(f"megamm: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # the backend's threads still wait for the lost rank; in an orderly end they would abort the process
    os._exit(error.exit_code)
