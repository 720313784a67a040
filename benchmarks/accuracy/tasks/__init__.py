"""Three small tasks of the families that adapters are compared on: arithmetic, lexical knowledge, and summaries of dialogues.

All are generated or derived here, from seeds and from one table; none is a public benchmark, and scores compare with no published ones.
What decides an example's split is its content (numbers, word, details), so no content of one split is in another.
"""

from benchmarks.accuracy.tasks.arithmetic import ARITHMETIC
from benchmarks.accuracy.tasks.dialogue import DIALOGUE
from benchmarks.accuracy.tasks.lexical import LEXICAL
from benchmarks.accuracy.tasks.task import SPLITS, Example, Task

TASKS: dict[str, Task] = {task.name: task for task in (ARITHMETIC, LEXICAL, DIALOGUE)}

__all__ = ["SPLITS", "TASKS", "Example", "Task"]
