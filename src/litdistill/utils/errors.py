"""Exceptions whose message is meant for the user: `UserError` for wrong input and `Stopped` for an interrupted run."""

from __future__ import annotations

import signal

from litdistill.utils.text import printable


class UserError(Exception):
    """Wrong input, not a defect: commands print its message alone, without a traceback, and exit with status 2.

    The message may quote files of somebody else: control characters in it are replaced, as a terminal would obey them.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class Stopped(BaseException):
    """Training was interrupted by a signal after its state was saved.

    It derives from `BaseException`, so that loops which continue after a failed job (Hydra's multirun, a sweep) stop too.
    """

    def __init__(self, signum: int, where: str):
        name = signal.Signals(signum).name
        super().__init__(
            f"Stopped by {name} at {where}; the state is saved. The same command with resume=auto goes on."
        )
        self.signum, self.where, self.status = signum, where, 128 + signum

    def __reduce__(self) -> tuple[type[Stopped], tuple[int, str]]:
        return type(self), (self.signum, self.where)  # pickling, for a worker process of a pool
