"""How commands start and end: one stamp a start, clear errors with the nearest names, an exit status that says what was.

@command("train")
def main(cfg): ...
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.experimental.callback import Callback as HydraCallback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from litdistill.benchmarks import published_tables as papers
from litdistill.config.origin import begin_foreign, check_foreign, check_links, made_here, noted, replayable
from litdistill.utils.distributed import run_stamp
from litdistill.utils.errors import Stopped, UserError
from litdistill.utils.logging import quieten
from litdistill.utils.paths import CONF

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
papers.register()


def command(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Turns `main(cfg)` into a Hydra command with this project's manners; `main` stays callable with a config as `.task`."""

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        entry = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(_checked(task))

        @functools.wraps(task)
        def run() -> None:
            quieten()
            logging.raiseExceptions = False  # on a full disk what the run itself cannot write says so, in a line
            full = os.environ.get("HYDRA_FULL_ERROR") == "1"
            try:
                sys.argv[1:] = resumed(sys.argv[1:], config_name)
                if "RUN_STAMP" not in os.environ:  # Lightning's child processes inherit it: all ranks share one folder
                    os.environ["RUN_STAMP"] = run_stamp()
                with _environment(HYDRA_FULL_ERROR="1"):  # errors come here instead of to Hydra's own printer
                    entry()
            except KeyboardInterrupt:
                _end("Interrupted.", 130)
            except Stopped as stop:
                _end(str(stop), stop.status)
            except Exception as error:
                if isinstance(error, OSError) and error.errno in UNWRITABLE and not full:
                    _end(f"Nothing can be written: {error}. Free some space, or choose another folder with runs=…", 2)
                if full or not isinstance(root := _cause(error), (UserError, HydraException, OmegaConfBaseException)):
                    raise
                # What composing refused is a key or an option; later errors say themselves what they are about.
                near = "" if isinstance(root, UserError) else suggestions(sys.argv[1:], config_name)
                _end(f"{_first_lines(root)}{near}", 2)

        run.task = task  # type: ignore[attr-defined]
        return run

    return decorate


def _checked(task: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """`task`, before which the config is checked where it goes on with a run of somebody else."""

    @functools.wraps(task)
    def run(cfg: DictConfig) -> Any:
        check_foreign(cfg, trust=cfg.get("trust"))
        return task(cfg)

    return run


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


def _end(message: str, status: int) -> None:
    logging.getLogger(__name__).debug("%s", message)
    print(f"\n{message}", file=sys.stderr)
    sys.exit(status)


def resumed(arguments: list[str], config_name: str = "train") -> list[str]:
    """Replaces `resume=<run folder>` or `resume=auto` by what continues that run in its own folder.

    A folder's run goes on with the overrides it was started with; where another has made it, with those that set keys of
    its own, and its config is checked before anything of it is made (`litdistill.config.origin`). `auto` is the newest unfinished
    run or sweep that was started with these very overrides, and a new one where there is none. The key itself never reaches
    Hydra. Raises `UserError` for what another's run may not say, and for links that lead out of the folder.
    """
    wanted = [a for a in arguments if a.startswith("resume=")]
    rest = [a for a in arguments if not a.startswith("resume=")]
    if not wanted or wanted[-1] in ("resume=null", "resume="):
        return rest
    target, options = wanted[-1].removeprefix("resume="), [a for a in rest if a.startswith("-")]
    overrides = [a for a in rest if not a.startswith("-")]
    sweep = bool({"-m", "--multirun"} & set(options))
    if target == "auto":
        runs = next((a.removeprefix("runs=") for a in overrides if a.startswith("runs=")), "runs")
        candidates = [
            p
            for p in sorted(Path(runs).glob("*/*"), key=lambda p: p.name)
            if (found := _overrides(p, sweep, config_name)) is not None and _alike(found, overrides)
        ]
        unfinished = [p for p in candidates if sweep or not (p / "summary.json").is_file()]
        if not unfinished:
            print("resume=auto: no unfinished run was started with this command; starting one.")
            return rest
        folder = unfinished[-1]
    else:
        folder = Path(target)
        found = _overrides(folder, False, config_name)
        if found is None:
            print(
                f"\nresume={target}: no run was started there (it has no .hydra/hydra.yaml of this command).",
                file=sys.stderr,
            )
            sys.exit(2)
        if not made_here(folder):
            found = replayable(found, folder)
            begin_foreign(folder)
        rest = [*options, *found, *overrides]
    check_links(folder)
    print(f"Resuming {folder}")
    file, before = _notes(folder, sweep)
    if noted(file):  # Hydra is about to write it anew: a kill in that moment must not make the run unknown
        with contextlib.suppress(FileNotFoundError):  # another rank or worker has just done so
            os.replace(file, before)
    return [*rest, f"hydra.{'sweep' if sweep else 'run'}.dir={folder}"]


def _alike(one: list[str], other: list[str]) -> bool:
    """Whether two lists of overrides say the same: in any order, unless a key comes twice."""
    keys = [override.lstrip("+~").split("=")[0] for override in one]
    return one == other or (len(set(keys)) == len(keys) and sorted(one) == sorted(other))


def _overrides(folder: Path, sweep: bool, config_name: str) -> list[str] | None:
    """The overrides that this command started a run or a sweep with in `folder`; None where it started none."""
    file, before = _notes(folder, sweep)
    found = noted(file) or noted(before)
    return found[1] if found and found[0] == config_name else None


def _notes(folder: Path, sweep: bool) -> tuple[Path, Path]:
    """Where Hydra notes what it was started with, and where that note is kept while it writes it again."""
    file = folder / ("multirun.yaml" if sweep else ".hydra/hydra.yaml")
    return file, file.with_suffix(".before.yaml")


class JobFailures(HydraCallback):
    """Says at once which job of a multirun has failed, and of what: Hydra tells when all others are done, of the first."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN and job_return.status == JobStatus.FAILED:
            log.error(
                "Job %s failed: %s. The other jobs go on; the same command with resume=auto repeats what is not finished.",
                *(config.hydra.job.num, _first_lines(_cause(job_return._return_value))),
            )


def suggestions(arguments: Iterable[str], config_name: str) -> str:
    """For each override whose key or option does not exist, the nearest that do; empty where all exist."""
    lines = []
    keys, groups = _known(config_name)
    for argument in arguments:
        if argument.startswith("-"):
            continue
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException:
            name, sign, text = argument.partition("=")
            if sign and text == text.strip() and name == name.strip():
                lines.append(f"Quote the value, which has signs of Hydra's own in it: '{name}=\"{text}\"'")
            else:
                lines.append(f"{argument!r} is no override. Write key=value, without spaces around the sign.")
            continue
        key, group = override.key_or_group, override.key_or_group.split("@")[0]
        adds = override.is_add() or override.is_force_add()
        if group in groups and not override.is_delete():
            value = override.value()
            if isinstance(value, str) and value not in groups[group]:
                lines.append(
                    _nearest(f"{override.get_key_element()}={value}", value, groups[group], f"Options of {group}")
                )
        elif key.startswith(("teacher.recipe.", "student.recipe.")) and key not in keys and not adds:
            lines.append(f"{key}: what a recipe may not have yet is set with two plus signs: ++{argument}")
        elif key not in keys and not key.startswith("hydra") and not adds:
            lines.append(_nearest(key, key, sorted(keys | groups.keys()), "Keys"))
    return "".join(f"\n  {line}" for line in lines)


def _nearest(shown: str, name: str, known: Iterable[str], label: str) -> str:
    known = list(known)
    last = [k for k in known if k.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    if label == "Keys" and "." not in name:
        known = [k for k in known if "." not in k]
    near = list(dict.fromkeys(last + difflib.get_close_matches(name, known, n=4, cutoff=0.5)))[:4]
    return (
        f"{shown}: did you mean {' or '.join(near)}?" if near else f"{shown}: unknown. {label}: {', '.join(known[:40])}"
    )


def _known(config_name: str) -> tuple[set[str], dict[str, list[str]]]:
    """All keys of the composed default config, and the options of each group."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(config_name)
    files = [p.relative_to(CONF).with_suffix("") for p in CONF.rglob("*.yaml") if p.parent != CONF]
    files += [Path("experiment", name) for name in papers.experiments()]
    groups: dict[str, list[str]] = {}
    for file in sorted(files):
        for depth in range(1, len(file.parts)):
            groups.setdefault("/".join(file.parts[:depth]), []).append("/".join(file.parts[depth:]))
    return set(_keys(OmegaConf.to_container(cfg), "")), groups


def _keys(node: Any, prefix: str) -> Iterator[str]:
    for key, value in node.items() if isinstance(node, dict) else ():
        yield f"{prefix}{key}"
        yield from _keys(value, f"{prefix}{key}.")
