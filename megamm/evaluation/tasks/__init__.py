"""Public benchmarks: read as they are distributed, asked in each system's words, answered, scored.

The way of a question: a reader (readers/) makes an Item of it; prompts.py or few_shot.py word it; asking.py
has the model answer it; partial.py keeps the answer; run.py puts all together and scoring.py scores them.
"""

from megamm.evaluation.tasks.registry import TASKS, Task, read_items
from megamm.evaluation.tasks.run import evaluate_task
from megamm.evaluation.tasks.scoring import Result
from megamm.evaluation.tasks.settings import TaskSettings

__all__ = ["TASKS", "Result", "Task", "TaskSettings", "evaluate_task", "read_items"]
