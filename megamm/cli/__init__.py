"""The command line: `megamm SUBCOMMAND`, also `python -m megamm`.

entry.py      parser, errors to one sentence on stderr, exit codes
interrupt.py  Ctrl-C
train.py      train
launched.py   what a rank that torchrun has started owes it
report.py     report
data.py       prepare
tokenizer.py  prepare tokenizer
weights.py    convert import, convert export, verify
answers.py    generate, evaluate
score.py      score
chat.py       chat
doctor.py     doctor

Importing this package imports nothing heavy: every command imports what it runs when it runs.
"""

from megamm.cli.entry import main

__all__ = ["main"]
