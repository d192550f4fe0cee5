"""Console and file logging: this project's lines, Lightning's, and filters for warnings that need no action."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

from rich.logging import RichHandler

from litdistill.utils.distributed import is_first_rank

# Lines of Lightning that repeat what this project's lines say.
LIGHTNINGS = (
    r"`Trainer\.fit` stopped: `max_(epochs|steps)=|Restoring states from the checkpoint|Restored all states from"
)
FILE, ONCE = {"console": False}, {"console": "once"}  # `extra` of a line of logging


def console_handler() -> logging.Handler:
    """Returns the console handler that conf/hydra names: Rich on a terminal (beside a progress bar), plain lines elsewhere."""
    handler: logging.Handler
    if sys.stdout.isatty():
        handler = RichHandler(show_path=False, show_level=False, log_time_format="%H:%M:%S")
    else:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    handler.addFilter(NotOnConsole())
    return handler


class NotOnConsole(logging.Filter):
    """Keeps off the console lines with `extra=FILE`, repeated ones with `extra=ONCE`, and some of Lightning's."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        shows, text = getattr(record, "console", True), record.getMessage()
        if shows == "once":
            shows = text not in self._said
            self._said.add(text)
        return bool(shows) and not re.match(LIGHTNINGS, text)


def filter_warnings() -> None:
    """Filters warnings that hold for this project by design and need no action of the user."""
    for pattern in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*You are using `torch.load` with `weights_only=False`.*",
        ".*The number of training batches .* is smaller than the logging interval.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*Found .* module\\(s\\) in eval mode at the start of training.*",
        ".*No positive samples.*",
        ".*`srun` command is available.*",
        ".*It is recommended to use `self.log.*sync_dist=True.*",
    ):
        warnings.filterwarnings("ignore", pattern)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)


def adopt_lightning_logs() -> None:
    """Routes Lightning's log lines to the root logger; on import it adds its own handlers, which bypass the log file."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)
    if not is_first_rank():
        logging.getLogger().setLevel(logging.WARNING)  # rank 0 logs for all ranks


@contextlib.contextmanager
def without_notes() -> Iterator[None]:
    """Hides, inside the context, Lightning's notes on devices and products and the warnings of `filter_warnings`."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with warnings.catch_warnings():
        filter_warnings()
        before = list(logger.filters)
        logger.addFilter(_is_no_tip)
        try:
            yield
        finally:
            if _is_no_tip not in before:
                logger.removeFilter(_is_no_tip)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return not re.search(r"Tip:|litlogger|litmodels|GPU available|TPU available|HPU available", record.getMessage())


@contextlib.contextmanager
def logged_to(path: Path, alone: bool = False) -> Iterator[None]:
    """Also writes log lines to the file `path` inside the context. `alone`: those of this thread, to that file and those opened
    inside it only.

    Of a run that is alone, the screen still shows that a teacher is trained first, which takes long.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    silenced = (
        [h for h in root.handlers if type(h).__module__.partition(".")[0] in ("logging", "rich")] if alone else []
    )
    here = threading.get_ident()
    if alone:
        handler.addFilter(lambda record: record.thread == here)

    def is_shown(record: logging.LogRecord) -> bool:
        return record.thread != here or _is_of_teacher(record)

    for other in silenced:
        other.addFilter(is_shown)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        for other in silenced:
            other.removeFilter(is_shown)
        handler.close()


def _is_of_teacher(record: logging.LogRecord) -> bool:
    return record.name == "litdistill.training.prerequisites"


def format_seconds(seconds: float) -> str:
    """Returns a duration as text: 8 s, 3 min 20 s, 2 h 5 min."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60} s"
    return f"{s // 3600} h {s % 3600 // 60} min"
