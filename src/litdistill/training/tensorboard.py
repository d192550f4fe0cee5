"""TensorBoard's logger, whose cards are sorted for people (`litdistill.utils.tags`) and none of which is a staircase of epochs.

Lightning adds `epoch` to all that it logs, and offers no option for the names of curves.
"""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch.loggers import TensorBoardLogger

from litdistill.utils.tags import tag


class TensorBoard(TensorBoardLogger):
    """Lightning's TensorBoardLogger, with its arguments, and with the tags of `litdistill.utils.tags.tag`."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Writes the values under their tags; drops those without one."""
        tagged = {tag(name): value for name, value in metrics.items()}
        super().log_metrics({name: value for name, value in tagged.items() if name is not None}, step)
