"""Loggers of a run, of any kind and several at once: how they are built, what they are told at the end, how they are closed."""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from litdistill.config.instantiate import instantiate
from litdistill.utils.distributed import is_first_rank
from litdistill.utils.errors import UserError
from litdistill.utils.hashing import digest

log = logging.getLogger(__name__)


def build_loggers(nodes: Mapping[str, Any] | None) -> list[Logger]:
    """Returns the loggers of a config, `{name: node}`; a node of null is left out.

    Raises `UserError` for a logger whose package is missing.
    """
    found: list[Logger] = []
    for name, node in (nodes or {}).items():
        if node is None:
            continue
        try:
            found.append(instantiate(node, f"logger.{name}"))
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, ModuleNotFoundError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise UserError(f"logger.{name} needs a package that is not installed: {cause}") from error
    return found


def wandb_logger(
    save_dir: str, project: str = "litdistill", name: str | None = None, offline: bool | None = None, **options: Any
) -> WandbLogger:
    """Returns a logger of Weights & Biases that writes to `save_dir`/wandb.

    Args:
        save_dir: the run's folder. Its id at Weights & Biases is a hash of it, so that a resumed run goes on there.
        name: null: the last two parts of the folder.
        offline: true: nothing is sent; null: nothing is sent where there is no key. `wandb sync` sends it later.
        options: more arguments of `wandb.init`: tags, group, entity, …

    Raises `UserError` where wandb is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError("logger=wandb needs wandb: pip install 'litdistill[wandb]'") from error
    folder = Path(save_dir)
    folder.mkdir(parents=True, exist_ok=True)  # or wandb writes to a temporary folder
    offline = not has_wandb_key() if offline is None else offline
    if offline and is_first_rank():
        log.info("Weights & Biases: offline. To send this run later: wandb sync %s", folder / "wandb" / "offline-run-*")
    settings = wandb.Settings(silent=True) if offline else wandb.Settings()
    if not offline:
        options = {"resume": "allow", **options}
    return WandbLogger(
        name=name or "/".join(folder.parts[-2:]),
        save_dir=str(folder),
        project=project,
        offline=offline,
        id=digest({"folder": str(folder)}),
        settings=settings,
        **options,
    )


def has_wandb_key() -> bool:
    """Returns whether Weights & Biases may be sent to: there is a key (environment, ~/.netrc), and no offline mode."""
    if os.environ.get("WANDB_MODE", "online") != "online":
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


@contextlib.contextmanager
def wandb_finished() -> Iterator[None]:
    """Finishes a run of Weights & Biases that began inside: the next run of this process would log to it."""
    before = _wandb_run()
    try:
        yield
    finally:
        run = _wandb_run()
        if run is not None and run is not before:
            with guarded("The last lines in Weights & Biases"):
                run.finish(exit_code=0 if sys.exc_info()[0] is None else 1)


def _wandb_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)


@contextlib.contextmanager
def guarded(what: str, remedy: str = "") -> Iterator[None]:
    """Logs a warning that `what` are left out where a logger fails after the fit: the run is finished without them."""
    try:
        yield
    except Exception as error:  # a network, a full disk, names that matplotlib reads as formulas, …
        log.warning(
            "%s are left out: %s: %s. The run is finished without them.%s", what, type(error).__name__, error, remedy
        )


def note_results(logger: Logger, hyperparameters: Mapping[str, Any], results: Mapping[str, float], step: int) -> None:
    """Writes a run's hyperparameters and final results: to TensorBoard as its HParams, to other loggers as metrics."""
    if isinstance(logger, TensorBoardLogger):
        logger.log_hyperparams(dict(hyperparameters), dict(results), step)
        logger.experiment.flush()
        return
    logger.log_hyperparams(dict(hyperparameters))
    logger.log_metrics(dict(results), step)
    logger.save()


class WandbPictures:
    """The one method of TensorBoard's writer that figures are written by, for Weights & Biases."""

    def __init__(self, logger: WandbLogger):
        self.logger = logger

    def add_figure(self, name: str, figure: Any, step: int) -> None:
        """Writes a figure of matplotlib."""
        self.logger.log_image(name, [figure], step=None)


def picture_writer(logger: Logger) -> Any:
    """Returns what figures are written to, with a method `add_figure`; None for a logger that takes none."""
    if isinstance(logger, TensorBoardLogger):
        return logger.experiment
    return WandbPictures(logger) if isinstance(logger, WandbLogger) else None
