"""An ensemble of networks and of files of outputs: the batch's inputs for the one, its ids and views for the other."""

from __future__ import annotations

from torch import Tensor, nn

from litdistill.distillation.recorded import RecordedTeacher
from litdistill.models.ensemble import Ensemble
from litdistill.tasks.base import Task
from litdistill.types import Batch


def reads_ids(net: nn.Module | None) -> bool:
    """Returns whether a teacher is a file of outputs, or an ensemble with one, which is looked up by the ids of each batch."""
    return net is not None and any(isinstance(m, RecordedTeacher) for m in net.modules())


def judges(net: nn.Module | None, split: str) -> bool:
    """Returns whether a teacher can be run on all of "val" or "test": a file of outputs may lack its samples."""
    return net is None or all(m.judges(split) for m in net.modules() if isinstance(m, RecordedTeacher))


def logits_of_each(net: Ensemble, task: Task, batch: Batch, split: str = "train") -> Tensor:
    """Returns the logits of each member for each class, (N, members, classes), as `Ensemble.each`. `split`: of the batch."""
    found = []
    for part in net.parts().values():
        recorded = isinstance(part, RecordedTeacher)
        outputs = part.outputs(batch, split) if recorded else task.forward(part, batch, False)  # type: ignore[operator]
        found.append(outputs.logits)
    return net.arranged(found)
