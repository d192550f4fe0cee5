"""The runs that a run starts from: its teacher and its starting point, each trained once and found again by its recipe."""

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
from litdistill.utils.checkpoint import write_text
from litdistill.utils.distributed import broadcast_from_rank0, is_first_rank
from litdistill.utils.logging import logged_to

log = logging.getLogger(__name__)


class Prerequisites:
    """Trains what a run starts from by `train`, where nobody has yet; `seconds` is the time that took, waiting included.

    `check` is called before the first training: a student that cannot be built is better known then than after.
    """

    def __init__(self, train: Callable[[DictConfig], float], check: Callable[[], None]):
        self.train, self.check, self.seconds = train, check, 0.0

    def teacher(self, cfg: DictConfig, folder: Path) -> None:
        """Trains the teacher of `cfg` in `folder`."""
        self.check()
        self._train_once(teacher_config(cfg), folder, "teacher")

    def starting_point(self, cfg: DictConfig) -> Path | None:
        """The run that the student starts from where `student.checkpoint` is auto, trained where there is none yet."""
        if cfg.student.get("checkpoint") != "auto":
            return None
        folder = student_folder(cfg)
        if not broadcast_from_rank0(is_complete(folder)):
            self._train_once(student_config(cfg), folder, "starting point")
        return folder

    def _train_once(self, recipe: DictConfig, folder: Path, what: str) -> None:
        begun = time.perf_counter()
        recipe.folder = str(folder)
        check_foreign(recipe, folder)  # before anything is written: names of its networks are a part of the folder's
        with _lock(folder):
            if not broadcast_from_rank0(is_complete(folder)):
                log.info("No such %s yet: training it once, in %s", what, folder)
                check_links(folder)
                if is_first_rank():
                    write_text(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(recipe))
                with logged_to(folder / "train.log"):
                    self.train(recipe)
                log.info("The %s is trained.", what)
        self.seconds += time.perf_counter() - begun


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Held by the first process of a run only: its other ranks train the teacher together with it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    while not broadcast_from_rank0(_acquired(lock) if is_first_rank() else True):
        pass  # the ranks are told once a minute that the first one still waits, as they would give it up
    try:
        yield
    finally:
        lock.release()


def _acquired(lock: FileLock) -> bool:
    with contextlib.suppress(Timeout):
        lock.acquire(timeout=60)
    return lock.is_locked
