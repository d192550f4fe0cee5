"""`resume=<run folder>` and `resume=auto`: what continues a run or a sweep in its own folder."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from litdistill.config.origin import begin_foreign, check_links, made_here, replayable
from litdistill.utils.command_line import config_dir_of, split_flags
from litdistill.utils.errors import UserError


class Note(NamedTuple):
    """What Hydra noted of a start: the config's name, the overrides, and the user's own folder of configs."""

    config_name: str
    overrides: list[str]
    config_dir: str | None


def resumed(arguments: list[str], config_name: str = "train") -> list[str]:
    """Replaces `resume=<run folder>` or `resume=auto` by what continues that run in its own folder.

    A folder's run goes on with the overrides it was started with; where another has made it, with those that set keys of its
    own, and its config is checked before anything of it is made (`litdistill.config.origin`). `auto` is the newest
    unfinished run or sweep that was started with these very overrides, and a new one where there is none. The key itself
    never reaches Hydra.
    """
    flags, typed = split_flags(arguments)
    wanted = [a for a in typed if a.startswith("resume=")]
    overrides = [a for a in typed if not a.startswith("resume=")]
    sweep = bool({"-m", "--multirun"} & set(flags))
    if not wanted or wanted[-1] in ("resume=null", "resume="):
        return [*flags, *overrides]
    target = wanted[-1].removeprefix("resume=")
    if target == "auto":
        folder = _newest(overrides, sweep, config_name)
        if folder is None:
            print("resume=auto: no unfinished run was started with this command; starting one.")
            return [*flags, *overrides]
    else:
        folder = Path(target)
        overrides = [*_replayed(folder, config_name, config_dir_of(flags)), *overrides]
    check_links(folder)
    print(f"Resuming {folder}")
    file, before = _files(folder, sweep)
    if _read(file):  # Hydra is about to write it anew: a kill in that moment must not make the run unknown
        with contextlib.suppress(FileNotFoundError):  # another rank or worker has just done so
            os.replace(file, before)
    return [*flags, *overrides, f"hydra.{'sweep' if sweep else 'run'}.dir={folder}"]


def _newest(overrides: list[str], sweep: bool, config_name: str) -> Path | None:
    """The newest unfinished run that was started with these overrides."""
    runs = next((a.removeprefix("runs=") for a in overrides if a.startswith("runs=")), "runs")
    found = None
    for folder in sorted(Path(runs).glob("*/*"), key=lambda p: p.name):
        note = _noted(folder, sweep, config_name)
        unfinished = sweep or not (folder / "summary.json").is_file()
        if note is not None and _alike(note.overrides, overrides) and unfinished:
            found = folder
    return found


def _replayed(folder: Path, config_name: str, config_dir: Path | None) -> list[str]:
    """The overrides that the run in `folder` was started with. Raises `UserError` where there is none to go on with.

    The folder may come from somebody else: what would set up Hydra itself is not replayed, nor is a folder of configs.
    """
    note = _noted(folder, False, config_name)
    if note is None:
        raise UserError(f"resume={folder}: no run was started there (it has no .hydra/hydra.yaml of this command).")
    found = replayable(note.overrides, folder)
    if not made_here(folder):
        begin_foreign(folder)
    if note.config_dir is not None and config_dir is None:
        raise UserError(
            f"resume={folder}: the run was started with a folder of configs of its own, which is not taken from there. "
            f"If you trust it, add --config-dir {note.config_dir}"
        )
    return found


def _alike(one: list[str], other: list[str]) -> bool:
    """Whether two lists of overrides say the same: in any order, unless a key comes twice."""
    keys = [override.lstrip("+~").split("=")[0] for override in one]
    return one == other or (len(set(keys)) == len(keys) and sorted(one) == sorted(other))


def _noted(folder: Path, sweep: bool, config_name: str) -> Note | None:
    """What this command started a run or a sweep with in `folder`; None where it started none."""
    file, before = _files(folder, sweep)
    found = _read(file) or _read(before)
    return found if found and found.config_name == config_name else None


def _files(folder: Path, sweep: bool) -> tuple[Path, Path]:
    """Where Hydra notes what it was started with, and where that note is kept while it writes it again."""
    file = folder / ("multirun.yaml" if sweep else ".hydra/hydra.yaml")
    return file, file.with_suffix(".before.yaml")


def _read(file: Path) -> Note | None:
    """One of Hydra's notes; None where it is missing or half written."""
    try:
        about: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)  # what stands there, and nothing looked up
        hydra_config = about["hydra"]
        sources = hydra_config.get("runtime", {}).get("config_sources", [])
        config_dir = next((s["path"] for s in sources if s["provider"] == "command-line"), None)
        overrides = [str(override) for override in hydra_config["overrides"]["task"]]
        return Note(str(hydra_config["job"]["config_name"]), overrides, config_dir)
    except (OSError, UnicodeError, YAMLError, OmegaConfBaseException, LookupError, TypeError, AttributeError):
        return None
