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
    """Training was interrupted by a signal. `state`: what is left of it, its whole state by default.

    It derives from `BaseException`, so that loops which continue after a failed job (Hydra's multirun, a sweep) stop too.
    """

    def __init__(self, signum: int, where: str, state: str = "the state is saved"):
        name = signal.Signals(signum).name
        super().__init__(f"Stopped by {name} at {where}; {state}. The same command with resume=auto goes on.")
        self.signum, self.where, self.state, self.status = signum, where, state, 128 + signum

    def __reduce__(self) -> tuple[type[Stopped], tuple[int, str, str]]:
        return type(self), (self.signum, self.where, self.state)  # pickling, for a worker process of a pool
