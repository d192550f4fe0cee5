"""The origin of run folders: which ones this user made, and how a foreign run is resumed.

When a run starts, a digest of its config and overrides, which decide what code it executes, is stored in the user's state
folder. A run folder with a stored digest was made by this user, may name any class, and may be moved. A folder without one,
or edited since, is foreign: `litdistill.config.trust` restricts what its config may name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from litdistill.config.trust import OUTSIDE, PLAIN, check_trusted, packages, refusal
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_text

log = logging.getLogger(__name__)

# Set while a foreign run is resumed, with the packages that its config may name. Child processes inherit it.
FOREIGN = "LITDISTILL_FOREIGN_RUN"
PLACES = ("runs", "folder", "resume", "trust")  # keys that only the user sets, never a run folder or a recipe


# -- origin of a run ----------------------------------------------------------------------------------------------------

_MADE: set[str] = set()  # digests of the runs of this process, in case they cannot be stored


def state_folder() -> Path:
    """Returns the folder of the digests of this user's runs: $LITDISTILL_STATE, else litdistill in the XDG state folder."""
    if own := os.environ.get("LITDISTILL_STATE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state").expanduser() / "litdistill"


class StartRecord(NamedTuple):
    """The record that Hydra writes at a start: config name, overrides, and the user's folder of configs."""

    config_name: str
    overrides: list[str]
    config_dir: str | None


def start_record(file: Path, backup: Path) -> StartRecord | None:
    """Reads Hydra's record, or its backup where it is missing or half written; None without either.

    It is the only reader of that record, so that the checked overrides are the ones that are replayed.
    """
    return read_record(file) or read_record(backup)


def read_record(file: Path) -> StartRecord | None:
    """Parses one of Hydra's records; None for a missing or partial file."""
    try:
        about: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)  # as written, and nothing looked up
        hydra_config = about["hydra"]
        sources = hydra_config.get("runtime", {}).get("config_sources", [])
        config_dir = next((s["path"] for s in sources if s["provider"] == "command-line"), None)
        overrides = [str(override) for override in hydra_config["overrides"]["task"]]
        return StartRecord(str(hydra_config["job"]["config_name"]), overrides, config_dir)
    except (OSError, UnicodeError, YAMLError, OmegaConfBaseException, LookupError, TypeError, AttributeError):
        return None


def run_records(folder: Path) -> tuple[Path, Path]:
    """Returns the path of Hydra's record of a run, and that of its backup for the time that Hydra rewrites it."""
    return folder / ".hydra" / "hydra.yaml", folder / ".hydra" / "hydra.before.yaml"


RECORD = ("config.yaml", "hydra.yaml", "overrides.yaml")  # what Hydra writes anew at each start


def save_record(folder: Path) -> None:
    """Copies Hydra's record of a run, which a resume overwrites, for `restore_record`."""
    kept, before = folder / ".hydra", folder / ".hydra" / BEFORE
    part = kept / f"{BEFORE}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for name in RECORD:
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(kept / name, part / name)
    with contextlib.suppress(OSError):  # another rank has done so, or a resume that was killed before it was accepted
        part.rename(before)


def restore_record(folder: Path) -> None:
    """Puts back the record of a run that could not be resumed: its config is what it was trained with, still."""
    before = folder / ".hydra" / BEFORE
    for name in RECORD if before.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):
            os.replace(before / name, folder / ".hydra" / name)
    accept_record(folder)


def accept_record(folder: Path) -> None:
    """Deletes the copy of `save_record`: the run goes on with the config of the resume."""
    for name in (BEFORE, f"{BEFORE}.part"):
        shutil.rmtree(folder / ".hydra" / name, ignore_errors=True)


BEFORE = "before"


def run_digest(folder: Path, config: bytes | None = None) -> str | None:
    """Returns the SHA-256 of a run's config and overrides, which decide what code it executes; the path does not enter.

    `config`: the bytes of its config, if already read. Returns None if there is no config.
    """
    kept = folder / ".hydra"
    try:
        config = (kept / "config.yaml").read_bytes() if config is None else config
    except OSError:
        return None
    overrides = json.dumps(_overrides(folder) or []).encode()
    return hashlib.sha256(hashlib.sha256(config).digest() + overrides).hexdigest()


def _overrides(folder: Path) -> list[str] | None:
    """Returns the overrides in Hydra's record of a run; None for a run that was trained as another's prerequisite."""
    found = start_record(*run_records(folder))
    return found.overrides if found else None


def _started_with(overrides: list[str] | None) -> bool:
    """Returns whether this process was started with these overrides; True for None."""
    if overrides is None:
        return True
    return HydraConfig.initialized() and overrides == OmegaConf.to_container(
        HydraConfig.get().overrides.task, resolve=False
    )


def made_here(folder: Path, config: bytes | None = None) -> bool:
    """Returns whether this user started the run in `folder` with the config and overrides that it now has."""
    digest = run_digest(folder, config)
    if digest is None:
        return False
    with contextlib.suppress(OSError, RuntimeError):
        return digest in _MADE or (state_folder() / "runs" / digest).is_file()
    return False


def remember(folder: Path, cfg: DictConfig) -> None:
    """Stores the digest of the run in `folder` as this user's, if the config in the folder equals `cfg`."""
    try:
        config = (folder / ".hydra" / "config.yaml").read_bytes()
    except OSError:
        return
    if config.decode(errors="replace") != OmegaConf.to_yaml(cfg) or not _started_with(_overrides(folder)):
        return
    digest = run_digest(folder, config)
    assert digest is not None
    _MADE.add(digest)
    try:
        write_text(state_folder() / "runs" / digest, f"{folder.resolve()}\n")
    except (UserError, OSError, RuntimeError) as error:
        log.info("It is not kept that this run was made here: %s", error)


# -- resuming a foreign run ---------------------------------------------------------------------------------------------


def replayable(overrides: Sequence[str], folder: str | Path) -> list[str]:
    """Returns the overrides of a run that are replayed when it is resumed. Raises `UserError` for a disallowed one.

    Disallowed in any run: overrides of Hydra's own keys, which resuming does not need. Disallowed in a foreign run: config
    files named by a path, and resolvers. A foreign run's overrides of `PLACES` are dropped.
    """
    kept, own = [], made_here(Path(folder))
    for text in overrides:
        key, value = _parsed(text, folder)
        parts = re.split(r"[.@/:]", key)
        if {"hydra", "defaults", "searchpath"} & set(parts):
            raise refusal(key, value, folder, "No override of Hydra's own is replayed")
        if parts[0] in PLACES and not own:
            continue
        if not own:
            _check_override(text, key, value, folder)
        kept.append(text)
    return kept


def _check_override(text: str, key: str, value: Any, folder: str | Path) -> None:
    if "${" in PLAIN.sub("", text):
        raise refusal(key, value, folder, "An interpolation may name another key, and nothing else")
    package = key.partition("@")[2].removeprefix("_global_.")
    if package.split(".")[0] in PLACES:
        raise refusal(key, value, folder, "Where things lie, and what is trusted, is not the run's to say")
    # A key without a dot may select a config file of a group.
    if "." not in key.split("@")[0] and any(OUTSIDE.search(v) for v in _texts(value)):
        raise refusal(key, value, folder, "A file of conf is chosen by its name, by no path")


def _parsed(text: str, folder: str | Path) -> tuple[str, Any]:
    """Returns the key of an override with its package and without its sign, and the value."""
    try:
        if text.startswith("-"):
            raise refusal("hydra.overrides", text, folder, "An option of a command is no override")
        override = OverridesParser.create().parse_override(text)
        value = None if override.is_delete() else override.value()
    except HydraException as error:
        raise refusal("hydra.overrides", text, folder, "It is no override") from error
    return override.get_key_element().lstrip("+~"), value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, ChoiceSweep):
        value = value.list
    if isinstance(value, QuotedString):
        value = value.text
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _texts(one)
    elif value is not None:
        yield str(value)


def begin_foreign(folder: str | Path) -> None:
    """Marks this process, and the processes that it starts, as resuming the foreign run in `folder`."""
    os.environ[FOREIGN] = json.dumps({"folder": str(folder), "trust": []})


def check_foreign(cfg: DictConfig, folder: str | Path | None = None, trust: Any = None) -> None:
    """Calls `check_trusted` for a config before its training if a foreign run is resumed; otherwise does nothing.

    `folder`: where the config's run writes; None: the foreign run's folder. `trust`: the packages that the command trusts,
    stored for the run's prerequisites.
    """
    if (text := os.environ.get(FOREIGN)) is None:
        return
    about = json.loads(text)
    if trust is not None:
        about["trust"] = packages(trust)
        os.environ[FOREIGN] = json.dumps(about)
    check_trusted(cfg, about["folder"] if folder is None else folder, about["trust"])


def is_foreign() -> bool:
    """Returns whether this process resumes a foreign run."""
    return FOREIGN in os.environ


def check_links(folder: str | Path) -> None:
    """Raises `UserError` for a symbolic link in a run's folder that points out of it, since writing would follow it."""
    root = Path(folder).resolve()
    for place, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise UserError(
                    f"{path} is a symbolic link that leads out of the run's folder: nothing is written. Remove it."
                )
