"""Scores of predictions, as the benchmarks' own evaluators compute them.

rows.py       files of predictions and references
pairing.py    which prediction belongs to which reference
vqa.py        VQAv2, OKVQA, TextVQA, VizWiz; vqa_text.py: answers as they are compared
gqa.py, pope.py, mme.py, mmbench.py, scienceqa.py
mmmu.py       mmmu_parsing.py: what an answer means
caption.py    captions_text.py: tokens; meteor.py, spice.py; java.py: the processes behind them
result.py     numbers as data and as a table, and of several runs
score.py      the metrics by name
"""

from megamm.evaluation.scores.result import Runs, Scores, as_text
from megamm.evaluation.scores.rows import read_rows
from megamm.evaluation.scores.score import METRICS, score_rows

__all__ = ["METRICS", "Runs", "Scores", "as_text", "read_rows", "score_rows"]
