"""`resume=<run folder>` and `resume=auto`: replaced by the overrides that continue a run or a sweep in its own folder."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from litdistill.cli import starting
from litdistill.config.origin import (
    StartRecord,
    begin_foreign,
    check_links,
    made_here,
    read_record,
    replayable,
    restore_record,
    run_records,
    save_record,
    start_record,
)
from litdistill.utils.command_line import config_dir_of, literal, split_flags
from litdistill.utils.errors import UserError
from litdistill.utils.text import printable

# Options of a trainer that say on which devices it runs.
LAUNCH = ("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.sync_batchnorm")


def resumed(arguments: list[str], config_name: str = "train") -> list[str]:
    """Replaces `resume=<run folder>` or `resume=auto` by the overrides that continue that run in its own folder.

    A run continues with the overrides it was started with. Those of a folder made elsewhere are restricted to keys of its
    own, and its config is checked before anything is built from it (`litdistill.config.origin`). `auto` selects the newest
    unfinished run or sweep that was started with the same overrides, or starts a new one. The key is never passed to
    Hydra.
    """
    flags, typed = split_flags(arguments)
    requests = [a for a in typed if a.startswith("resume=")]
    overrides = [a for a in typed if not a.startswith("resume=")]
    sweep = bool({"-m", "--multirun"} & set(flags))
    if not requests or requests[-1] in ("resume=null", "resume="):
        return [*flags, *overrides]
    target = requests[-1].removeprefix("resume=")
    if target == "auto":
        folder = _newest(overrides, sweep, config_name)
        if folder is None:
            starting.end()
            print("resume=auto: no unfinished run was started with this command; starting one.")
            return [*flags, *overrides]
    else:
        folder = Path(target)
        check_links(folder)
        restore_record(folder)  # of a resume that was killed before it was accepted
        replayed = _replayed(folder, config_name, config_dir_of(flags))
        overrides = [*_without_launch(replayed, overrides), *overrides]
    check_links(folder)
    starting.end()
    print(f"Resuming {folder}")
    if (folder / ".hydra").is_dir() and not sweep:
        save_record(folder)
    file, backup = _record_files(folder, sweep)
    if read_record(file):  # Hydra rewrites the record: a kill during that must not lose it
        with contextlib.suppress(FileNotFoundError):  # another rank or worker has moved it already
            os.replace(file, backup)
    return [*flags, *overrides, f"hydra.{'sweep' if sweep else 'run'}.dir={literal(str(folder))}"]


def _newest(overrides: list[str], sweep: bool, config_name: str) -> Path | None:
    """Returns the newest unfinished run that was started with these overrides; None without one."""
    runs = next((a.removeprefix("runs=") for a in overrides if a.startswith("runs=")), "runs")
    newest = None
    for folder in sorted(Path(runs).glob("*/*"), key=lambda p: p.name):
        record = _start_record(folder, sweep, config_name)
        unfinished = sweep or not (folder / "summary.json").is_file()
        if record is not None and _same_overrides(record.overrides, overrides) and unfinished:
            newest = folder
    return newest


def _replayed(folder: Path, config_name: str, config_dir: Path | None) -> list[str]:
    """Returns the overrides that the run in `folder` was started with. Raises `UserError` if no run was started there.

    The folder may be untrusted: overrides of Hydra itself, and a folder of configs, are not replayed.
    """
    record = _start_record(folder, False, config_name)
    if record is None:
        raise UserError(f"resume={folder}: no run was started there (it has no .hydra/hydra.yaml of this command).")
    found = replayable(record.overrides, folder)
    if not made_here(folder):
        begin_foreign(folder)
    if record.config_dir is not None and config_dir is None:
        raise UserError(
            f"resume={folder}: the run was started with its own folder of configs, which is not read automatically. "
            f"If you trust it, add --config-dir {record.config_dir}"
        )
    return found


def _without_launch(replayed: list[str], typed: list[str]) -> list[str]:
    """Returns the replayed overrides without those of the launch where another trainer is typed: they belong to the old one.

    A run of two ranks that goes on with `trainer=cpu` has one device, as that file says.
    """
    if not any(override.startswith("trainer=") for override in typed):
        return replayed
    dropped = [o for o in replayed if o.lstrip("+~").split("=")[0] in LAUNCH]
    if dropped:
        print(f"Not replayed, since another trainer is chosen: {printable(', '.join(dropped))}")
    return [o for o in replayed if o not in dropped]


def _same_overrides(one: list[str], other: list[str]) -> bool:
    """Returns whether two lists of overrides are equivalent: equal in any order, unless a key is repeated."""
    keys = [override.lstrip("+~").split("=")[0] for override in one]
    return one == other or (len(set(keys)) == len(keys) and sorted(one) == sorted(other))


def _start_record(folder: Path, sweep: bool, config_name: str) -> StartRecord | None:
    """Returns the record of this command's start in `folder`; None where it started no such run or sweep."""
    found = start_record(*_record_files(folder, sweep))
    return found if found and found.config_name == config_name else None


def _record_files(folder: Path, sweep: bool) -> tuple[Path, Path]:
    """Returns the path of Hydra's record, and the path of its backup while Hydra rewrites it."""
    return (folder / "multirun.yaml", folder / "multirun.before.yaml") if sweep else run_records(folder)
