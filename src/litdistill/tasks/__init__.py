"""Tasks: the labels' loss, the predictions and the metrics of a network."""

from __future__ import annotations

from litdistill.tasks.base import Task
from litdistill.tasks.classification import Classification
from litdistill.tasks.detection.task import Detection
from litdistill.tasks.embedding import Embedding
from litdistill.tasks.multilabel import MultiLabel
from litdistill.tasks.regression import Regression
from litdistill.tasks.segmentation import Segmentation
from litdistill.tasks.sequence import LanguageModel
from litdistill.utils.errors import UserError

__all__ = [
    "TASKS",
    "Classification",
    "Detection",
    "Embedding",
    "LanguageModel",
    "MultiLabel",
    "Regression",
    "Segmentation",
    "Task",
    "named_task",
]

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "multilabel": MultiLabel,
    "regression": Regression,
    "language_model": LanguageModel,
    "embedding": Embedding,
    "detection": Detection,
    "segmentation": Segmentation,
}


def named_task(task: Task | str) -> Task:
    """Returns the given task, or the task of that name with its defaults. Raises `UserError` for an unknown name."""
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        raise UserError(f"task={task!r}: choose {', '.join(TASKS)}, or give a litdistill.Task of your own.")
    return TASKS[task]()
