"""How Hydra's commands start and end: one stamp a start, clear errors with the nearest names, a telling exit status."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.experimental.callback import Callback as HydraCallback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from litdistill.benchmarks import published_tables
from litdistill.cli.resume import resumed
from litdistill.cli.suggestions import suggestions
from litdistill.config.origin import check_foreign
from litdistill.utils.command_line import as_command, config_dir_flags, literal
from litdistill.utils.distributed import run_stamp
from litdistill.utils.errors import Stopped, UserError
from litdistill.utils.logging import filter_warnings
from litdistill.utils.paths import CONF, resolve_paths

log = logging.getLogger(__name__)

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
# Of Hydra's messages what helps nobody here: `+key` would add a key that nothing reads, and options are listed below.
HYDRAS_OWN = (
    "\t",
    "Config search path",
    "See https",
    "Set the env",
    "To append to your config",
    "Available options in",
)
published_tables.register()


class Job:
    """The task as Hydra calls it, and as its launchers send it to other processes.

    While it runs, `sys.argv` is the command of this very job: ranks that Lightning starts repeat it, and no sweep.
    """

    def __init__(self, task: Callable[[DictConfig], Any], command: list[str], arguments: list[str]):
        self.task, self.command, self.arguments = task, command, arguments

    def __call__(self, cfg: DictConfig) -> Any:
        about = HydraConfig.get()
        check_foreign(cfg, trust=cfg.get("trust"))
        start = Path(about.runtime.cwd)
        if about.job.chdir:
            resolve_paths(cfg, start)
        if about.mode != RunMode.MULTIRUN:
            sys.argv = [*self.command, *self.arguments]
            return self.task(cfg)
        output = Path(about.runtime.output_dir)
        inside = output.is_relative_to(start)
        own = [f"folder={literal(str(output.relative_to(start) if inside else output))}"] if "folder" in cfg else []
        with as_command([*self.command, *config_dir_flags(), *about.overrides.task, *own, "hydra.mode=RUN"]):
            return self.task(cfg)


def run_task(task: Callable[[DictConfig], Any], config_name: str, verb: str | None = None) -> None:
    """Runs `task(cfg)` as a Hydra command with this project's manners, on the overrides in `sys.argv`.

    `verb`: what stands before the overrides there; None: nothing, as the file that was started says it. Ends the process
    with status 2 and a message alone where the user's input is wrong, and with 128 + its number where a signal stopped it.
    """
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # last: one's own modules are found, and shadow nothing
    filter_warnings()
    logging.raiseExceptions = False  # on a full disk what the run itself cannot write says so, in a line
    typed = sys.argv[1 if verb is None else 2 :]
    command = [sys.argv[0], *([verb] if verb is not None else [])]
    try:
        if "RUN_STAMP" not in os.environ:  # Lightning's child processes inherit it: all ranks share one folder
            os.environ["RUN_STAMP"] = run_stamp()
        sys.argv[1:] = typed = resumed(typed, config_name)
        entry = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
        with _environment(HYDRA_FULL_ERROR="1"):  # errors come here instead of to Hydra's own printer
            entry(Job(task, command, typed))()
    except KeyboardInterrupt:
        _end("Interrupted.", 130)
    except Stopped as stop:
        _end(str(stop), stop.status)
    except Exception as error:
        _explain(error, typed, config_name)


def _explain(error: Exception, arguments: list[str], config_name: str) -> NoReturn:
    """Ends with a message where the user can do something about it; raises what is a defect."""
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    if isinstance(error, OSError) and error.errno in UNWRITABLE and not full:
        _end(f"Nothing can be written: {error}. Free some space, or choose another folder with runs=…", 2)
    root = _cause(error)
    if full or not isinstance(root, (UserError, HydraException, OmegaConfBaseException)):
        raise error
    # What composing refused is a key or an option; later errors say themselves what they are about.
    near = "" if isinstance(root, UserError) else suggestions(arguments, config_name)
    _end(f"{_first_lines(root)}{near}", 2)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {k: os.environ.get(k) for k in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


def _cause(error: BaseException) -> BaseException:
    """The exception that Hydra wrapped, if a UserError is at its root."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, UserError):
            return chain
        chain = chain.__cause__ or chain.__context__
    return error


def _first_lines(error: BaseException) -> str:
    text = str(error) or traceback.format_exception_only(error)[-1]
    lines = [line for line in text.splitlines() if not line.startswith(HYDRAS_OWN)]
    return "\n".join(lines).strip()


def _end(message: str, status: int) -> NoReturn:
    log.debug("%s", message)
    print(f"\n{message}", file=sys.stderr)
    sys.exit(status)


class JobFailures(HydraCallback):
    """Says at once which job of a multirun has failed, and of what: Hydra tells when all others are done, of the first."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN or job_return.status != JobStatus.FAILED:
            return
        try:
            job_return.return_value  # noqa: B018  raises what the job raised
        except Exception as error:
            log.error(
                "Job %s failed: %s. The other jobs go on; the same command with resume=auto repeats what is not finished.",
                *(config.hydra.job.num, _first_lines(_cause(error))),
            )
