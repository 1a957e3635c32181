"""Ranks that hang, and ranks that are slow, found and named.

whereabouts.py   what this rank is doing, noted by the training loop
beat.py          a sign of life with that in it, which ranks give each other through the launcher's store
verdict.py       from the signs of all ranks: who hangs, where
processes.py     stacks of processes, also of stopped ones, and their end
watchdog.py      the thread that gives and watches signs of life, and ends a run that hangs
slow_ranks.py    who works while the others wait

A hang shows in two ways. A process that is stopped, or stuck outside Python, gives no sign of life; its
neighbour notices. A process that lives but gets no further notices that itself. Either raises an alarm that
all
ranks answer: they write their stacks, the first of them says who is to blame, and all end with exit code 69,
so that a launcher can start them again.
"""

from megamm.training.watchdog.watchdog import Watchdog
from megamm.training.watchdog.whereabouts import Whereabouts

__all__ = ["Watchdog", "Whereabouts"]
