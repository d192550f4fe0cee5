"""What Lightning itself refuses, as a `UserError`: an option of its Trainer, or a callback that does not fit a Distiller."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from litdistill.utils.errors import UserError

LIGHTNING, TORCH = (Path(str(package.__file__)).parent for package in (lightning, torch))
CALLBACKS = (LIGHTNING / "pytorch" / "callbacks", LIGHTNING / "pytorch" / "tuner")
REFUSALS = (ValueError, TypeError, AttributeError, RuntimeError, MisconfigurationException)


@contextlib.contextmanager
def lightning_refusals() -> Iterator[None]:
    """Context that raises as `UserError` what Lightning's own code raises, or what torch raises when a callback of Lightning's
    calls it. Errors of any other code, the user's too, pass with their traceback."""
    try:
        yield
    except REFUSALS as error:
        if not refused_by_lightning(error):
            raise
        name, said = callback_of(error), " ".join(str(error).split())
        raise UserError(f"{name + ': ' if name is not None and name not in said else ''}{said}") from error


def refused_by_lightning(error: BaseException) -> bool:
    """Returns whether the code that raised an error is Lightning's, or torch's below a callback or tuner of Lightning's."""
    files = [Path(frame.filename) for frame in reversed(traceback.extract_tb(error.__traceback__))]
    if isinstance(error, MisconfigurationException) or (files and files[0].is_relative_to(LIGHTNING)):
        return True
    above = next((file for file in files if not file.is_relative_to(TORCH)), None)
    return above is not None and any(above.is_relative_to(folder) for folder in CALLBACKS)


def callback_of(error: BaseException) -> str | None:
    """Returns the class of the innermost callback in which an error was raised; None outside of callbacks."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        if isinstance(owner := frame.f_locals.get("self"), Callback):
            return type(owner).__name__
    return None
