"""Whose run a folder holds, and how a run of another goes on.

When a run starts, a digest of what decides which code it executes is kept in the user's own folder. A run folder whose digest
is there was made by this user, and may name any class; it may be moved. One that is not there, or was edited since, is a
stranger's: `litdistill.config.trust` says what it may do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
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

log = logging.getLogger(__name__)

# Set while a run goes on that another made: which packages its config may name. Processes that it starts inherit it.
FOREIGN = "LITDISTILL_FOREIGN_RUN"
PLACES = ("runs", "folder", "resume", "trust")  # keys that are the user's to say, and no run folder's or recipe's


# -- whose run it is ----------------------------------------------------------------------------------------------------

_MADE: set[str] = set()  # digests of the runs of this process, also where they cannot be kept


def state_folder() -> Path:
    """Where the digests of this user's runs are kept: $LITDISTILL_STATE, or litdistill in the user's folder for states."""
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

    There is no other reader: what decides whose run it is must be what it goes on with.
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
    """Where Hydra's record of a run lies, and its backup while Hydra rewrites it."""
    return folder / ".hydra" / "hydra.yaml", folder / ".hydra" / "hydra.before.yaml"


def run_digest(folder: Path, config: bytes | None = None) -> str | None:
    """The SHA-256 of what decides which code a run executes: its config and its overrides, as written, wherever it lies.

    `config`: the bytes of its config where they were read already. None where there is none.
    """
    kept = folder / ".hydra"
    try:
        config = (kept / "config.yaml").read_bytes() if config is None else config
    except OSError:
        return None
    overrides = json.dumps(_overrides(folder) or []).encode()
    return hashlib.sha256(hashlib.sha256(config).digest() + overrides).hexdigest()


def _overrides(folder: Path) -> list[str] | None:
    """What Hydra noted that the run was started with; None for one that another run trained."""
    found = start_record(*run_records(folder))
    return found.overrides if found else None


def _started_with(overrides: list[str] | None) -> bool:
    """Whether it was this process that was started with what a folder says."""
    if overrides is None:
        return True
    return HydraConfig.initialized() and overrides == OmegaConf.to_container(
        HydraConfig.get().overrides.task, resolve=False
    )


def made_here(folder: Path, config: bytes | None = None) -> bool:
    """Whether this user has started the run in `folder`, and its config is what it was then."""
    digest = run_digest(folder, config)
    if digest is None:
        return False
    with contextlib.suppress(OSError, RuntimeError):
        return digest in _MADE or (state_folder() / "runs" / digest).is_file()
    return False


def remember(folder: Path, cfg: DictConfig) -> None:
    """Keeps that this user starts the run in `folder`, if the config that lies there is the one that it runs with."""
    try:
        config = (folder / ".hydra" / "config.yaml").read_bytes()
    except OSError:
        return
    if config.decode(errors="replace") != OmegaConf.to_yaml(cfg) or not _started_with(_overrides(folder)):
        return
    digest = run_digest(folder, config)
    assert digest is not None
    from litdistill.utils.checkpoint import (
        write_text,  # with torch, for which commands do not wait before they know their config
    )

    _MADE.add(digest)
    try:
        write_text(state_folder() / "runs" / digest, f"{folder.resolve()}\n")
    except (UserError, OSError, RuntimeError) as error:
        log.info("It is not kept that this run was made here: %s", error)


# -- a run of another that goes on --------------------------------------------------------------------------------------


def replayable(overrides: Sequence[str], folder: str | Path) -> list[str]:
    """Those of a run's overrides that it goes on with. Raises `UserError` for one that does more than set a key.

    Of no run is anything of Hydra's own replayed, since none of it is needed. Where things lie, and what is trusted, is not
    another's run to say; nor does it name files of configs by a path, or call a resolver.
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
    # A key without a dot may choose a file of a folder of configs.
    if "." not in key.split("@")[0] and any(OUTSIDE.search(v) for v in _texts(value)):
        raise refusal(key, value, folder, "A file of conf is chosen by its name, by no path")


def _parsed(text: str, folder: str | Path) -> tuple[str, Any]:
    """The key of an override without its sign, its package included, and its value."""
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
    """From now on this process, and those that it starts, train what another's run says."""
    os.environ[FOREIGN] = json.dumps({"folder": str(folder), "trust": []})


def check_foreign(cfg: DictConfig, folder: str | Path | None = None, trust: Any = None) -> None:
    """`check_trusted` for whatever is about to be trained, where another's run goes on; nothing otherwise.

    `folder`: where it writes, the run's own where None. `trust`: what the command trusts, kept for what it trains on the way.
    """
    if (text := os.environ.get(FOREIGN)) is None:
        return
    about = json.loads(text)
    if trust is not None:
        about["trust"] = packages(trust)
        os.environ[FOREIGN] = json.dumps(about)
    check_trusted(cfg, about["folder"] if folder is None else folder, about["trust"])


def is_foreign() -> bool:
    """Whether it is another's run that goes on."""
    return FOREIGN in os.environ


def check_links(folder: str | Path) -> None:
    """Raises `UserError` for a symbolic link inside a run's folder that leads out of it: writing would follow it."""
    root = Path(folder).resolve()
    for place, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise UserError(
                    f"{path} is a symbolic link that leads out of the run's folder: nothing is written. Remove it."
                )
