"""The prerequisites of a run: its teacher and its starting point, each trained once per recipe and then reused."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from litdistill.config.origin import check_foreign, check_links
from litdistill.config.recipes import is_complete, student_config, student_folder, teacher_config
from litdistill.utils.distributed import broadcast_from_rank0, is_first_rank
from litdistill.utils.files import write_text
from litdistill.utils.logging import logged_to

log = logging.getLogger(__name__)


class Prerequisites:
    """Trains the missing prerequisites of a run by `train`; `seconds` is the time spent, waiting for locks included.

    `train` is called with the config and the role of what is trained: "Teacher" for a student, "Teacher's teacher" for a
    teacher. `check` is called before the teacher is trained, to raise the errors of an invalid student first. `role`: that of
    the run itself.
    """

    def __init__(self, train: Callable[..., float], check: Callable[[], None], role: str = "Student"):
        self.train, self.check, self.seconds = train, check, 0.0
        self.owner = "" if role == "Student" else f"{role}'s "

    def teacher(self, cfg: DictConfig, folder: Path) -> None:
        """Trains the teacher of `cfg` in `folder`."""
        self.check()
        self._train_once(teacher_config(cfg), folder, "teacher")

    def starting_point(self, cfg: DictConfig) -> Path | None:
        """Returns the run folder that the student starts from if `student.checkpoint` is auto, and trains a missing run."""
        if cfg.student.get("checkpoint") != "auto":
            return None
        folder = student_folder(cfg)
        if not broadcast_from_rank0(is_complete(folder)):
            self._train_once(student_config(cfg), folder, "starting point")
        return folder

    def _train_once(self, recipe: DictConfig, folder: Path, what: str) -> None:
        begun = time.perf_counter()
        recipe.folder = str(folder)
        check_foreign(recipe, folder)  # before anything is written: the folder's name contains names of networks
        with _lock(folder):
            if not broadcast_from_rank0(is_complete(folder)):
                log.info("No such %s yet: training it once, in %s", what, folder)
                check_links(folder)
                if is_first_rank():
                    write_text(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(recipe))
                with logged_to(folder / "train.log"):
                    self.train(recipe, role=f"{self.owner}{what}".capitalize())
                log.info("The %s is trained.", what)
        self.seconds += time.perf_counter() - begun


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, on rank 0 only: the other ranks of the run train together with it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    while not broadcast_from_rank0(_acquired(lock) if is_first_rank() else True):
        pass  # a broadcast every minute, since the waiting ranks would otherwise time out
    try:
        yield
    finally:
        lock.release()


def _acquired(lock: FileLock) -> bool:
    with contextlib.suppress(Timeout):
        lock.acquire(timeout=60)
    return lock.is_locked
