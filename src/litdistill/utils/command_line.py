"""The command line of this process: parsing it, starting copies of the process with it, and printing it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString

from litdistill.utils.errors import UserError
from litdistill.utils.paths import CONF, PACKAGE, ROOT

RANKS = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Hydra's flags that take a value as the next argument.
VALUED = {"--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--cfg", "-c", "--package", "-p"}


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits command-line arguments into Hydra's flags, with their values, and the overrides."""
    flags: list[str] = []
    overrides: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        flags.append(argument)
        if argument in VALUED:
            flags.extend(value for value in [next(rest, None)] if value is not None)
    return flags, overrides


def without_null(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments with `logger=null` and its like in Hydra's words: it takes no null for a file of a group."""
    words = {
        f"{group}=null": f"{group}=none" for group in ("adversarial", "balance", "callbacks", "logger", "scheduler")
    }
    words |= {"compress=null": "~compress", "experiment=null": ""}  # no experiment is the default
    return [word for argument in arguments if (word := words.get(argument, argument))]


def check_null(arguments: Sequence[str]) -> None:
    """Raises `UserError` for a null in place of a file of a group of `conf` that a run needs (`data=null`)."""
    for argument in arguments:
        group, _, value = argument.partition("=")
        folder = CONF / group.partition("@")[0]
        if value == "null" and group and folder.is_dir():
            some = ", ".join(sorted(p.stem for p in folder.glob("*.yaml"))[:8])
            none = " Without a teacher: teacher=null." if group == "net@teacher" else ""
            raise UserError(f"{argument}: a run needs one of conf/{folder.name}: {some}, ….{none}")


def config_dir_of(arguments: Sequence[str]) -> Path | None:
    """Returns the folder that the arguments give with `--config-dir`; None without the flag."""
    found = None
    for index, flag in enumerate(arguments):
        if flag in ("--config-dir", "-cd"):
            found = next(iter(arguments[index + 1 :]), None)
        elif flag.startswith("--config-dir="):
            found = flag.removeprefix("--config-dir=")
    return Path(found) if found else None


def config_dir_flags() -> list[str]:
    """Returns the `--config-dir` flags of the running Hydra command, for another process; empty outside one."""
    if not HydraConfig.initialized():
        return []
    sources = HydraConfig.get().runtime.config_sources
    return [part for s in sources if s.provider == "command-line" for part in ("--config-dir", s.path)]


def command_argv(verb: str) -> list[str]:
    """Returns the start of `sys.argv` for a command: a file that Python runs, followed by the verb unless the file implies it.

    Lightning starts ranks by `python sys.argv[0] …`, or by `python -m` where this process was started that way.
    """
    started = Path(sys.argv[0]).resolve()
    if started.stem == "litdistill" and started.is_file():  # the installed command
        return [sys.argv[0], verb]
    if ROOT is not None and started != PACKAGE / "__main__.py" and (ROOT / "scripts" / f"{verb}.py").is_file():
        return [str(ROOT / "scripts" / f"{verb}.py")]
    return [str(PACKAGE / "__main__.py"), verb]


def literal(value: Any) -> str:
    """Returns a plain value in the syntax of Hydra's command line, without spaces."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(literal, value)) + "]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if not isinstance(value, str):
        return repr(value)
    if re.fullmatch(r"/?[A-Za-z_][\w./-]*", value) and value.lower() not in ("true", "false", "null", "nan", "inf"):
        return value
    return QuotedString(value, Quote.single).with_quotes()


def near(path: str | Path) -> str:
    """Returns a path as it is typed here: relative where it lies below the working folder, else absolute."""
    found, here = Path(os.path.abspath(path)), Path.cwd()
    return str(found.relative_to(here)) if here in found.parents else str(found)


def typed(key: str, path: str | Path) -> str:
    """Returns the option of a command that names a path, quoted for a shell: `run=runs/train/…`."""
    text = f"{key}={literal(near(path))}"
    # Hydra's quotes within double ones are easier to read than within those of shlex.
    return f'"{text}"' if "'" in text and not {*text} & {*'"$`\\!'} else shlex.quote(text)


@contextlib.contextmanager
def as_command(argv: list[str]) -> Iterator[None]:
    """Sets `sys.argv` to `argv` for one run, then restores it and destroys the process group of that run."""
    before, ranks = sys.argv, {k: os.environ[k] for k in RANKS if k in os.environ}
    sys.argv = argv
    try:
        yield
    finally:
        sys.argv = before
        _leave_process_group("LOCAL_RANK" in ranks)
        for key in RANKS:
            os.environ.pop(key, None)
        os.environ.update(ranks)


def _leave_process_group(started_as_rank: bool) -> None:
    """Destroys torch's default process group, unless this process was itself started as a rank."""
    if "torch" not in sys.modules or started_as_rank:
        return
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def command_text(argv: Sequence[str]) -> str:
    """Returns the shell command that repeats a run from the project's folder, without paths of this machine."""
    script = Path(argv[0]).resolve()
    rest = [a for a in argv[1:] if a != "hydra.mode=RUN" and not a.startswith("folder=")]  # set per job by a multirun
    if script == PACKAGE / "__main__.py":
        return shlex.join(["python", "-m", "litdistill", *rest])
    if script.stem == "litdistill":
        return shlex.join(["litdistill", *rest])
    inside = ROOT is not None and script.is_relative_to(ROOT)
    return shlex.join(["python", str(script.relative_to(ROOT)) if ROOT and inside else script.name, *rest])
