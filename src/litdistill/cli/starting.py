"""The first line of a command on the screen, before anything heavy is imported: torch and Lightning take up to 15 s."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

# Flags that print something and end, soon or as input of another program.
PRINTS = ("-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "-i", "--info", "-sc", "--shell-completion")
RANKS = ("LOCAL_RANK", "RANK", "SLURM_PROCID")
_open: tuple[str, float] | None = None  # the text of the line that is still to be completed, and when it was shown


def show(verb: str, loads: str, arguments: Sequence[str]) -> None:
    """Writes to stderr that the verb is loading `loads`, "" for little. Silent in ranks other than 0 and in a sweep's workers.

    On a terminal the line is completed by `end`. Elsewhere it is a plain line, only where loading takes long and the command
    does more than print (`PRINTS`).
    """
    global _open
    started_by_another = "hydra.output_subdir=null" in arguments  # a worker of a sweep, or a rank
    if started_by_another or any(os.environ.get(k, "0") != "0" for k in RANKS):
        return
    terminal = sys.stderr.isatty()
    if not terminal and (not loads or prints(arguments)):
        return
    loads = "" if prints(arguments) else loads
    multirun = bool({"-m", "--multirun"} & set(arguments))  # Hydra prints its jobs before they load anything
    text = f"litdistill {verb}: loading" + (f" {loads}" if loads else "")
    print(f"{text} …", file=sys.stderr, end="" if terminal and not multirun else "\n", flush=True)
    if terminal and not multirun:
        _open = text, time.perf_counter()


def prints(arguments: Sequence[str]) -> bool:
    """Returns whether the command only prints something, such as its help."""
    return any(a.split("=")[0] in PRINTS for a in arguments)


def end(loaded: bool = False) -> None:
    """Completes the line with the seconds that loading took, or removes it where nothing was loaded or in no time."""
    global _open
    if _open is None:
        return
    (text, begun), _open = _open, None
    seconds = time.perf_counter() - begun
    done = f"{text.replace(': loading', ': loaded')} in {seconds:.0f} s\n" if loaded and seconds >= 1 else ""
    print(f"\r\x1b[2K{done}", file=sys.stderr, end="", flush=True)
