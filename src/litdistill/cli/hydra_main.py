"""Start and end of Hydra commands: one stamp per start, clear errors with suggestions, and the exit status."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
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
from litdistill.cli import starting
from litdistill.cli.help import help_text
from litdistill.cli.resume import resumed
from litdistill.cli.suggestions import suggestions
from litdistill.config.instantiate import import_classes_from
from litdistill.config.origin import check_foreign, restore_record, save_record
from litdistill.config.schema import SCHEMAS, check
from litdistill.utils import run_names
from litdistill.utils.command_line import as_command, check_null, config_dir_flags, literal, split_flags, without_null
from litdistill.utils.distributed import run_stamp
from litdistill.utils.errors import Stopped, UserError
from litdistill.utils.logging import filter_warnings
from litdistill.utils.paths import CONF, resolve_paths
from litdistill.utils.text import printable
from litdistill.utils.units import quantity

log = logging.getLogger(__name__)
run_names.register()  # when this module is imported: in each process of a launcher too

_made: list[Path] = []  # the folder of this command's run, and those around it that were not there before

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
# Starts of lines of Hydra's messages to drop: `+key` would add a key that nothing reads, and options are listed below.
HYDRA_HINTS = (
    "\t",
    "Config search path",
    "See https",
    "Set the env",
    "To append to your config",
    "Available options in",
)


class Refused(BaseException):
    """Carries a task's `UserError` past Hydra, which would print the overrides of a failed job in front of the message.

    `folder`: Hydra's output folder.
    """

    def __init__(self, error: UserError, folder: Path):
        super().__init__(str(error))
        self.error, self.folder = error, folder


class Job:
    """The task as a picklable callable for Hydra and its launchers.

    During a call `sys.argv` is the command of this job alone: ranks that Lightning starts repeat the job, not the multirun.
    """

    def __init__(self, task: Callable[[DictConfig], Any], command: list[str], arguments: list[str]):
        self.task, self.command, self.arguments = task, command, arguments

    def __call__(self, cfg: DictConfig) -> Any:
        hydra_config = HydraConfig.get()
        check_foreign(cfg, trust=cfg.get("trust"))
        start = Path(hydra_config.runtime.cwd)
        import_classes_from(str(start))  # here too, for the process of a launcher
        if hydra_config.job.chdir:
            resolve_paths(cfg, start)
        if hydra_config.mode != RunMode.MULTIRUN:
            sys.argv = [*self.command, *self.arguments]
            try:
                check_deleted(cfg, hydra_config.overrides.task, str(hydra_config.job.config_name))
                check(cfg, str(hydra_config.job.config_name))
                return self.task(cfg)
            except UserError as error:
                raise Refused(error, Path(hydra_config.runtime.output_dir)) from error
        check_deleted(cfg, hydra_config.overrides.task, str(hydra_config.job.config_name))
        check(cfg, str(hydra_config.job.config_name))
        output = Path(hydra_config.runtime.output_dir)
        inside = output.is_relative_to(start)
        own = [f"folder={literal(str(output.relative_to(start) if inside else output))}"] if "folder" in cfg else []
        with as_command([*self.command, *config_dir_flags(), *hydra_config.overrides.task, *own, "hydra.mode=RUN"]):
            return self.task(cfg)


def check_deleted(cfg: DictConfig, overrides: Sequence[str], config_name: str) -> None:
    """Raises `UserError` for an override such as `~callbacks`, which deletes a key that is read, in place of emptying it;
    not where another override adds it again."""
    for name in [text[1:].partition("=")[0] for text in overrides if text.startswith("~")]:
        if name in SCHEMAS[config_name].model_fields and name not in cfg:
            raise UserError(
                f"~{name} deletes a key that is read here: {name}=null leaves it empty, and ~{name}.<key> drops one."
            )


def run_task(task: Callable[[DictConfig], Any], config_name: str, verb: str | None = None) -> None:
    """Runs `task(cfg)` as a Hydra command on the overrides in `sys.argv`.

    `verb`: the argument in front of the overrides; None for a script, which implies it. Exits with status 2 and a message
    without a traceback for wrong input, and with 128 + its number after a signal.
    """
    import_classes_from(os.getcwd())
    filter_warnings()
    # On a full disk the run reports its own failed write in one line.
    logging.raiseExceptions = False
    threading.excepthook = _quiet_writer
    arguments = without_null(sys.argv[1 if verb is None else 2 :])
    command = [sys.argv[0], *([verb] if verb is not None else [])]
    try:
        if config_name in ("train", "sweep"):
            check_null(arguments)
        if "RUN_STAMP" not in os.environ:  # inherited by all ranks, which share one folder
            os.environ["RUN_STAMP"] = run_stamp()
        sys.argv[1:] = arguments = resumed(arguments, config_name)
        for folder in _named_folders(arguments) if config_name == "train" else ():
            save_record(folder)
        published_tables.register(arguments)
        if {"-h", "--help"} & set(arguments):
            starting.end()
            print(help_text(config_name, [a for a in arguments if a not in ("-h", "--help")]), end="")
            return
        run_names.announce(split_flags(arguments)[1])
        entry = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
        with _environment(HYDRA_FULL_ERROR="1"):  # errors are raised here instead of printed by Hydra
            if starting.prints(arguments):
                starting.end()
            entry(Job(task, command, arguments))()
    except KeyboardInterrupt:
        _exit("Interrupted.", 130)
    except Stopped as stop:
        _exit(str(stop), stop.status)
    except Refused as refused:
        if not any(a.startswith("hydra.run.dir=") for a in arguments):  # of a resume
            remove_if_empty(refused.folder)
        _exit_or_raise(refused.error, arguments, config_name)
    except Exception as error:
        _exit_or_raise(error, arguments, config_name)


def remove_if_empty(folder: Path) -> None:
    """Removes the folder of a run in which nothing was trained: there is only Hydra's record, a lock, and what was printed.

    With it go the folders around it that this command has made. Not the folder in which the command was called, nor one above
    it: commands that make no folder of their own have that one.
    """
    if not (folder / ".hydra").is_dir() or Path.cwd().is_relative_to(folder.resolve()):
        return
    files = [p for p in folder.rglob("*") if not p.is_dir()]
    own = [p for p in files if p.parent != folder / ".hydra" and p.name != ".lock"]
    if not all(p.suffix == ".log" for p in own):
        return
    for handler in list(logging.getLogger().handlers):
        if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).is_relative_to(folder.resolve()):
            logging.getLogger().removeHandler(handler)  # it would make its file again, or fail to
            handler.close()
    with contextlib.suppress(OSError):  # another process has just written into it, or it cannot be written
        for file in files:
            file.unlink()
        for inside in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
            inside.rmdir()
        for made in _made:
            made.rmdir()


def _named_folders(arguments: list[str]) -> list[Path]:
    """Returns the folder of an earlier run in which a command starts, by a resume or by its name; empty without one."""
    named = [Path(a.partition("=")[2].strip("'\"")) for a in arguments if a.startswith("hydra.run.dir=")]
    return [folder for folder in named if (folder / ".hydra").is_dir()]


def _quiet_writer(failed: threading.ExceptHookArgs) -> None:
    """Drops the traceback of a thread that cannot write (TensorBoard's): its next write raises in the main thread."""
    if not (isinstance(failed.exc_value, OSError) and failed.exc_value.errno in UNWRITABLE):
        threading.__excepthook__(failed)


def _exit_or_raise(error: Exception, arguments: list[str], config_name: str) -> NoReturn:
    """Exits with a message for an error that the user can fix; raises a defect."""
    for folder in _named_folders(arguments):  # a start that is refused leaves the run's record as it was
        restore_record(folder)
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    if isinstance(error, OSError) and error.errno in UNWRITABLE and not full:
        _exit(f"Nothing can be written: {error}. Free some space, or choose another folder with runs=…", 2)
    root = _cause(error)
    if full or not (isinstance(root, (UserError, HydraException, OmegaConfBaseException)) or _of_flags(root)):
        raise error
    # A composition error concerns a key or an option; a UserError names its own remedy.
    near = "" if isinstance(root, UserError) else suggestions(arguments, config_name)
    _exit(f"{_first_lines(root)}{near}", 2)


def _of_flags(error: BaseException) -> bool:
    """Returns whether Hydra itself refuses what it was called with, as two of its flags that exclude each other."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ValueError) and Path(frames[-1].filename).is_relative_to(Path(hydra.__file__).parent)


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
    """Returns the UserError among the causes of an exception; without one, the exception itself."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, UserError):
            return chain
        chain = chain.__cause__ or chain.__context__
    return error


def _first_lines(error: BaseException) -> str:
    text = str(error) or traceback.format_exception_only(error)[-1]
    lines = [line for line in text.splitlines() if not line.startswith(HYDRA_HINTS)]
    return "\n".join(lines).strip()


def _exit(message: str, status: int) -> NoReturn:
    log.debug("%s", message)
    starting.end()
    print(f"\n{printable(message)}", file=sys.stderr)
    sys.exit(status)


class JobFailures(HydraCallback):
    """Logs at once which job of a multirun failed, and the error; Hydra reports only the first, after all jobs.

    After the last job it prints how many runs are finished, and the command that compares them.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Notes which folders this run makes, for `remove_if_empty`."""
        folder = Path(config.hydra.run.dir).absolute()
        _made[:] = [folder, *(parent for parent in folder.parents if not parent.exists())]

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        if done := len(list(folder.glob("*/summary.json"))):
            print(
                f"{quantity(done, 'finished run')} in {folder}. To compare: litdistill report runs={literal(str(folder))}"
            )

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN or job_return.status != JobStatus.FAILED:
            return
        try:
            job_return.return_value  # noqa: B018  raises what the job raised
        except Exception as error:
            log.error(
                "Job %s failed: %s. The other jobs go on; the same command with resume=auto repeats what is not finished.",
                *(config.hydra.job.num, _first_lines(_cause(error)).rstrip(".")),
            )
